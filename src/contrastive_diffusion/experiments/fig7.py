"""Quality of EDM's stochastic sampler over S_churn at S_noise 1.000 and 1.007 (Fig. 7): digits, or your checkpoints; cdl run edm-sweep does it on Dino.

The paper shows the plain network at both S_noise and the contrastive one at 1.000 only; here both take both.
"""

from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass as schema

from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments import _sets_page as show
from contrastive_diffusion.experiments._sets import Checkpoints, Point, Sets, measured
from contrastive_diffusion.experiments.digits import Config as Digits
from contrastive_diffusion.recipes import STRICT
from contrastive_diffusion.runs import Run


@schema(config=STRICT, frozen=True)
class Config:
    """EDM's stochastic sampler over churn, plain against contrastive."""

    out: str = "runs/fig7"
    """The run folder; the same command continues it."""
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    """Networks to compare, instead of those of cdl run digits."""
    data: str = "digits"
    """What the checkpoints were trained on: images, or an .npz with EDM's mu and sigma."""
    trained: Digits = Field(default_factory=Digits)
    """The recipe of the digits networks; trained once in its folder."""
    sets: Sets = Field(default_factory=Sets)
    """Samples, seeds, features."""
    churn: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 7.0)
    """EDM's S_churn; above 0.414 of the steps more has no effect."""
    s_noise: tuple[float, ...] = (1.0, 1.007)
    """EDM's S_noise."""
    s_min: float = Field(default=0.01, ge=0)
    """EDM's S_tmin; the published setting for CIFAR-10 VP."""
    s_max: float = Field(default=1.0, gt=0)
    """EDM's S_tmax; the published setting for CIFAR-10 VP."""
    steps: int = Field(default=18, ge=2)
    """Steps N, of 2 N - 1 evaluations."""


def run(config: Config) -> Path:
    """Trains, generates, measures; returns the run folder."""
    main, arrays = Run.open(config.out, config), {}
    points = {noise: [_point(config, churn, noise) for churn in config.churn] for noise in config.s_noise}
    found = measured(config, main, ("ddpm++",), [point for some in points.values() for point in some])
    title, figures = "EDM's stochastic sampler over churn", []
    for key in show.keys(found):
        curves = [
            show.curve(found, arrays, arm, some, config.churn, key, f"{key}.{arm.branch}, S_noise {noise:g}")
            for noise, some in points.items()
            for arm in found.arms
        ]
        figures.append(page.lines(f"{show.heading(found, key)} over churn", "S_churn", show.heading(found, key), curves,
                                  f"{config.steps} steps, {config.sets.n:,} samples for each of {config.sets.seeds} seeds; bands: one standard error over seeds."))  # fmt: skip
    blocks = [page.text(show.verdict(found)), *figures, show.table(config, found, title)]
    show.finish(main, "fig7", title, found, blocks, arrays)
    return main.path


def _point(config: Config, churn: float, noise: float) -> Point:
    solver = f"edm:churn={churn},s_noise={noise},s_min={config.s_min},s_max={config.s_max}"
    return Point(f"{churn:g};{noise:g}", f"churn {churn:g}, S_noise {noise:g}", {"solver": solver, "steps": config.steps, "grid": "karras"})
