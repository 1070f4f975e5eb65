"""``cdl compare``."""

from dataclasses import dataclass
from typing import Annotated, Literal

from contrastive_diffusion.cli._command import Command, simple
from contrastive_diffusion.cli.evaluate import show


@dataclass(frozen=True)
class Compare:
    """Compare two generated sets, or two checkpoints (samples of both are generated with the same seeds), sample by sample id."""

    a: Annotated[str, "positional"]
    """A generated set, or a run or model folder."""
    b: Annotated[str, "positional"]
    """The other."""
    data: str
    """The reference, as of cdl evaluate."""
    extractor: str = "pixels"
    """Features, as of cdl evaluate."""
    metrics: tuple[str, ...] = ()
    """As of cdl evaluate."""
    n: int | None = None
    """Samples of each; all of a set, 5000 of a checkpoint."""
    reference_n: int | None = None
    """Samples of the reference; all by default."""
    blocks: int = 20
    """Blocks of sample ids that are left out in turn for the intervals."""
    neighbours: int = 5
    """k of precision, recall, density and coverage."""
    paired: Literal["auto", "yes", "no"] = "auto"
    """Whether sample i of both comes from the same noise; auto: where the manifests say so."""
    solver: str = "ddpm"
    """Of checkpoints, as of cdl generate."""
    steps: int | None = None
    """Of checkpoints."""
    evals: int | None = None
    """Of checkpoints, instead of --steps."""
    grid: str | None = None
    """Of checkpoints."""
    seed: int = 0
    """Of checkpoints: the same for both."""
    label: str | None = None
    """Of checkpoints trained on labels."""
    weights: Literal["ema", "raw"] | None = None
    """Of checkpoints."""
    out: str | None = None
    """The run folder; runs/compare-A-B by default."""
    cache: str | None = None
    """As of cdl evaluate."""
    batch: int = 250
    """Samples at a time."""
    device: str = "cpu"
    """Where networks run."""


def _act(options: Compare) -> None:
    from contrastive_diffusion.experiments._evaluate import compare

    show(compare(options))


COMMAND = Command("Compare two generated sets or checkpoints, with intervals and a verdict.", simple(Compare, "compare"), _act, resumes=True)
