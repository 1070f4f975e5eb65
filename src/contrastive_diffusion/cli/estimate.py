"""``cdl estimate``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from contrastive_diffusion.cli._command import Command, simple
from contrastive_diffusion.errors import require


@dataclass(frozen=True)
class EstimateCommand:
    """Estimate log-likelihood ratios, negative log-likelihoods or noise levels of points, each with its error."""

    what: Annotated[Literal["llr", "nll", "noise"], "positional"]
    """llr: log p_zeta(x) - log p(x); nll: -log p(x); noise: how noisy is x."""
    source: Annotated[str, "positional"]
    """A run folder, or a toy whose law is a mixture."""
    x: str | None = None
    """A .npy or .csv file of points (N, D), an image, or a folder or archive of images; draws of the source's data by default."""
    n: int = 8
    """Number of points to draw, or to read at most."""
    zeta: float = 6.0
    """Log-SNR of the noised law (llr)."""
    corrupt: float | None = None
    """Noise the points to this log-SNR first."""
    logsnrs: tuple[float, ...] = tuple(range(-6, 13))
    """Candidate levels, rising (noise)."""
    mass: float = 0.9
    """Of the credible interval (noise)."""
    likelihood: Literal["continuous", "dequantised", "discrete"] = "continuous"
    """Of x itself, or of x on its 8-bit grid, as an upper bound: with uniform noise, or by rounding (nll of images)."""
    check: bool = False
    """First check that the denoiser keeps its contract (shape, finite, rows independent)."""
    evals: int = 512
    """Denoiser evaluations per point."""
    seed: int = 0
    """Of points and estimates."""
    out: str | None = None
    """Also write the numbers to this JSON file."""


def _act_estimate(options: EstimateCommand) -> None:
    import json

    from contrastive_diffusion.files import write_atomic
    from contrastive_diffusion.runs.estimate import estimate

    require(options.n >= 1, f"--n {options.n}", "at least 1")
    names, rows, header, more = estimate(options)
    width = max(16, *(len(name) for name in names))
    print("  ".join([f"{'x':>{width}}", *(f"{name:>16}" for name in header)]))
    for name, row in zip(names, rows, strict=True):
        print("  ".join([f"{name:>{width}}", *(f"{v:>16.4f}" for v in row)]))
    if options.out:
        named = [dict(zip(header, row, strict=True)) | {"x": name} | extra for name, row, extra in zip(names, rows, more, strict=True)]
        write_atomic(Path(options.out), json.dumps({"what": options.what, "source": options.source, "evals": options.evals, "rows": named}, indent=1))


COMMAND = Command("Estimate likelihood ratios, likelihoods or noise levels.", simple(EstimateCommand, "estimate"), _act_estimate)
