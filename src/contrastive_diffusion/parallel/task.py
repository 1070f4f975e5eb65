"""One call of the sampler: lanes, rounds, and what is learned after each of them."""

import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import RunError, choose, require
from contrastive_diffusion.parallel import cost
from contrastive_diffusion.parallel.anderson import Anderson
from contrastive_diffusion.parallel.checks import check_window
from contrastive_diffusion.parallel.control import EXACT_PATIENCE, PATIENCE, Lagged, Lanes
from contrastive_diffusion.parallel.noise import Noise
from contrastive_diffusion.parallel.processes import Evaluator, agreed, same_task
from contrastive_diffusion.parallel.ring import Ring
from contrastive_diffusion.parallel.slopes import SLOPES, tables
from contrastive_diffusion.parallel.sweep import FAR, Rule, correct, read
from contrastive_diffusion.parallel.trace import Trace
from contrastive_diffusion.sampling import START, Clock, Round, Watch, check_levels, normal
from contrastive_diffusion.solvers import StepMap

if TYPE_CHECKING:
    from contrastive_diffusion.parallel.sampler import Guess, Parallel

KAPPA = 4.0  # roundings that a state may differ by and still stand still
DEFAULT_WINDOW = 64
LAG = {"cpu": 0}  # rounds by which the host knows the frontiers late; 1 on devices that it must not wait for


class Task:
    """One call of the sampler."""

    def __init__(
        self, options: "Parallel", denoiser: Denoiser, grid: Tensor, shape: tuple[int, ...], seed: int, first: int, device: Any, dtype: torch.dtype,
        path: bool, guess: "Guess",
    ):  # fmt: skip
        count, item = next(iter(shape), 0), tuple(shape[1:])
        require(item and min(count, *item) >= 1, f"shape {tuple(shape)}", "(B, *S) with every size >= 1")
        require(seed >= 0 and first >= 0, f"seed {seed}, first {first}", "both >= 0")
        require(dtype in (torch.float32, torch.float64), f"states in {dtype}", "float32 or float64", "precision=... is the denoiser's dtype")
        check_levels(options.solver, denoiser, grid)
        self.options, self.count, self.item, self.seed, self.first, self.dtype, self.device = (
            options,
            count,
            item,
            seed,
            first,
            dtype,
            torch.device(device),
        )
        self.evaluator = Evaluator(denoiser, options.max_rows, 0, options.precision, options.group)
        self.step = StepMap(options.solver, self.evaluator, grid, device)
        self.tables, self.slope, self.clock, self.notes, self.rounds = tables(self.step), SLOPES[options.slope], Clock(), [], 0
        steps = len(self.step)
        if isinstance(options.window, int):
            check_window(options.window, steps, "'all'")
        same_task(options.group, {"solver": options.solver.name, "grid": grid.tolist(), "shape": tuple(shape), "seed": seed, "first": first, "dtype": dtype,
                                  "options": (options.slope, options.window, options.tolerance, options.per_channel, options.anderson, options.lanes, options.precision)})  # fmt: skip
        lanes = min(options.lanes or count, count)
        self.window, self.gain = self._window(lanes, steps)
        self.evaluator.fixed = min(options.max_rows, -(-lanes * self.window // self.evaluator.size)) if options.static_rows else 0
        groups = item[0] if options.per_channel and len(item) > 1 else 1
        self.lag = LAG.get(self.device.type, 1)
        self.ring = Ring(self.tables, lanes, self.window, self.step.memory, item, groups, dtype, device)
        noisy = self.step.solver.noisy
        self.noise = Noise(self.ring, seed, self.step.solver.draws, (1 + self.lag) * self.window) if noisy else None
        patience = PATIENCE if options.tolerance else EXACT_PATIENCE
        self.host, self.lagged = Lanes.make(lanes, steps, self.window, options.fallback, self.slope.measured, patience), Lagged(self.lag)
        self.rule = self._rule()
        self.anderson = Anderson(self.ring, options.anderson) if options.anderson else None
        self.given = guess if isinstance(guess, Tensor) else None
        self.guess = choose(guess, ("gauss", "constant"), "guess") if not isinstance(guess, Tensor) else "gauss"
        if self.given is not None:
            require(self.given.shape == (steps + 1, *shape), f"a trajectory of shape {tuple(self.given.shape)}", f"{(steps + 1, *shape)}")
        self.x = torch.zeros(count, *item, dtype=dtype, device=device)
        self.path = torch.zeros((steps + 1) * count + 1, *self.ring.shape[2:], dtype=dtype, device=device) if path else None
        self.sample_evals, self.sample_rounds = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        self.waiting, self._pairs = 0, None
        self._asked: list[tuple[np.ndarray, np.ndarray]] = []
        self._load(np.arange(lanes))
        self._enter(self.window)

    def _window(self, lanes: int, steps: int) -> tuple[int, float | None]:
        window = self.options.window
        if window != "auto":
            return min(DEFAULT_WINDOW, steps) if window is None else steps if window == "all" else window, None
        plan = agreed(self.options.group, cost.plan(self.evaluator, self.item, lanes, steps, self.step.logsnr, self.dtype, self.device))
        self.notes.append(plan.words)
        if plan.gain <= 1:
            warnings.warn(plan.words, stacklevel=5)
        return plan.window, plan.gain

    def _rule(self) -> Rule:
        variance, exact = self.tables.variance, self.options.tolerance == 0
        bound = self.options.tolerance**2 * variance
        rounding = (KAPPA * torch.finfo(self.dtype).eps) ** 2
        if exact:
            return Rule(torch.zeros_like(bound), torch.full_like(bound, rounding**0.5), 0.0, True)
        if self.options.precision is not None:
            bound = bound.maximum((KAPPA * self.tables.b.abs() * torch.finfo(self.options.precision).eps).square())
        # The state's own rounding matters only where the bound is that fine.
        floor = rounding if float(bound.min()) < 1e4 * rounding else 0.0
        return Rule(bound, bound.clamp(min=rounding), floor, False)

    def _load(self, lanes: np.ndarray) -> None:
        """The next waiting samples into these lanes."""
        lanes = lanes[: self.count - self.waiting]
        if not len(lanes):
            return
        ids = np.arange(self.waiting, self.waiting + len(lanes))
        self.waiting += len(lanes)
        self.host.load(lanes, ids)
        at, samples = torch.from_numpy(lanes).to(self.device), torch.from_numpy(ids + self.first).to(self.device)
        start = normal(self.seed, samples, torch.full_like(samples, START), self.item, self.dtype)
        self.ring.load(at, start)
        self.fresh = torch.zeros(self.ring.lanes, dtype=torch.bool, device=self.device)
        self.fresh[at] = True
        if self.noise is not None:
            self.noise.reset(lanes)
        if self.path is not None:
            self.path[torch.from_numpy(ids).to(self.device)] = start.view(len(ids), *self.path.shape[1:])
        self.sample = torch.from_numpy(self.host.ids.copy()).to(self.device)
        self._pairs = None

    def _enter(self, most: int) -> None:
        if self.noise is not None:
            self.noise.fill(self.host.known, self.host.ids + self.first, self.host.active)
        drawn = None
        if self.noise is not None and self.step.table is not None:
            noise = self.noise
            drawn = lambda at, step: noise.rows(at.clamp(min=0, max=self.ring.steps - 1)).view(*step.shape, *self.ring.shape[2:])  # noqa: E731
        given = None if self.given is None else self.given.to(self.device)[:, self.sample.clamp(min=0)]
        self.ring.enter(most, drawn, self.fresh, self.guess, given)
        self.fresh = torch.zeros_like(self.fresh)

    def _rows(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """Which steps to evaluate: offsets j from the frontier and lanes, (R,), and their number per lane."""
        rows = self.host.rows()
        if self._pairs is None or not np.array_equal(self._pairs[2], rows):
            j, lane = np.nonzero(np.arange(self.window)[:, None] < rows)
            packed = torch.from_numpy(np.stack([j, lane])).to(self.device, non_blocking=True)
            self._pairs = packed[0], packed[1], rows
        return self._pairs

    def round(self, watch: Watch | None, trace: Trace | None) -> bool:
        """One round; False when all samples are done."""
        j, lane, rows = self._rows()
        if not len(j):
            return self._settle()
        self.rounds += 1
        ids = self.host.ids[rows > 0]
        self.sample_evals[ids] += rows[rows > 0] * self.options.solver.evals
        self.sample_rounds[ids] += 1
        if self.evaluator.bound:
            self.evaluator.index = self.sample[lane]
        read(self.ring, self.step, self.noise, j, lane)
        measured = torch.from_numpy(self.host.measured.copy()).to(self.device, non_blocking=True)
        outcome = correct(self.ring, self.step, self.noise, self.slope, measured, self.rule)
        if self.anderson is not None:
            self.anderson.apply(self.ring, outcome)
        self._keep(j, lane)
        if trace is not None:
            before = time.perf_counter()
            trace.record(self.rounds, self.ring, outcome, self.host.ids, self.first)
            self.clock.idle += time.perf_counter() - before
        self.ring.swap()
        self.ring.base.copy_(outcome.base)
        self.lagged.push(outcome.packed())
        self._asked.append((rows, self.host.ids.copy()))
        self._listen()
        if watch is not None:
            self.clock.paused(watch, self._seen)
        return True

    def _listen(self, wait: bool = False) -> None:
        """What the host learns, maybe one round late, and does about it."""
        known = self.lagged.pop(wait)
        if known is not None:
            rows, ids = self._asked.pop(0)
            ours = (ids >= 0) & (ids == self.host.ids)  # not of lanes that have a new sample since
            self._check(np.where(ours, known[2], FAR))
            self.host.saw(np.where(ours, known[0], self.host.known).astype(np.int64), np.where(ours, known[1], np.inf), np.where(ours, rows, 0))
            self.ring.width.copy_(torch.from_numpy(self.host.width.copy()), non_blocking=True)
        done = (self.host.ids >= 0) & (self.host.known >= self.host.steps)
        if done.any():
            self._finish(np.flatnonzero(done))
        self._enter(self.window if self.lag or done.any() else self._entering())

    def _entering(self) -> int:
        end = np.minimum(self.host.known + self.host.width, self.host.steps)
        before = self.ring.end.numpy()
        return max(1, int((end - before).max(initial=0)))

    def _finish(self, lanes: np.ndarray) -> None:
        at = torch.from_numpy(lanes).to(self.device)
        ids = torch.from_numpy(self.host.ids[lanes]).to(self.device)
        last = self.ring.row(torch.full_like(at, self.host.steps), at)
        self.x[ids] = self.ring._x[last].view(len(lanes), *self.item)
        self.host.ids[lanes] = -1
        self._load(lanes)

    def _settle(self) -> bool:
        """Rounds that the host has not heard of yet; True if there is more to do."""
        if not self._asked:
            return False
        self._listen(wait=True)
        return True

    def _check(self, broken: np.ndarray) -> None:
        bad = np.flatnonzero((broken < FAR) & (self.host.ids >= 0))
        if len(bad):
            sample, step = self.first + int(self.host.ids[bad[0]]), int(broken[bad[0]])
            raise RunError(
                f"given a non-finite state of sample {sample} at step {step}, round {self.rounds - self.lag}, expected finite numbers; check the denoiser"
            )

    def _keep(self, j: Tensor, lane: Tensor) -> None:
        """The round's states into the path; those that are accepted are not written again."""
        if self.path is None:
            return
        state = self.ring.base[lane] + j + 1
        inside = state <= self.ring.base[lane] + self.ring.steps_left()[lane]
        rows = torch.where(inside, state * self.count + self.sample[lane], len(self.path) - 1)
        self.path[rows] = self.ring._x_old[self.ring.row(state, lane)]

    def _seen(self) -> Round:
        base, end = self.ring.base, self.ring.end
        begin, last = int(base.min()), int(end.max())
        state = torch.arange(begin, last + 1, device=self.device)[:, None]
        rows = self.ring.row(torch.minimum(torch.maximum(state, base), end))
        return Round(self.rounds, begin, last, self.ring._x[rows].view(last + 1 - begin, self.ring.lanes, *self.item))

    def verify(self) -> Tensor:
        """The largest defect of a step of each accepted path, root mean square, in units of the std of its DDPM posterior, (B,)."""
        assert self.path is not None
        states, self.evaluator.index = self.states(), torch.arange(self.count, device=self.device)
        ids, worst, recent = torch.arange(self.first, self.first + self.count, device=self.device), torch.zeros(self.count, device=self.device), []
        for i in range(len(self.step)):
            noise, z = states[i], states[i]
            if self.noise is not None:
                noise = normal(self.seed, ids, torch.full_like(ids, i), self.noise.item, self.dtype)
            if self.step.table is None:
                target = self.step(z, i, noise)
            else:
                recent = [self.step.read(z, i), *recent[: self.step.memory]]
                target = self.step.combine(z, i, recent, noise)
            defect = (target - states[i + 1]).square().flatten(1).mean(1).sqrt()
            worst = torch.maximum(worst, (defect.double() / self.tables.variance[i].sqrt()).to(worst.dtype))
        return worst

    def states(self) -> Tensor:
        """The accepted path (T + 1, B, *S)."""
        assert self.path is not None
        return self.path[:-1].view(len(self.step) + 1, self.count, *self.item)
