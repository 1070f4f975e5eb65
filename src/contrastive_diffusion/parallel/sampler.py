"""``Parallel``: the sampler."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import choose, require
from contrastive_diffusion.parallel.checks import check
from contrastive_diffusion.parallel.slopes import SLOPES
from contrastive_diffusion.parallel.task import Task
from contrastive_diffusion.parallel.trace import Trace
from contrastive_diffusion.sampling import Watch
from contrastive_diffusion.solvers import Solver

Guess = Literal["gauss", "constant"] | Tensor


@dataclass(frozen=True)
class ParallelSamples:
    """x (B, *S); ``evals``, ``rounds``, ``seconds``, ``path`` as in ``Samples``.

    ``sample_evals``, ``sample_rounds`` (B,): of each sample while it was in flight (of solvers with several
    evaluations a step: with all of them at every step). ``defect`` (B,), with ``verify``: the largest root mean
    square defect of a step of the accepted path, in units of the DDPM posterior's std of that step. ``notes``: what was decided on the
    way, one line each. ``gain``: predicted latency of the sequential sampler over this one's, with ``window="auto"``.
    """

    x: Tensor
    evals: int
    rounds: int
    seconds: float
    path: Tensor | None
    sample_evals: Tensor
    sample_rounds: Tensor
    window: int
    defect: Tensor | None = None
    gain: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parallel:
    r"""All steps of a window at once, corrected round by round; every sample moves on at its own pace.

    Args:
        solver: any that a step of depends on known steps only.
        slope: one of ``SLOPES``; "secant" is measured and free.
        window: steps of a sample worked on at once, by default 64 or all of a shorter grid; "all" is the whole grid; "auto" times the denoiser and takes the window with the largest
            predicted gain (so the result may differ between machines, within the tolerance).
        tolerance: a state is accepted when the error that the defects of the steps before it add up to, root mean square, is at most
            ``tolerance`` standard deviations of the DDPM posterior of the step that leads to it, or what rounding makes of it. 0: not a bit may
            differ from the sequential sampler. It bounds each acceptance, not the final error; ``verify`` measures the accepted path.
        per_channel: a measured slope for every channel (first axis of an item).
        anderson: earlier rounds that triangular Anderson acceleration uses; 0 is none.
        lanes: samples in flight; the others wait for a lane to become free. None is all of them.
        max_rows: rows per denoiser call. static_rows: pad every call to the same number of rows (compiled or captured networks).
        precision: dtype in which the denoiser is called (and its rounding tolerated); that of the state by default.
        group: torch.distributed processes that share the rows of each round.
        fallback: give up the measured slope, then the window, of samples that do not get anywhere.
    """

    solver: Solver
    slope: str = "secant"
    window: int | Literal["all", "auto"] | None = None
    tolerance: float = 0.02
    per_channel: bool = False
    anderson: int = 0
    lanes: int | None = None
    max_rows: int = 4096
    static_rows: bool = False
    precision: torch.dtype | None = None
    group: Any = None
    fallback: bool = True

    def __post_init__(self):
        choose(self.slope, SLOPES, "slope")
        named = self.window in (None, "all", "auto")
        require(named or (isinstance(self.window, int) and self.window >= 1), f"window = {self.window!r}", "window >= 1, 'all', 'auto' or None")
        require(0 <= self.anderson <= 8, f"anderson = {self.anderson}", "0 to 8 earlier rounds")
        require(self.lanes is None or self.lanes >= 1, f"lanes = {self.lanes}", "lanes >= 1, or None for all samples")
        require(self.max_rows >= 1, f"max_rows = {self.max_rows}", "at least 1")
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
        guess: Guess = "gauss",
        verify: bool = False,
        trace: Trace | None = None,
    ) -> ParallelSamples:
        """As ``Sequential``: the same arguments and noise; the state is float32 or float64 whatever the denoiser's dtype.

        Args:
            guess: where the first window starts: the path of standard normal data, a constant one, or a trajectory (T + 1, B, *S) to start from.
            verify: evaluate the accepted path once more and report its largest defect (keeps the path in memory).
            watch: is shown each round's states of grid points ``begin`` to ``end``; outside a sample's window they are its nearest ones.
            trace: records windows, errors and slopes of chosen samples.
        """
        task = Task(self, denoiser, grid, shape, seed, first, device, dtype, path or verify, guess)
        while task.round(watch, trace):
            pass
        task.evaluator.finish()
        seconds, evals, reads = task.clock.seconds(), task.evaluator.rows, task.evaluator.reads
        defect = task.verify() if verify else None
        sample_evals, sample_rounds = torch.from_numpy(task.sample_evals), torch.from_numpy(task.sample_rounds)
        kept = task.states() if path else None
        return ParallelSamples(task.x, evals, reads, seconds, kept, sample_evals, sample_rounds, task.window, defect, task.gain, tuple(task.notes))
