"""EDM's deterministic sampler at 35 and 79 evaluations, plain against contrastive, 3 seeds (Table 3): digits, or your checkpoints."""

from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass as schema

from contrastive_diffusion.experiments import _sets_page as show
from contrastive_diffusion.experiments._page import text
from contrastive_diffusion.experiments._sets import Checkpoints, Point, Sets, measured
from contrastive_diffusion.experiments.digits import Config as Digits
from contrastive_diffusion.recipes import STRICT
from contrastive_diffusion.runs import Run

PAPER: dict[str, show.Paper] = {  # by evaluations; 50,000 samples
    "35": {
        "vp-cifar10": ((2.00, 0.02), (1.99, 0.04)), "vp-cifar10-cond": ((1.84, 0.02), (1.82, 0.03)),
        "ve-cifar10": ((2.01, 0.01), (2.01, 0.01)), "ve-cifar10-cond": ((1.81, 0.01), (1.81, 0.01)),
    },
    "79": {
        "vp-afhqv2": ((2.04, 0.00), (2.00, 0.00)), "vp-ffhq": ((2.38, 0.01), (2.29, 0.02)),
        "ve-afhqv2": ((2.17, 0.00), (2.11, 0.01)), "ve-ffhq": ((2.56, 0.03), (2.47, 0.02)),
    },
}  # fmt: skip


@schema(config=STRICT, frozen=True)
class Config:
    """EDM's deterministic sampler, plain against contrastive."""

    out: str = "runs/table3"
    """The run folder; the same command continues it."""
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    """Networks to compare, instead of those of cdl run digits."""
    data: str = "digits"
    """What the checkpoints were trained on: images, or an .npz with EDM's mu and sigma."""
    trained: Digits = Field(default_factory=Digits)
    """The recipe of the digits networks; trained once in its folder."""
    sets: Sets = Field(default_factory=Sets)
    """Samples, seeds, features."""
    evals: tuple[int, ...] = (35, 79)
    """Evaluations a sample, 2 N - 1 for N steps of EDM's grid."""


def run(config: Config) -> Path:
    """Trains, generates, measures; returns the run folder."""
    main, arrays = Run.open(config.out, config), {}
    points = [Point(f"{evals}", f"{evals} evaluations", {"solver": "heun", "evals": evals, "grid": "karras"}) for evals in config.evals]
    found = measured(config, main, ("ddpm++",), points)
    paper = PAPER if config.sets.n == 50_000 else {}
    title = "EDM's deterministic sampler, plain and contrastive"
    blocks = [text(show.verdict(found)), show.table(config, found, title, paper), *show.pictures(found, arrays, "Samples", points)]
    show.finish(main, "table3", title, found, blocks, arrays)
    return main.path
