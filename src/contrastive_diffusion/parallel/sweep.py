r"""One round: read the denoiser everywhere in the windows, correct all states, accept what stands still.

With :math:`d_i=x_i^{new}-x_i` the recursion of a round is :math:`d_{i+1}=r_i+L_i d_i` for the plain defects :math:`r_i=\Phi_i(x_i)-x_{i+1}`, and
:math:`x_{i+1}^{new}=\Phi_i(x_i)+L_i d_i`. d is the error of the state as the slopes predict it, from the defects of all steps between the
frontier and here; it is what the tolerance is put on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.parallel.noise import Noise
from contrastive_diffusion.parallel.ring import Ring
from contrastive_diffusion.parallel.scan import scan
from contrastive_diffusion.parallel.slopes import Slope
from contrastive_diffusion.solvers import StepMap

CHUNK = 2**18  # numbers worked on at once: they stay in the cache
FAR = 2**62


@dataclass(frozen=True)
class Rule:
    """When a state stands still. ``bound`` (T,): mean square of the error allowed in the state that a step leads to; ``floor``: in units of its
    mean square, what rounding makes of it; ``reference`` (T,): the bound that progress is measured by. ``exact``: not a bit may change."""

    bound: Tensor
    reference: Tensor
    floor: float
    exact: bool


@dataclass(frozen=True)
class Outcome:
    """After a round, on the device: ``base`` (B,) new frontiers; ``far`` (B,) decades by which the window's states miss the bound, on average;
    ``broken`` (B,) the first state that is not finite; ``error`` (P, B) mean squares by slot of the state; ``arrives`` (P, B) bool."""

    base: Tensor
    far: Tensor
    broken: Tensor
    error: Tensor
    arrives: Tensor

    def packed(self) -> Tensor:
        return torch.stack([self.base.double(), self.far.double(), self.broken.double()])


def read(ring: Ring, step: StepMap, noise: Noise | None, j: Tensor, lane: Tensor) -> None:
    """Evaluates the steps ``base + j`` of the lanes (R,), into ``ring.out``: the solver's outputs, or the next states of a map that is no table."""
    i = ring.base[lane] + j
    at = ring.row(i, lane)
    z, i = ring._x.index_select(0, at).view(-1, *ring.item), i.clamp(max=ring.steps - 1)
    if step.table is None:
        drawn = z if noise is None else noise.rows(i, lane).view(len(z), *noise.item)
        out = step(z, i, drawn)
    else:
        out = step.read(z, i)
    for k in range(1, ring.memory + 1):  # outputs of final steps, which this round does not read again
        past = ring.row(ring.base - k)
        ring._out[past] = ring._out_old[past]
    ring._out.index_copy_(0, at, out.reshape(len(at), *ring.shape[2:]))


def correct(ring: Ring, step: StepMap, noise: Noise | None, slope: Slope, measured: Tensor, rule: Rule) -> Outcome:
    """The round after ``read``: leaves new states in ``x_old``, errors d in ``out_old``, and the accepted frontier in the outcome.

    ``measured`` (B,): lanes that may use the measured slope.
    """
    index = ring.index()
    inside = (index - ring.base < ring.steps_left()) & (index < ring.steps)
    index = index.clamp(max=ring.steps - 1)
    factor = _slopes(ring, index, inside, slope, measured)
    arrives, factor = inside.roll(1, 0), (factor * inside[..., None]).roll(1, 0)
    _targets(ring, step, noise, index, arrives)
    d = scan(ring.out_old, factor, ring.block)
    reached = index.roll(1, 0)  # the step that leads to the state of a slot
    error, size = _measure(ring, rule, d)
    new = ring.x_old
    new[0].addcmul_(factor[0, :, :, None], d[-1])
    new[1:].addcmul_(factor[1:, :, :, None], d[:-1])
    allowed = rule.bound[reached] + rule.floor * size
    base = _frontier(ring, arrives & (error <= allowed))
    broken = torch.where(arrives & ~error.isfinite(), reached + 1, FAR).amin(0)
    ratio = (error.double() / rule.reference[reached]).clamp(1.0, 1e30).log10()
    far = torch.where(arrives, ratio, 0.0).sum(0) / arrives.sum(0).clamp(min=1)
    ring.seen |= inside
    return Outcome(base, far, broken, error, arrives)


def _slopes(ring: Ring, index: Tensor, inside: Tensor, slope: Slope, measured: Tensor) -> Tensor:
    """Slopes of the steps of all slots, (P, B, C)."""
    tables, dtype = ring.tables, ring.slope.dtype
    first = slope.first(tables)[index].to(dtype)[..., None].expand(ring.shape[:3])
    if not slope.measured:
        return first
    fallback = tables.gauss[index].to(dtype)[..., None]
    over, under = torch.empty_like(ring.slope), torch.empty_like(ring.slope)
    for low, high in _chunks(ring):
        dx = ring.x[low:high] - ring.x_old[low:high]
        torch.sum(dx.square(), -1, out=under[low:high])
        torch.sum(dx.mul_(ring.out[low:high] - ring.out_old[low:high]), -1, out=over[low:high])
    a, b, least, most = (v[index].to(dtype)[..., None] for v in (tables.a, tables.b, tables.low(), tables.high()))
    found = torch.minimum(torch.maximum(a + b * (over / under), least), most)
    pair = (ring.seen & inside)[..., None]
    ring.slope = torch.where(pair & (under > 0), found, torch.where(pair, ring.slope, first))
    return torch.where(measured[None, :, None], ring.slope, fallback)


def _targets(ring: Ring, step: StepMap, noise: Noise | None, index: Tensor, arrives: Tensor) -> None:
    """Phi of every step, at the slot of the state it leads to, in ``x_old``; its defect in ``out_old``. Other slots keep their state, defect zero."""
    drawn = None if noise is None or step.table is None else noise.in_slots(index)
    for low, high in ((0, 1), *_chunks(ring, 1)):
        source = slice(low - 1, high - 1) if low else slice(ring.slots - 1, ring.slots)
        new = ring.x_old[low:high]
        target = ring.out[source] if step.table is None else _combine(ring, step, drawn, index, source)
        torch.where(arrives[low:high, :, None, None], target, ring.x[low:high], out=new)
        torch.sub(new, ring.x[low:high], out=ring.out_old[low:high])


def _combine(ring: Ring, step: StepMap, drawn: Tensor | None, index: Tensor, source: slice) -> Tensor:
    z = ring.x[source].flatten(0, 1)
    outputs = [ring.out[source].flatten(0, 1)]
    for k in range(1, ring.memory + 1):
        past = (torch.arange(source.start, source.stop, device=z.device) - k) % ring.slots
        outputs.append(ring.out[past].flatten(0, 1))
    noise = z if drawn is None else drawn[source].flatten(0, 1)
    return step.combine(z, index[source].flatten(), outputs, noise).view(-1, *ring.shape[1:])


def _measure(ring: Ring, rule: Rule, d: Tensor) -> tuple[Tensor, Tensor | float]:
    """Mean square of the errors (its root's maximum where not a bit may change), and of the states where rounding could matter, (P, B)."""
    if rule.exact:
        largest = torch.empty(ring.shape[:2], dtype=d.dtype, device=d.device)
        for low, high in _chunks(ring):
            torch.amax(d[low:high].abs(), (2, 3), out=largest[low:high])
        return largest, 0.0
    return _mean_square(ring, d), _mean_square(ring, ring.x_old) if rule.floor else 0.0


def _mean_square(ring: Ring, values: Tensor) -> Tensor:
    total = torch.empty(ring.shape[:2], dtype=values.dtype, device=values.device)
    for low, high in _chunks(ring):
        torch.sum(values[low:high].square().flatten(2), 2, out=total[low:high])
    return total / (ring.shape[2] * ring.shape[3])


def _frontier(ring: Ring, still: Tensor) -> Tensor:
    """The new frontiers: past the states that stand still, and one more, which was computed from the last of them."""
    j = torch.arange(ring.window, device=still.device)[:, None]
    left = ring.steps_left()
    kept = still.gather(0, (ring.base + 1 + j) % ring.slots) & (j < left)
    return ring.base + torch.minimum(kept.long().cumprod(0).sum(0) + 1, left)


def _chunks(ring: Ring, first: int = 0) -> list[tuple[int, int]]:
    each = max(1, CHUNK // (ring.lanes * ring.shape[2] * ring.shape[3]))
    return [(low, min(low + each, ring.slots)) for low in range(first, ring.slots, each)]
