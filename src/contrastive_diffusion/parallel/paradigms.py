"""ParaDiGMS's rule (Shih et al. 2023), for comparison and for the paper's tables: Picard, in lock step over the batch, on increments.

A state counts as unfinished while the mean square of its last increment exceeds ``tolerance``\\ :sup:`2` times the variance of the DDPM posterior of
the step that *leaves* it, as in the published code (the clean state, which none leaves, may not move at all). The whole batch advances past the
states that are finished in every sample, and one more; new states start as copies of the last. Two things differ from the code: sweeps are
written as in ``parallel``, so that tolerance 0 ends in the sequential bits, and deterministic solvers use the same variances.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import require
from contrastive_diffusion.parallel.checks import check, check_window
from contrastive_diffusion.parallel.scan import block_of, scan, slots_for
from contrastive_diffusion.sampling import Round, Samples, Watch, check_finite, prepare
from contrastive_diffusion.solvers import Solver, StepMap, ddpm


@dataclass(frozen=True)
class Paradigms:
    """Lock-step Picard iteration. ``window``: steps worked on at once, None is the whole grid; ``max_rows``: rows per denoiser call."""

    solver: Solver
    window: int | None = None
    tolerance: float = 0.1
    max_rows: int = 4096

    def __post_init__(self):
        require(self.window is None or self.window >= 1, f"window = {self.window}", "window >= 1, or None for the whole grid")
        check(self, self.solver, self.tolerance)

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
        require(task.step.memory == 0, f"{self.solver.name}, which remembers outputs", "a one-step solver", "use Parallel")
        steps = len(task.step)
        size = self.window or steps
        check_window(size, steps, "None")
        bound = self.tolerance**2 * _leaving(grid.to(device))
        states = task.start.expand(size + 1, *shape).clone()
        noises, begin, rounds, accepted = task.noise(0, size), 0, 0, [task.start]
        while begin < steps:
            end = begin + len(noises)
            swept = _sweep(task.step, states, noises, begin)
            rounds += 1
            check_finite(swept, begin, rounds, first)
            task.clock.paused(watch, lambda swept=swept, begin=begin, end=end, n=rounds: Round(n, begin, end, swept))
            moved = (swept[1:] - states[1:]).square().flatten(2).mean(2)  # (window, B)
            finished = (moved <= bound[begin + 1 : end + 1, None]).all(1)
            # The first unfinished state is final too: what it was computed from is.
            advance = min(int(finished.long().cumprod(0).sum()) + 1, end - begin)
            if path:
                accepted.extend(swept[1 : advance + 1])
            begin, states = begin + advance, swept[advance:]
            noises, entering = noises[advance:], min(advance, steps - end)
            if entering:
                states = torch.cat([states, states[-1:].expand(entering, *shape)])
                noises = torch.cat([noises, task.noise(end, end + entering)])
        return Samples(states[0].clone(), task.counted.rows, rounds, task.clock.seconds(), torch.stack(accepted) if path else None)


def _leaving(grid: Tensor) -> Tensor:
    """Variance of the DDPM posterior of the step that leaves each state (T + 1,), zero at the end."""
    variance = ddpm("posterior").coefficients(grid[:-1].double(), grid[1:].double())[2].square()
    return torch.cat([variance, variance.new_zeros(1)])


def _sweep(step: StepMap, states: Tensor, noises: Tensor, begin: int) -> Tensor:
    """One round on states (w + 1, B, *S): all steps in one batch, then the sums of their defects from the exact left end."""
    width, batch = noises.shape[:2]
    i = torch.arange(begin, begin + width, device=states.device).repeat_interleave(batch)
    target = step(states[:-1].flatten(0, 1), i, noises.flatten(0, 1)).reshape(states[1:].shape)
    moved = states.new_zeros(slots_for(width + 1), batch, 1, states[0, 0].numel())
    moved[1 : width + 1] = (target - states[1:]).flatten(2).unsqueeze(2)
    keep = moved.new_ones(len(moved), batch, 1)
    keep[0] = 0
    moved = scan(moved, keep, block_of(width + 1))[: width + 1].view_as(states)
    return torch.cat([states[:1], target + moved[:-1]])
