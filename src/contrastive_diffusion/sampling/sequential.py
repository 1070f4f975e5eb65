"""Step after step: the sequential sampler, whole or state by state."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.sampling.task import Draw, Round, Samples, Watch, check_finite, prepare
from contrastive_diffusion.solvers import Adaptive, Solver, StepMap


def walk(step: StepMap, z: Tensor, noise: Callable[[int], Tensor]) -> Iterator[Tensor]:
    """The states after each step from z (B, *S), one by one; ``noise(i)`` is what step i draws."""
    recent: deque[Tensor] = deque(maxlen=step.memory)
    for i in range(len(step)):
        if step.table is None:
            z = step(z, i, noise(i))
        else:
            output = step.read(z, i)
            z = step.combine(z, i, (output, *recent), noise(i))
            recent.appendleft(output)
        yield z


@dataclass(frozen=True)
class State:
    """What ``Sequential.iterate`` yields: z (B, *S) after ``number`` steps (attempts, of an adaptive solver), at ``logsnr`` (B,) nats;
    ``progress`` in (0, 1], of the way."""

    number: int
    progress: float
    z: Tensor
    logsnr: Tensor


@dataclass(frozen=True)
class Sequential:
    """Step after step. ``max_rows``: rows per denoiser call."""

    solver: Solver
    max_rows: int = 4096

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
        """Samples ``first`` .. ``first`` + B - 1 of ``seed``, on an increasing ``grid`` of log-SNRs (T + 1,), usually ending in +inf."""
        task = prepare(self.solver, denoiser, grid, shape, seed, first, device, dtype, self.max_rows)
        states, last = [task.start], task.start
        for number, last in enumerate(_states(task), 1):
            if path:
                states.append(last)
            if watch is not None:
                task.clock.paused(watch, lambda z=last, number=number: Round(number, number, number, z[None]))
        check_finite(last[None], len(task.step), len(task.step), first)
        return Samples(last, task.counted.rows, task.reader.reads, task.clock.seconds(), torch.stack(states) if path else None)

    def iterate(
        self,
        denoiser: Denoiser,
        grid: Tensor,
        shape: tuple[int, ...],
        seed: int = 0,
        *,
        first: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[State]:
        """The same walk, state by state, for previews and for stopping early; the last state is the sample. Arguments are checked at once."""
        return _described(prepare(self.solver, denoiser, grid, shape, seed, first, device, dtype, self.max_rows))


def _described(task: Draw) -> Iterator[State]:
    """The walk with where it is, without gradients, but only while a step is made: a generator must not leak its mode to the loop around it."""
    walked, step, number = _states(task), task.step, 0
    adaptive = isinstance(step.solver, Adaptive)
    while True:
        with torch.no_grad():
            z = next(walked, None)
        if z is None:
            return
        number += 1
        logsnr = task.levels.clone() if adaptive else step.logsnr_next[number - 1].expand(len(z))
        yield State(number, _progress(step.grid, logsnr) if adaptive else number / len(step), z, logsnr)


def _progress(grid: Tensor, logsnr: Tensor) -> float:
    """The share of the way that the last of the samples has gone; 1 only at the end of the grid."""
    finite = grid[grid.isfinite()]
    share = float(((logsnr.min() - finite[0]) / (finite[-1] - finite[0])).clamp(max=1))
    return share if float(logsnr.min()) >= float(grid[-1]) else min(share, 0.999)


def _states(task: Draw) -> Iterator[Tensor]:
    """The walk of a task; an adaptive solver has one of its own."""
    if isinstance(task.step.solver, Adaptive):
        return _adapted(task, task.step.solver)
    return walk(task.step, task.start, _blocks(task) if task.step.solver.noisy else lambda _: task.start)


def _adapted(task: Draw, solver: Adaptive) -> Iterator[Tensor]:
    """Attempts of an adaptive solver, then the step to +inf if the grid has one; ``task.levels`` follows."""
    grid, z = task.step.grid, task.start
    finite = grid[grid.isfinite()]
    for z, logsnr in solver.solve(task.reader, task.start, grid, task.rows):
        task.levels.copy_(logsnr)
        yield z.clone()
    if len(finite) < len(grid):
        task.levels.fill_(math.inf)
        yield solver.step(task.reader, z, finite[-1].expand(len(z)), task.levels, z)


def _blocks(task: Draw) -> Callable[[int], Tensor]:
    """The noise of each step, drawn for as many steps at once as fit in a megabyte or so."""
    block = max(1, 2**20 // (task.start.numel() * task.step.solver.draws))
    drawn = task.start[None]

    def noise(i: int) -> Tensor:
        nonlocal drawn
        if i % block == 0:
            drawn = task.noise(i, min(i + block, len(task.step)))
        return drawn[i % block]

    return noise
