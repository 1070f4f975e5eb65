"""The window of every lane in ring buffers: states, outputs and noise of a few steps, whatever the length of the grid.

A lane is a place for one sample. State i of its path lives in slot i mod P, so a window moves on without anything being copied. A lane's
window is the states ``base`` (final) to ``end``; step i, from state i to i + 1, belongs to slot i mod P.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from contrastive_diffusion.parallel.scan import block_of, scan, slots_for
from contrastive_diffusion.parallel.slopes import Tables

Noise = Callable[[Tensor, Tensor], Tensor]  # sample ids (N,), steps (N,) -> unit noise (N, ...)


class Ring:
    """Buffers of P slots and B lanes. A state of D numbers is seen as C groups of E: a slope for each group.

    ``x``: the states; ``out``: the solver's outputs there; ``x_old``, ``out_old``: those of the round before; ``slope`` (P, B, C) of the
    step from each slot; ``seen``: its output was read before. ``base``, ``end``, ``width``: (B,) int64.
    """

    def __init__(
        self, tables: Tables, lanes: int, window: int, memory: int, item: tuple[int, ...], groups: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.tables, self.lanes, self.window, self.item, self.memory = tables, lanes, window, item, memory
        self.steps, self.block, self.slots = len(tables.a), block_of(window + 1 + memory), slots_for(window + 1 + memory)
        numel = int(torch.Size(item).numel())
        self.shape = (self.slots, lanes, groups, numel // groups)
        # One row more than the ring: where rows that must go nowhere are written.
        self._x, self._x_old, self._out, self._out_old = (
            torch.zeros(self.slots * lanes + 1, *self.shape[2:], dtype=dtype, device=device) for _ in range(4)
        )
        self.slope = torch.zeros(self.shape[:3], dtype=dtype, device=device)
        self.seen = torch.zeros(self.shape[:2], dtype=torch.bool, device=device)
        self.base, self.end = torch.zeros(2, lanes, dtype=torch.int64, device=device).unbind()
        self.width = torch.full((lanes,), window, dtype=torch.int64, device=device)
        self.lane = torch.arange(lanes, device=device)
        self._slot = torch.arange(self.slots, device=device)[:, None]

    @property
    def x(self) -> Tensor:
        return self._x[:-1].view(self.shape)

    @property
    def x_old(self) -> Tensor:
        return self._x_old[:-1].view(self.shape)

    @property
    def out(self) -> Tensor:
        return self._out[:-1].view(self.shape)

    @property
    def out_old(self) -> Tensor:
        return self._out_old[:-1].view(self.shape)

    def swap(self) -> None:
        """The round's results become the state, the state becomes the past."""
        self._x, self._x_old, self._out, self._out_old = self._x_old, self._x, self._out_old, self._out

    def index(self) -> Tensor:
        """The state that each slot holds, counted on from the frontier, (P, B)."""
        return self.base + (self._slot - self.base) % self.slots

    def row(self, i: Tensor, lane: Tensor | None = None) -> Tensor:
        """Rows of the flat buffers of states i of lanes, any broadcast shapes."""
        return (i % self.slots) * self.lanes + (self.lane if lane is None else lane)

    def steps_left(self) -> Tensor:
        """Steps in each lane's window, (B,)."""
        return torch.minimum(self.width, self.steps - self.base).clamp(min=0)

    def load(self, lane: Tensor, start: Tensor) -> None:
        """New samples with initial states ``start`` (n, *S) into lanes (n,)."""
        self._x[lane] = start.reshape(len(lane), *self.shape[2:])
        self.base[lane] = 0
        self.end[lane] = 0
        self.seen[:, lane] = False

    def enter(self, most: int, noise: Callable[[Tensor, Tensor], Tensor] | None, fresh: Tensor, guess: str, given: Tensor | None = None) -> None:
        """Fills the states between ``end`` and the end of the window, at most ``most`` per lane, with the best that is known without an evaluation.

        They follow the last state with its x_hat held and their own noise: z_i = signal_i x_hat + y_i, where y is the recursion of the
        slope "x0". Lanes that are ``fresh`` (B,) start with the path of standard normal data ("gauss") or a constant one.

        Args:
            noise: (lane rows of steps (n, B), steps) -> unit noise (n, B, C, E), None for solvers without.
            given: states (T + 1, B, *S) to take instead.
        """
        t, end = self.tables, torch.maximum(self.end, torch.minimum(self.base + self.width, torch.full_like(self.base, self.steps)))
        count = slots_for(most + 1, self.block)
        j = torch.arange(count, device=self.base.device)[:, None]
        i = self.end + j  # the state; it is reached by step i - 1
        step, known = (i - 1).clamp(0, self.steps - 1), (self.end - 1).clamp(min=0)
        at = self.row(known)
        dtype = self._x.dtype
        hold = torch.where(fresh, t.gauss[step] if guess == "gauss" else torch.ones_like(t.gauss)[step], t.x0[step])
        p, r = (v[known].to(dtype)[:, None, None] for v in t.to_x)
        x_hat = torch.where(fresh[:, None, None], 0.0, p * self._x_old[at] + r * self._out_old[at])
        y = torch.zeros(count, *self.shape[1:], dtype=dtype, device=self._x.device)
        if noise is not None:
            spread = torch.where(fresh & (guess != "gauss"), 0.0, t.spread[step])
            y[1 : most + 1] = spread[1 : most + 1].to(dtype)[..., None, None] * noise(i[1 : most + 1] - 1, step[1 : most + 1])
        before = t.signal[self.end.clamp(max=self.steps - 1)].to(dtype)[:, None, None]
        y[0] = self._x[self.row(self.end)] - before * x_hat
        factor = torch.where(j > 0, hold, 0.0).to(dtype)[..., None].expand(*y.shape[:3])
        states = scan(y, factor, self.block)
        states += t.after[step].to(dtype)[..., None, None] * x_hat
        if given is not None:
            states = given[i.clamp(max=self.steps), self.lane].reshape(states.shape).to(dtype)
        inside = (j > 0) & (i <= end)
        rows = torch.where(inside, self.row(i), self.slots * self.lanes)
        self._x.index_copy_(0, rows.flatten(), states.flatten(0, 1))
        held = self.index()
        self.seen &= ~((held > self.end) & (held <= end))
        self.end.copy_(end)
