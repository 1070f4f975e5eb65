"""Quality of EDM's deterministic sampler against evaluations (Fig. 6): digits, or your checkpoints; cdl run edm-sweep does it on Dino."""

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
    """EDM's deterministic sampler over evaluations, plain against contrastive."""

    out: str = "runs/fig6"
    """The run folder; the same command continues it."""
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    """Networks to compare, instead of those of cdl run digits."""
    data: str = "digits"
    """What the checkpoints were trained on: images, or an .npz with EDM's mu and sigma."""
    trained: Digits = Field(default_factory=Digits)
    """The recipe of the digits networks; trained once in its folder."""
    sets: Sets = Field(default_factory=Sets)
    """Samples, seeds, features."""
    evals: tuple[int, ...] = (9, 15, 25, 35, 51, 79, 127, 199)
    """Evaluations a sample, 2 N - 1 for N steps of EDM's grid."""


def run(config: Config) -> Path:
    """Trains, generates, measures; returns the run folder."""
    main, arrays = Run.open(config.out, config), {}
    points = [Point(f"{evals}", f"{evals} evaluations", {"solver": "heun", "evals": evals, "grid": "karras"}) for evals in config.evals]
    found = measured(config, main, ("ddpm++",), points)
    title, figures = "EDM's deterministic sampler over evaluations", []
    for key in show.keys(found):
        curves = [show.curve(found, arrays, arm, points, config.evals, key, f"{key}.{arm.branch}") for arm in found.arms]
        figures.append(page.lines(f"{show.heading(found, key)} over evaluations", "evaluations a sample", show.heading(found, key), curves,
                                  f"{config.sets.n:,} samples for each of {config.sets.seeds} seeds; bands: one standard error over seeds.", logx=True))  # fmt: skip
    blocks = [page.text(show.verdict(found)), *figures, show.table(config, found, title)]
    show.finish(main, "fig6", title, found, blocks, arrays)
    return main.path
