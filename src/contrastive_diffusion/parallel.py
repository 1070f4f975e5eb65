r"""Parallel-in-time sampling: all steps of a window at once, corrected round by round until the path stands still.

The sequential path solves :math:`x_{i+1}=\Phi_i(x_i)`. Each round evaluates every :math:`\Phi_i` of the window in one batch and sweeps

.. math:: x_{i+1}^{k+1} = \Phi_i(x_i^k) + L_i\,(x_i^{k+1}-x_i^k)

from the exact left end. :math:`L=1` is Picard iteration (ParaDiGMS, Shih et al. 2023); other slopes are other members of one family. In
this form a state whose predecessor did not move is exactly :math:`\Phi` of it, to the last bit, whatever L: after k rounds k steps are
exact, and at tolerance 0 the result is the sequential one, bit for bit, for a denoiser whose rows do not depend on the batch. A positive
tolerance bounds the last increment of each state, not the final error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.channel import noise
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import UsageError, choose, require
from contrastive_diffusion.sampling import Round, Samples, Watch, check_finite, prepare
from contrastive_diffusion.solvers import Affine, Solver, StepMap, ddpm


@dataclass(frozen=True)
class Parallel:
    r"""Parallel sampling with ParaDiGMS's window and acceptance rule, in lock step over the batch.

    Args:
        solver: any step map.
        slope: "picard" (any solver); "gauss", "eps", "x0" hold a Gaussian denoiser, :math:`\hat\epsilon` or :math:`\hat x` over the step (affine solvers).
        window: steps worked on at once, at least 1; None is the whole grid.
        tolerance: a state is accepted when the mean square of its increment is at most ``tolerance``\ :sup:`2` times the variance of
            the DDPM posterior of the step that reaches it (the last step, which has none, takes its predecessor's). 0 is exact.
        max_rows: rows per denoiser call.
    """

    solver: Solver
    slope: str = "picard"
    window: int | None = None
    tolerance: float = 0.1
    max_rows: int = 4096

    def __post_init__(self):
        choose(self.slope, SLOPES, "slope")
        require(self.window is None or self.window >= 1, f"window = {self.window}", "window >= 1, or None for the whole grid")
        require(self.tolerance >= 0 and math.isfinite(self.tolerance), f"tolerance = {self.tolerance}", "a finite tolerance >= 0")
        if self.slope != "picard" and not isinstance(self.solver, Affine):
            raise UsageError(f"given slope {self.slope!r} for a solver that is not affine in eps_hat, expected slope 'picard'")

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        grid: Tensor,
        shape: tuple[int, ...],
        seed: int = 0,
        *,
        first: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        path: bool = False,
        watch: Watch | None = None,
    ) -> Samples:
        """As ``Sequential``: the same arguments, noise and result; ``rounds`` counts batched evaluations of the window."""
        task = prepare(self.solver, denoiser, grid, shape, seed, first, device, dtype, self.max_rows)
        steps = len(task.step)
        size = min(self.window or steps, steps)
        slopes = SLOPES[self.slope](task.step).to(dtype)
        bound = self.tolerance**2 * _scale(grid.to(device))
        states = task.start.expand(size + 1, *shape).clone()
        noises, begin, rounds, accepted = task.noise(0, size), 0, 0, [task.start]
        while begin < steps:
            end = begin + len(noises)
            swept = _sweep(task.step, states, noises, begin, slopes)
            rounds += 1
            check_finite(swept, begin, rounds, first)
            task.clock.paused(watch, lambda swept=swept, begin=begin, end=end, n=rounds: Round(n, begin, end, swept))
            moved = (swept[1:] - states[1:]).square().flatten(2).mean(2)  # (window, B)
            still = (moved <= bound[begin:end, None]).all(1)
            # The state after the last still one is final too: what it was computed from is.
            advance = min(int(still.long().cumprod(0).sum()) + 1, end - begin)
            if path:
                accepted.extend(swept[1 : advance + 1])
            begin, states, noises = begin + advance, *_slide(swept, noises, advance, min(advance, steps - end), task.noise, end)
        return Samples(states[0].clone(), task.counted.rows, rounds, task.clock.seconds(), torch.stack(accepted) if path else None)


def _sweep(step: StepMap, states: Tensor, noises: Tensor, begin: int, slopes: Tensor) -> Tensor:
    """One round on states (w + 1, B, *S): all steps in one batch, then the recursion from the exact left end."""
    width, batch = noises.shape[:2]
    i = torch.arange(begin, begin + width, device=states.device).repeat_interleave(batch)
    target = step(states[:-1].flatten(0, 1), i, noises.flatten(0, 1)).reshape(noises.shape)
    swept = torch.empty_like(states)
    swept[0] = states[0]
    for j in range(width):
        swept[j + 1] = target[j] + slopes[begin + j] * (swept[j] - states[j])
    return swept


def _slide(states: Tensor, noises: Tensor, advance: int, entering: int, noise: Callable[[int, int], Tensor], end: int) -> tuple[Tensor, Tensor]:
    """The window moved on by ``advance``; ``entering`` new states start as copies of the last one."""
    states, noises = states[advance:], noises[advance:]
    if entering:
        states = torch.cat([states, states[-1:].expand(entering, *states.shape[1:])])
        noises = torch.cat([noises, noise(end, end + entering)])
    return states, noises


def _scale(grid: Tensor) -> Tensor:
    """Variance of the DDPM posterior of each step (T,), float64, the last one's taken from its predecessor."""
    variance = ddpm("posterior").coefficients(grid[:-1].double(), grid[1:].double())[2].square()
    if bool(grid[-1].isinf()):
        variance[-1] = variance[-2] if len(variance) > 1 else 1.0
    return variance


def _table(step: StepMap) -> tuple[Tensor, Tensor]:
    if step.table is None:
        raise UsageError("given a static slope for a solver that is not affine in eps_hat, expected slope 'picard'")
    return step.table[0], step.table[1][:, 0]


def _gauss(step: StepMap) -> Tensor:
    """d Phi / dx for standard normal data, whose denoiser is noise * z."""
    a, b = _table(step)
    return a + b * noise(step.logsnr)


def _eps(step: StepMap) -> Tensor:
    return _table(step)[0]


def _x0(step: StepMap) -> Tensor:
    a, b = _table(step)
    return a + b / noise(step.logsnr)


# L_i (T,) of each slope, float64.
SLOPES: dict[str, Callable[[StepMap], Tensor]] = {
    "eps": _eps,
    "gauss": _gauss,
    "picard": lambda step: torch.ones_like(step.logsnr),
    "x0": _x0,
}
