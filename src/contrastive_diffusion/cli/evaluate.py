"""``cdl evaluate``."""

from dataclasses import dataclass
from typing import Annotated, Any

from contrastive_diffusion.cli._command import Command, simple


@dataclass(frozen=True)
class Evaluate:
    """Measure generated sets against a reference, with intervals, in a run folder with a page. Several sets are several seeds of one model."""

    generated: Annotated[tuple[str, ...], "positional"]
    """Folders of cdl generate, folders or archives of images, or .npy files."""
    data: str
    """The reference: digits, patches, a toy, images, an array, or an .npz with mu and sigma (EDM's reference files)."""
    extractor: str = "pixels"
    """Features: pixels, digits (a small classifier of 8 x 8 digits), torchscript:FILE, safetensors:FILE."""
    metrics: tuple[str, ...] = ()
    """frechet, kid, mmd, nearest, prdc, sliced; all that the samples allow by default."""
    n: int | None = None
    """Samples of each set; all by default, and never fewer than asked."""
    reference_n: int | None = None
    """Samples of the reference; all by default."""
    blocks: int = 10
    """Blocks of samples that are left out in turn for the intervals."""
    neighbours: int = 5
    """k of precision, recall, density and coverage."""
    out: str | None = None
    """The run folder; runs/evaluate-NAME by default."""
    cache: str | None = None
    """Where features of references are kept; $CDL_CACHE or ~/.cache/contrastive-diffusion by default."""
    batch: int = 250
    """Samples given to the extractor at a time."""
    device: str = "cpu"
    """Where the extractor runs."""


def _act(options: Evaluate) -> None:
    from contrastive_diffusion.experiments._evaluate import evaluate

    show(evaluate(options))


def show(folder: Any) -> None:
    """Writes the page of a run folder and prints its summary."""
    from contrastive_diffusion.report import write
    from contrastive_diffusion.report.text import summary

    page = write(folder)
    print(summary(folder))
    print(f"report: {page}")


COMMAND = Command("Measure generated sets against a reference, with intervals.", simple(Evaluate, "evaluate"), _act, resumes=True)
