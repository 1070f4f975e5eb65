"""DDPM sampling with weights that are not averaged, in parallel and in sequence (Table 4): digits, or your checkpoints.

The paper's two samplers differ in the variance of a step, and its baseline was not trained on with the plain loss; here both samplers are one
step map with the posterior variance, and the plain branch gets the evaluations that the contrastive one gets.
"""

from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass as schema

from contrastive_diffusion.experiments import _sets_page as show
from contrastive_diffusion.experiments._page import text
from contrastive_diffusion.experiments._sets import Checkpoints, Point, Sets, measured
from contrastive_diffusion.experiments.digits import Config as Digits
from contrastive_diffusion.recipes import STRICT
from contrastive_diffusion.runs import Run

PAPER: dict[str, show.Paper] = {"parallel": {"ddpm-cifar10": (10.69, 7.83)}, "sequential": {"ddpm-cifar10": (12.43, 10.06)}}


@schema(config=STRICT, frozen=True)
class Config:
    """DDPM with weights as training left them, plain against contrastive."""

    out: str = "runs/table4"
    """The run folder; the same command continues it."""
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    """Networks to compare, instead of that of cdl run digits: run folders, or model folders of raw weights."""
    data: str = "digits"
    """What the checkpoints were trained on: images, or an .npz with EDM's mu and sigma."""
    trained: Digits = Field(default_factory=Digits)
    """The recipe of the digits networks; trained once in its folder."""
    sets: Sets = Field(default_factory=Sets)
    """Samples, seeds, features."""
    steps: int = Field(default=100, ge=2)
    """DDPM steps; the paper's are 1000."""
    tolerance: float = Field(default=0.05, ge=0)
    """Of the parallel sampler."""


def run(config: Config) -> Path:
    """Trains, generates, measures; returns the run folder."""
    main, arrays = Run.open(config.out, config), {}
    raw = {"solver": "ddpm", "steps": config.steps, "weights": "raw"}
    points = [
        Point("sequential", "in sequence", raw),
        Point("parallel", "in parallel", raw | {"parallel": True, "tolerance": config.tolerance}),
        *([] if config.checkpoints.plain else [Point("averaged", "in sequence, averaged weights", raw | {"weights": "ema"})]),
    ]
    found = measured(config, main, ("ddpm",), points)
    paper = {key: PAPER[key] for key, n in (("sequential", 50_000), ("parallel", 5000)) if config.sets.n == n}
    title = "DDPM sampling with weights that are not averaged"
    blocks = [text(show.verdict(found)), show.table(config, found, title, paper), *show.pictures(found, arrays, "Samples", points)]
    show.finish(main, "table4", title, found, blocks, arrays)
    return main.path
