"""Counter-based noise and the sequential sampler.

The noise of a sample at a step is a pure function of (seed, sample id, step): Philox 4x32-10 on integers (Salmon et al. 2011), then
Box-Muller. So samples do not depend on batch size, order, window or number of processes, and sequential and parallel sampling draw
the same. What this does not promise: bits of a network that is not itself batch-invariant.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from contrastive_diffusion.denoisers import Counted, Denoiser, evaluate, ranged
from contrastive_diffusion.errors import RunError, require
from contrastive_diffusion.solvers import Adaptive, Solver, StepMap

START = -1  # the step index of the initial state
MASK = 0xFFFFFFFF
CHUNK = 2**16  # blocks of four values made at a time


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four int64 tensors of 32-bit words -> four of the same shape. Products wrap in int64, as they should.

    In place on pairs of words: x holds words 0 and 2, y words 1 and 3, whose upper halves are garbage that the mask takes away later.
    """
    x, y = torch.stack(counter[::2]), torch.stack(counter[1::2])
    factors = torch.tensor([0xD2511F53, 0xCD9E8D57], device=x.device).reshape(2, *[1] * (x.dim() - 1))
    keys = [[(k + i * step) & MASK for i in range(10)] for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
    keys = torch.tensor(keys, device=x.device).reshape(2, 10, *[1] * (x.dim() - 1))
    product = torch.empty_like(x)
    for i in range(10):
        torch.mul(x, factors, out=product)
        y.bitwise_xor_(keys[:, i])
        torch.bitwise_right_shift(product[1], 32, out=x[0])
        torch.bitwise_right_shift(product[0], 32, out=x[1])
        x.bitwise_xor_(y).bitwise_and_(MASK)
        y[0], y[1] = product[1], product[0]
    y.bitwise_and_(MASK)
    return x[0], y[0], x[1], y[1]


def normal(seed: int, samples: Tensor, steps: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit Gaussian noise (B, *shape) of sample ids (B,) at step indices (B,), int64; ``START`` is the initial state.

    From 32 random bits a value: in float64 for float64, in float32 otherwise, which rounds differently in the last digits.
    """
    numel = math.prod(shape)
    blocks = torch.arange((numel + 3) // 4, device=samples.device)
    rows = max(1, CHUNK // len(blocks))  # at a time, so that temporaries stay in the cache
    parts = [_normal(seed, ids, at, blocks, dtype) for ids, at in zip(samples.split(rows), steps.split(rows), strict=True)]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole[:, :numel].reshape(-1, *shape)


def _normal(seed: int, samples: Tensor, steps: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Four values for each of the ``blocks`` (n,) of each sample: (B, 4 n)."""
    c = torch.broadcast_tensors(blocks, (steps[:, None] + 1) & MASK, samples[:, None] & MASK, (samples[:, None] >> 32) & MASK)
    words = philox((c[0], c[1], c[2], c[3]), (seed & MASK, (seed >> 32) & MASK))
    wide = dtype if dtype == torch.float64 else torch.float32
    u = [w.to(wide).add_(0.5).mul_(2.0**-32) for w in words]
    out = torch.empty(*u[0].shape, 4, dtype=dtype, device=u[0].device)
    for k in (0, 1):
        radius, angle = u[2 * k].log_().mul_(-2).clamp_(min=0).sqrt_(), u[2 * k + 1].mul_(2 * math.pi)
        out[..., 2 * k] = angle.cos().mul_(radius)
        out[..., 2 * k + 1] = angle.sin_().mul_(radius)
    return out.flatten(1)


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


@dataclass(frozen=True)
class Draw:
    """One sampling task with everything checked: the step map, the initial state (B, *S), the noise of any steps, the clock."""

    step: StepMap
    counted: Counted
    start: Tensor
    noise: Callable[[int, int], Tensor]  # steps begin .. end -> (end - begin, B, *S), or (., B, draws, *S) where a step draws more than one
    clock: "Clock"
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


def check_finite(states: Tensor, begin: int, round_number: int, first: int) -> None:
    """Stops at the first NaN or infinity of states (n, B, *S), naming sample, step and round."""
    finite = states.flatten(2).isfinite().all(2)
    if not bool(finite.all()):
        step, sample = (~finite).nonzero()[0].tolist()
        raise RunError(
            f"given a non-finite state of sample {first + sample} at step {begin + step}, round {round_number}, expected finite numbers; check the denoiser"
        )


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


class Drawn(Protocol):
    """What every sampler returns: the fields of ``Samples``, with others if it has more to say."""

    @property
    def x(self) -> Tensor: ...
    @property
    def evals(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def seconds(self) -> float: ...


class Sampler(Protocol):
    """``Sequential``, ``Parallel`` and their like."""

    def __call__(
        self, denoiser: Denoiser, grid: Tensor, shape: tuple[int, ...], seed: int = 0, /, *, first: int = 0, device: torch.device | str = "cpu", watch: Watch | None = None
    ) -> Drawn: ...  # fmt: skip


def in_batches(
    sampler: Sampler,
    denoiser: Denoiser,
    grid: Tensor,
    shape: tuple[int, ...],
    seed: int = 0,
    *,
    batch: int = 1000,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
) -> Samples:
    """``shape[0]`` samples, at most ``batch`` at a time: the same ones as all at once. Ctrl-C gives back the batches that are finished, if any:
    then x has fewer rows than were asked for."""
    require(batch >= 1, f"batch = {batch}", "batch >= 1")
    require(shape and shape[0] >= 1, f"shape {tuple(shape)}", "(B, *S) with every size >= 1")
    done: list[Drawn] = []
    try:
        for first in range(0, shape[0], batch):
            size = min(batch, shape[0] - first)
            done.append(sampler(denoiser, grid, (size, *shape[1:]), seed, first=first, device=device, watch=watch))
    except KeyboardInterrupt:
        if not done:
            raise
    return Samples(torch.cat([d.x for d in done]), sum(d.evals for d in done), sum(d.rounds for d in done), sum(d.seconds for d in done))
