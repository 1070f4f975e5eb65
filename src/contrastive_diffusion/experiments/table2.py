"""Parallel and sequential DDPM sampling, plain against contrastive, 3 seeds (Table 2): digits, or your checkpoints.

The paper samples with a window of 32 and its own Picard iteration at a tolerance of 0.1, against the whole reference set, and its two columns
read the network at different timesteps (the contrastive one at t + 0.5 to t + 3.9) and differ from its sequential sampler in the variance.
Here both networks take the same step map at the same log-SNRs with the posterior variance, in sequence and in parallel.
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

PAPER: show.Paper = {  # parallel, 5,000 samples
    "ddpm-cifar10": (9.43, 9.06), "vp-cifar10": ((7.93, 0.07), (7.47, 0.07)), "vp-cifar10-cond": ((7.67, 0.07), (7.27, 0.07)),
    "vp-afhqv2": ((4.58, 0.07), (4.51, 0.04)), "vp-ffhq": ((6.26, 0.07), (5.89, 0.07)), "ve-cifar10": ((7.81, 0.07), (7.35, 0.07)),
    "ve-cifar10-cond": ((7.59, 0.07), (7.19, 0.07)), "ve-afhqv2": ((4.65, 0.10), (4.54, 0.07)), "ve-ffhq": ((6.33, 0.07), (5.94, 0.07)),
}  # fmt: skip


@schema(config=STRICT, frozen=True)
class Config:
    """DDPM in parallel and in sequence, plain against contrastive."""

    out: str = "runs/table2"
    """The run folder; the same command continues it."""
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    """Networks to compare, instead of those of cdl run digits."""
    data: str = "digits"
    """What the checkpoints were trained on: images, or an .npz with EDM's mu and sigma."""
    trained: Digits = Field(default_factory=Digits)
    """The recipe of the digits networks; trained once in its folder."""
    sets: Sets = Field(default_factory=Sets)
    """Samples, seeds, features."""
    steps: int = Field(default=100, ge=2)
    """DDPM steps; the paper's are 1000."""
    slope: str = "secant"
    """Of the parallel sampler."""
    window: int | None = Field(default=None, ge=1)
    """Of the parallel sampler; the paper's is 32."""
    tolerance: float = Field(default=0.05, ge=0)
    """Of the parallel sampler."""


def run(config: Config) -> Path:
    """Trains, generates, measures; returns the run folder."""
    main, steps = Run.open(config.out, config), {"solver": "ddpm", "steps": config.steps}
    how = {"parallel": True, "slope": config.slope, "window": config.window, "tolerance": config.tolerance}
    points = [Point("sequential", "in sequence", steps), Point("parallel", "in parallel", steps | how)]
    found, arrays = measured(config, main, ("ddpm++", "ddpm"), points), {}
    paper = {"parallel": PAPER} if config.sets.n == 5000 else {}
    title = "DDPM sampling in parallel and in sequence, plain and contrastive"
    blocks = [text(show.verdict(found)), show.table(config, found, title, paper), *show.pictures(found, arrays, "Samples", points)]
    show.finish(main, "table2", title, found, blocks, arrays)
    return main.path
