"""``cdl sample``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from contrastive_diffusion.cli._command import Command, simple
from contrastive_diffusion.errors import require


@dataclass(frozen=True)
class Sample:
    """Draw samples from a trained run or a toy's exact denoiser into a .npy file."""

    source: Annotated[str, "positional"]
    """A run folder, or a toy whose law is a mixture (dino, two-modes, ...)."""
    out: str = "samples.npy"
    """Where to write the array (n, *S)."""
    n: int = 2000
    """Number of samples."""
    solver: str = "ddpm"
    """Step map, with options if wanted: heun, ddim:eta=0.5, edm:churn=40,s_noise=1.007; see cdl list solvers."""
    steps: int | None = None
    """Steps of the grid; 1000 for ddpm and the like, 100 for deterministic and higher-order solvers."""
    evals: int | None = None
    """Denoiser evaluations per sample, instead of --steps: the most steps that they pay for."""
    grid: str | None = None
    """Noise levels: karras, uniform:low=-8,high=10, leading, ... (cdl list grids), or log-SNRs "-8,-2,0,4"; the solver's usual one by default."""
    batch: int = 1000
    """Samples drawn at a time; ctrl-C keeps the batches that are finished."""
    parallel: bool = False
    """Many steps at once instead of one after another; under torchrun, in all processes."""
    slope: str = "secant"
    """Of --parallel: secant (measured), gauss, picard, ... (cdl list slopes)."""
    window: int | None = None
    """Steps of a sample worked on at once by --parallel; 64 by default, or all of a shorter grid."""
    tolerance: float = 0.02
    """Of --parallel; 0 is exactly the sequential sample."""
    seed: int = 0
    """Sample i of a seed is the same whatever n."""
    device: str = "cpu"
    """Where the network runs: cpu, cuda, ..."""
    label: int | None = None
    """Class to draw from, of a network trained on labels."""


def _act_sample(options: Sample) -> None:
    import io

    import numpy as np

    from contrastive_diffusion.files import write_atomic
    from contrastive_diffusion.parallel import Parallel
    from contrastive_diffusion.parallel.processes import first_process, world
    from contrastive_diffusion.runs import named_denoiser
    from contrastive_diffusion.runs.pool import stepping
    from contrastive_diffusion.sampling import Sequential, in_batches
    from contrastive_diffusion.solvers import levels_for
    from contrastive_diffusion.solvers import solver as named_solver

    require(options.n >= 1, f"--n {options.n}", "at least 1")
    solver = named_solver(options.solver)
    levels = levels_for(solver, options.steps, options.evals, options.grid)
    denoiser, shape = named_denoiser(options.source, options.label)
    if hasattr(denoiser, "to"):
        denoiser = denoiser.to(options.device)  # pyright: ignore
    group = world(options.device) if options.parallel else None
    sampler = Parallel(solver, options.slope, options.window, options.tolerance, group=group) if options.parallel else Sequential(solver)
    with stepping("sample", len(levels) - 1, -(-options.n // max(options.batch, 1))) as watch:
        drawn = in_batches(sampler, denoiser, levels, (options.n, *shape), options.seed, batch=options.batch, device=options.device, watch=watch)
    if not first_process(group):
        return
    buffer, n = io.BytesIO(), len(drawn.x)
    np.save(buffer, drawn.x.cpu().numpy())
    write_atomic(Path(options.out), buffer.getvalue())
    print(
        f"{n} samples in {options.out}: {drawn.evals:,} evaluations ({drawn.evals / n:,.0f} a sample), {drawn.rounds} rounds, {drawn.seconds:.2f} s"
    )
    if n < options.n:
        raise KeyboardInterrupt(f"{n} of {options.n} samples were finished and are saved; the same command starts over, cdl generate would continue")


COMMAND = Command("Draw samples, in sequence or in parallel.", simple(Sample, "sample"), _act_sample)
