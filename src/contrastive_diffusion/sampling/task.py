"""One sampling task: what every sampler checks, draws, counts and times before it takes a step."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.denoisers import Counted, Denoiser, evaluate, ranged
from contrastive_diffusion.errors import RunError, require
from contrastive_diffusion.sampling.noise import START, normal
from contrastive_diffusion.solvers import Solver, StepMap


@dataclass(frozen=True)
class Samples:
    """x (B, *S); ``evals``: (row, level) evaluations of the denoiser in all; ``rounds``: batched calls that had to wait for one another;
    ``seconds``: of the sampler alone, without ``watch``; ``path`` (T + 1, B, *S) if it was asked for."""

    x: Tensor
    evals: int
    rounds: int
    seconds: float
    path: Tensor | None = None


@dataclass(frozen=True)
class Round:
    """What ``watch`` sees after each round: its ``number`` (from 1) and the ``states`` (., B, *S) of grid points ``begin`` .. ``end``."""

    number: int
    begin: int
    end: int
    states: Tensor


Watch = Callable[[Round], object]


class Reader:
    """A denoiser as a step map reads it: checked, in calls of at most ``max_rows``, and counted. ``reads``: batches that had to wait for one another."""

    def __init__(self, denoiser: Denoiser, max_rows: int):
        self.counted, self.max_rows, self.reads = Counted(denoiser), max_rows, 0

    def __call__(self, z: Tensor, logsnr: Tensor) -> Tensor:
        return self.read(self.counted, z, logsnr)

    def read(self, counted: Counted, z: Tensor, logsnr: Tensor) -> Tensor:
        self.reads += 1
        return evaluate(counted, z, logsnr, self.max_rows)

    def take(self, index: Tensor) -> "_Part":
        """The same for some rows."""
        return _Part(self, self.counted.take(index))

    def ranged(self, z: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        self.reads += 1
        rows = torch.arange(len(z), device=z.device).split(self.max_rows)
        parts = [ranged(self.counted.take(index) if len(rows) > 1 else self.counted, z[index], logsnr[index]) for index in rows]
        return torch.cat([eps_hat for eps_hat, _ in parts]), torch.cat([v for _, v in parts])


@dataclass(frozen=True)
class _Part:
    """A reader of some of the rows, counted with the others."""

    reader: Reader
    counted: Counted

    def __call__(self, z: Tensor, logsnr: Tensor) -> Tensor:
        return self.reader.read(self.counted, z, logsnr)

    def take(self, index: Tensor) -> "_Part":
        return _Part(self.reader, self.counted.take(index))


class Clock:
    """Seconds that passed outside ``paused`` calls."""

    def __init__(self):
        self.start, self.idle = time.perf_counter(), 0.0

    def paused(self, watch: Watch | None, seen: Callable[[], Round]) -> None:
        if watch is not None:
            before = time.perf_counter()
            watch(seen())
            self.idle += time.perf_counter() - before

    def seconds(self) -> float:
        return time.perf_counter() - self.start - self.idle


@dataclass(frozen=True)
class Draw:
    """One sampling task with everything checked: the step map, the initial state (B, *S), the noise of any steps, the clock."""

    step: StepMap
    counted: Counted
    start: Tensor
    noise: Callable[[int, int], Tensor]  # steps begin .. end -> (end - begin, B, *S), or (., B, draws, *S) where a step draws more than one
    clock: Clock
    reader: Reader
    rows: Callable[[Tensor, int], Tensor]  # rows (n,) of the batch, a step -> their noise at it (n, *S)
    levels: Tensor  # (B,) where an adaptive solver has each row


def prepare(
    solver: Solver, denoiser: Denoiser, grid: Tensor, shape: tuple[int, ...], seed: int, first: int, device: torch.device | str, dtype: torch.dtype, max_rows: int
) -> Draw:  # fmt: skip
    """The common front door of the samplers."""
    batch, item = next(iter(shape), 0), tuple(shape[1:])
    require(item and min(batch, *item) >= 1, f"shape {tuple(shape)}", "(B, *S) with every size >= 1")
    require(seed >= 0 and first >= 0, f"seed {seed}, first {first}", "both >= 0")
    check_levels(solver, denoiser, grid)
    reader, ids = Reader(denoiser, max_rows), torch.arange(first, first + batch, device=device)
    each = item if solver.draws == 1 else (solver.draws, *item)

    def noise(begin: int, end: int) -> Tensor:
        steps = torch.arange(begin, end, device=device).repeat_interleave(batch)
        return normal(seed, ids.repeat(end - begin), steps, each, dtype).reshape(end - begin, batch, *each)

    def of_rows(rows: Tensor, step: int) -> Tensor:
        return normal(seed, ids[rows], torch.full_like(rows, step), item, dtype)

    start = of_rows(torch.arange(batch, device=device), START)
    levels = torch.full((batch,), float(grid[0]), dtype=torch.float64, device=device)
    return Draw(StepMap(solver, reader, grid, device), reader.counted, start, noise, Clock(), reader, of_rows, levels)


def check_levels(solver: Solver, denoiser: Denoiser, grid: Tensor) -> None:
    """A denoiser that knows only some ``levels`` (a timestep network without interpolation) is read at these only."""
    levels = getattr(denoiser, "levels", None)
    if levels is None:
        return
    known, wanted = levels.double().cpu().sort().values, grid[grid.isfinite()].double().cpu()
    near = known[torch.searchsorted(known, wanted).clamp(max=len(known) - 1)], known[(torch.searchsorted(known, wanted) - 1).clamp(min=0)]
    off = torch.minimum(*((wanted - v).abs() for v in near)) > 1e-6
    todo = "use from_timesteps(..., rounded=False), or a grid of its timesteps (leading, trailing, linspace)"
    require(
        not bool(off.any()),
        f"a timestep network without interpolation and log-SNR {float(wanted[off][:1].sum()):.4f} between its timesteps",
        "a level of its table",
        todo,
    )
    require(
        not getattr(solver, "between", False),
        f"{solver.name} and a timestep network without interpolation",
        "a solver that reads the grid's levels only",
        todo,
    )


def check_finite(states: Tensor, begin: int, round_number: int, first: int) -> None:
    """Stops at the first NaN or infinity of states (n, B, *S), naming sample, step and round."""
    finite = states.flatten(2).isfinite().all(2)
    if not bool(finite.all()):
        step, sample = (~finite).nonzero()[0].tolist()
        raise RunError(
            f"given a non-finite state of sample {first + sample} at step {begin + step}, round {round_number}, expected finite numbers; check the denoiser"
        )
