r"""Parareal in diffusion time (SRDS, Selvam et al. 2024), for comparison: one coarse step per block, then fine steps in all blocks at once.

With blocks n, one big step G and the block's own fine steps F: :math:`U_n^{k+1}=F(U_{n-1}^k)+G(U_{n-1}^{k+1})-G(U_{n-1}^k)`. After k iterations k blocks are
exact. Deterministic solvers only: a big step of a stochastic one draws other noise than its small steps.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import require
from contrastive_diffusion.parallel.checks import check
from contrastive_diffusion.sampling import Samples, Watch, check_finite, prepare
from contrastive_diffusion.solvers import Solver, StepMap


@dataclass(frozen=True)
class Parareal:
    """``blocks``: their number, about sqrt(T) by default. ``tolerance``: stop when no sample moves by more (root mean square); 0 iterates to the end."""

    solver: Solver
    blocks: int | None = None
    tolerance: float = 1e-3
    max_rows: int = 4096

    def __post_init__(self):
        check(self, self.solver, self.tolerance)
        require(not self.solver.noisy, f"{self.solver.name}, which draws noise", "a deterministic solver", "use Parallel")
        require(self.blocks is None or self.blocks >= 1, f"blocks = {self.blocks}", "at least 1")

    @torch.no_grad()
    def __call__(
        self, denoiser: Denoiser, grid: Tensor, shape: tuple[int, ...], seed: int = 0, *, first: int = 0, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32, path: bool = False, watch: Watch | None = None,
    ) -> Samples:  # fmt: skip
        """As ``Sequential``; ``rounds`` counts denoiser calls that had to wait for one another, without pipelining; ``path`` is of the block ends."""
        task = prepare(self.solver, denoiser, grid, shape, seed, first, device, dtype, self.max_rows)
        fine, steps = task.step, len(task.step)
        require(fine.table is not None and fine.memory == 0, f"{self.solver.name}", "a one-step solver that is a table")
        count = min(self.blocks or round(math.sqrt(steps)), steps)
        ends = torch.linspace(0, steps, count + 1).round().long()
        coarse = StepMap(self.solver, fine.denoiser, grid.double()[ends], device)
        # Block ends (count + 1, B, *S) and the coarse step into each.
        jumps = [task.start]
        for n in range(count):
            jumps.append(coarse(jumps[n], n, jumps[n]))
        states, old, rounds = torch.stack(jumps), torch.stack(jumps), count
        for k in range(count):
            landed, calls = _fine(fine, states[k:-1], ends[k:])
            rounds += calls
            new = states.clone()
            new[k + 1] = landed[0]  # exact: its block began exactly
            for n in range(k + 1, count):
                jump = coarse(new[n], n, new[n])
                new[n + 1] = landed[n - k] + (jump - old[n + 1])
                old[n + 1] = jump
            rounds += count - k - 1
            moved = float((new[-1] - states[-1]).square().flatten(1).mean(1).sqrt().max())
            states = new
            check_finite(states, 0, rounds, first)
            if self.tolerance > 0 and moved <= self.tolerance:
                break
        return Samples(states[-1], task.counted.rows, rounds, task.clock.seconds(), states if path else None)


def _fine(step: StepMap, states: Tensor, ends: Tensor) -> tuple[Tensor, int]:
    """All blocks from their left ends ``states`` (n, B, *S) at once, step by step; the right ends and the number of calls."""
    states, length = states.clone(), ends.diff()
    for j in range(int(length.max())):
        on = (j < length).nonzero().squeeze(1)
        i = (ends[on] + j).repeat_interleave(states.shape[1]).to(states.device)
        rows = states[on].flatten(0, 1)
        states[on] = step(rows, i, rows).view(len(on), *states.shape[1:])
    return states, int(length.max())
