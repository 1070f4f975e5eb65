"""Grids of samples, plain beside contrastive, by parallel DDPM and by EDM's deterministic sampler (Figs. 4, 9-16): digits, or your checkpoints."""

from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass as schema

from contrastive_diffusion.experiments import _sets_page as show
from contrastive_diffusion.experiments._page import text
from contrastive_diffusion.experiments._sets import Checkpoints, Point, Sets, measured
from contrastive_diffusion.experiments.digits import Config as Digits
from contrastive_diffusion.recipes import STRICT
from contrastive_diffusion.runs import Run


@schema(config=STRICT, frozen=True)
class Config:
    """Grids of samples, plain beside contrastive."""

    out: str = "runs/samples"
    """The run folder; the same command continues it."""
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    """Networks to show, instead of those of cdl run digits."""
    data: str = "digits"
    """What the checkpoints were trained on."""
    trained: Digits = Field(default_factory=Digits)
    """The recipe of the digits networks; trained once in its folder."""
    sets: Sets = Field(default_factory=lambda: Sets(n=64, seeds=2))
    """Samples, seeds."""
    steps: int = Field(default=100, ge=2)
    """DDPM steps."""
    tolerance: float = Field(default=0.05, ge=0)
    """Of the parallel sampler."""
    evals: int = Field(default=35, ge=1)
    """Evaluations of EDM's sampler; 79 for 64 x 64 images."""


def run(config: Config) -> Path:
    """Trains, generates; returns the run folder."""
    main, arrays = Run.open(config.out, config), {}
    points = [
        Point("parallel", "parallel DDPM", {"solver": "ddpm", "steps": config.steps, "parallel": True, "tolerance": config.tolerance}),
        Point("edm", f"EDM, {config.evals} evaluations", {"solver": "heun", "evals": config.evals, "grid": "karras"}),
    ]
    found = measured(config, main, ("ddpm++", "ddpm"), points, scored=False)
    cost = "; ".join(f"{a.net}, {a.branch}, {p.label}: {show.score(found, a, p, 'evals').mean:,.0f}" for a in found.arms for p in points)
    blocks = [text(f"Denoiser evaluations a sample: {cost}."), *show.pictures(found, arrays, "Samples", points, side=8)]
    show.finish(main, "samples", "Samples, plain and contrastive", found, blocks, arrays)
    return main.path
