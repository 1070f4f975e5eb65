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

import torch
from torch import Tensor

from contrastive_diffusion.denoisers import Counted, Denoiser, evaluate
from contrastive_diffusion.errors import RunError, require
from contrastive_diffusion.solvers import Solver, StepMap

START = -1  # the step index of the initial state
MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four int64 tensors of 32-bit words -> four of the same shape. Products wrap in int64, as they should."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def normal(seed: int, samples: Tensor, steps: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit Gaussian noise (B, *shape) of sample ids (B,) at step indices (B,), int64; ``START`` is the initial state."""
    numel = math.prod(shape)
    blocks = torch.arange((numel + 3) // 4, device=samples.device)
    c = torch.broadcast_tensors(blocks, (steps[:, None] + 1) & MASK, samples[:, None] & MASK, (samples[:, None] >> 32) & MASK)
    words = philox((c[0], c[1], c[2], c[3]), (seed & MASK, (seed >> 32) & MASK))
    u = [(w.double() + 0.5) * 2.0**-32 for w in words]
    radius = [(-2 * v.log()).sqrt() for v in (u[0], u[2])]
    angle = [2 * math.pi * v for v in (u[1], u[3])]
    values = torch.stack([radius[0] * angle[0].cos(), radius[0] * angle[0].sin(), radius[1] * angle[1].cos(), radius[1] * angle[1].sin()], -1)
    return values.flatten(1)[:, :numel].reshape(-1, *shape).to(dtype)


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


@dataclass(frozen=True)
class Draw:
    """One sampling task with everything checked: the step map, the initial state (B, *S), the noise of any steps, the clock."""

    step: StepMap
    counted: Counted
    start: Tensor
    noise: Callable[[int, int], Tensor]  # steps begin .. end -> (end - begin, B, *S), or (., B, draws, *S) where a step draws more than one
    clock: "Clock"


def prepare(
    solver: Solver, denoiser: Denoiser, grid: Tensor, shape: tuple[int, ...], seed: int, first: int, device: torch.device | str, dtype: torch.dtype, max_rows: int
) -> Draw:  # fmt: skip
    """The common front door of the samplers."""
    batch, item = next(iter(shape), 0), tuple(shape[1:])
    require(item and min(batch, *item) >= 1, f"shape {tuple(shape)}", "(B, *S) with every size >= 1")
    require(seed >= 0 and first >= 0, f"seed {seed}, first {first}", "both >= 0")
    counted = Counted(denoiser)
    ids = torch.arange(first, first + batch, device=device)

    def draw(begin: int, end: int, each: tuple[int, ...]) -> Tensor:
        steps = torch.arange(begin, end, device=device).repeat_interleave(batch)
        return normal(seed, ids.repeat(end - begin), steps, each, dtype).reshape(end - begin, batch, *each)

    step = StepMap(solver, lambda z, logsnr: evaluate(counted, z, logsnr, max_rows), grid, device)
    shape_of_noise = item if solver.draws == 1 else (solver.draws, *item)
    return Draw(step, counted, draw(START, START + 1, item)[0], lambda begin, end: draw(begin, end, shape_of_noise), Clock())


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
        z, steps = task.start, len(task.step)
        states = [z]
        for i, z in enumerate(walk(task.step, task.start, _blocks(task, steps) if self.solver.noisy else lambda _: task.start), 1):
            if path:
                states.append(z)
            task.clock.paused(watch, lambda z=z, i=i: Round(i, i, i, z[None]))
        check_finite(z[None], steps, steps, first)
        rounds = steps * self.solver.evals - (1 if self.solver.evals > 1 and bool(grid[-1].isinf()) else 0)
        return Samples(z, task.counted.rows, rounds, task.clock.seconds(), torch.stack(states) if path else None)


def _blocks(task: Draw, steps: int) -> Callable[[int], Tensor]:
    """The noise of each step, drawn for as many steps at once as fit in a megabyte or so."""
    block = max(1, 2**20 // (task.start.numel() * task.step.solver.draws))
    drawn = task.start[None]

    def noise(i: int) -> Tensor:
        nonlocal drawn
        if i % block == 0:
            drawn = task.noise(i, min(i + block, steps))
        return drawn[i % block]

    return noise
