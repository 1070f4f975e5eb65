"""Deterministic quality against evaluations, churn against S_noise, every solver on one footing (Fig. 6, Fig. 7), on Dino.

A denoiser is trained with EDM's law and weight and continued in two branches of equal evaluations, plain and with the contrastive loss
added. Both, and the exact denoiser, are then sampled: with EDM's deterministic sampler at 5 to 999 evaluations (in kind the paper's
Fig. 6), with its stochastic one over S_churn at S_noise 1.000 and 1.007 (Fig. 7), and with every solver at equal evaluations. The measure
is the exact log-density of the samples after both they and the truth are noised to one level, where an exact sampler scores as true samples do.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as schema
from torch import Tensor

from contrastive_diffusion import metrics, schedules, solvers
from contrastive_diffusion.data.toys import dino
from contrastive_diffusion.denoisers import noised
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._branches import branch_recipes, made_before, spent, train_branches
from contrastive_diffusion.experiments._sweep_page import blocks as show
from contrastive_diffusion.metrics import Score, average
from contrastive_diffusion.recipes import STRICT, Loss, Net
from contrastive_diffusion.runs import Run, named_denoiser, work
from contrastive_diffusion.sampling import Sequential
from contrastive_diffusion.training import Training, stream

BRANCHES = ("plain", "contrastive")
ARMS = (*BRANCHES, "dino")  # the last is the exact denoiser


@schema(config=STRICT, frozen=True)
class Config:
    """EDM's samplers over evaluations and churn, and every solver at equal evaluations, on Dino."""

    out: str = "runs/edm-sweep"
    """The run folder; the same command continues it."""
    net: Net = Field(default_factory=Net)
    base: Training = Field(default_factory=lambda: Training(steps=4000))
    """Training of the common start."""
    branch: Training = Field(default_factory=lambda: Training(steps=1500, lr=1e-3, seed=1))
    """Training of the contrastive branch; the plain one gets the steps that make the evaluations equal."""
    loss: Loss = Field(default_factory=lambda: Loss(denoising="edm", contrastive=0.1))
    """Objective of the contrastive branch."""
    samples: int = Field(default=900, ge=6)
    """Samples per point, split evenly over the seeds."""
    seeds: int = Field(default=3, ge=2)
    """Sampling seeds."""
    evals: tuple[int, ...] = (5, 9, 19, 35, 79, 199, 499, 999)
    """Evaluations of the deterministic sampler, 2 N - 1 for N steps."""
    churn: tuple[float, ...] = (0.0, 2.5, 5.0, 10.0, 20.0, 40.0)
    """EDM's S_churn."""
    s_noise: tuple[float, ...] = (1.0, 1.007)
    """EDM's S_noise."""
    churn_steps: int = Field(default=64, ge=2)
    """Steps N of the stochastic sampler (2 N - 1 evaluations)."""
    compared: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    """Evaluations at which every solver is compared."""
    level: float = 6.0
    """Log-SNR at which densities are compared: details under sigma 0.05 do not count, and a few far samples do not drown the rest."""
    jobs: int = Field(default=2, ge=1)
    """Processes, one thread each."""


def run(config: Config) -> Path:
    """Trains, samples, measures; returns the run folder with results.json and arrays."""
    main = Run.open(config.out, config)
    recipes = branch_recipes(config, "dino", BRANCHES)
    train_branches(recipes, config.jobs, [(_measure, (config, "dino", "dino", name)) for name in SWEEPS])
    work([(_measure, (config, arm, recipes[arm].out, name)) for arm in BRANCHES for name in SWEEPS], config.jobs)
    arrays, numbers = _gathered(config, main)
    numbers |= {"denoiser evaluations": spent(recipes), "true samples": _truth(config)}
    blocks = show(config, numbers, arrays)
    main.write_results(
        {"experiment": "edm-sweep", "title": "EDM's samplers and every solver, on Dino", "numbers": page.numbers(numbers), "blocks": blocks}, arrays
    )
    return main.path


def _points(config: Config) -> dict[str, list[tuple[str, str, int]]]:
    """For each sweep, its points: a key, a solver with options, and its steps."""
    deterministic = [(f"{evals}", "heun", (evals + 1) // 2) for evals in config.evals]
    churned = [
        (f"{churn:g};{noise:g}", f"edm:churn={churn},s_noise={noise}", config.churn_steps) for noise in config.s_noise for churn in config.churn
    ]
    known = {name: make() for name, make in solvers.SOLVERS.items() if name not in ("adaptive", "edm")}
    every = [(f"{name};{evals}", name, solvers.steps_for(solver, evals)) for name, solver in known.items() for evals in config.compared]
    return {
        "deterministic": deterministic,
        "churn": churned,
        "solvers": [*every, *((f"adaptive;{t}", f"adaptive:relative={t},absolute={t / 10}", 20) for t in (0.5, 0.1, 0.03))],
    }


SWEEPS = ("deterministic", "churn", "solvers")


def _measure(config: Config, arm: str, source: str, sweep: str, position: int) -> None:
    """All points of a sweep for one denoiser: the scores of each seed."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        denoiser, shape = named_denoiser(source)
        found: dict[str, Any] = {}
        distance = metrics.MMD(dino().sample(2000, stream(0, "reference")), 0.03**0.5)
        for key, spec, steps in _points(config)[sweep]:
            # EDM's sweeps on EDM's grid; the solvers against one another on one grid, even in log-SNR.
            levels = schedules.grid(schedules.uniform(-8.7, 12.4) if sweep == "solvers" else schedules.karras(), steps)
            found[key] = [_scores(config, solvers.solver(spec), denoiser, levels, shape, seed, distance) for seed in range(config.seeds)]
        return {}, found

    Run(Path(config.out)).part(f"{sweep}-{arm}", make)


def _scores(config: Config, solver: Any, denoiser: Any, levels: Tensor, shape: tuple[int, ...], seed: int, distance: metrics.MMD) -> dict[str, float]:
    """Exact log-density at ``config.level`` and MMD of one seed's samples."""
    n = config.samples // config.seeds
    drawn = Sequential(solver)(denoiser, levels, (n, *shape), seed)
    return {"evals": drawn.evals / n, "log density": _density(config, drawn.x, seed), "mmd": distance(drawn.x).mean}


def _density(config: Config, x: Tensor, seed: int) -> float:
    """Mean exact log-density of x once noised to the level."""
    law, z = dino(), noised(x.clamp(-20, 20), config.level, stream(seed, "noise of the density"))
    return metrics.log_density(lambda z: law.log_prob(z, config.level), z).mean


def _truth(config: Config) -> Score:
    """The log-density of true samples, over as many seeds of as many samples."""
    n = config.samples // config.seeds
    return average([_density(config, dino().sample(n, stream(seed, "true samples")), seed) for seed in range(config.seeds)])


def _gathered(config: Config, main: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Scores of every point over seeds, and as curves: arrays ARM.SWEEP[.which].(x | y | err)."""
    arrays: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for arm in ARMS:
        numbers[arm] = {}
        for sweep in SWEEPS:
            found = main.part(f"{sweep}-{arm}", made_before)[1]
            numbers[arm][sweep] = {key: {name: average([seed[name] for seed in seeds]) for name in seeds[0]} for key, seeds in found.items()}
            for curve, points in _curves(numbers[arm][sweep], sweep).items():
                scores = [(p["log density"], p["mmd"]) for _, p in points]
                arrays[f"{arm}.{curve}.x"] = torch.tensor([x for x, _ in points], dtype=torch.float64)
                for which, name in enumerate(("y", "mmd")):
                    arrays[f"{arm}.{curve}.{name}"] = torch.tensor([s[which].mean for s in scores], dtype=torch.float64)
                    arrays[f"{arm}.{curve}.{name}.err"] = torch.tensor([s[which].stderr for s in scores], dtype=torch.float64)
    return arrays, numbers


def _curves(points: dict[str, Any], sweep: str) -> dict[str, list[tuple[float, Any]]]:
    """Curve -> its (x, scores): over evaluations, or over churn for each S_noise."""
    curves: dict[str, list[tuple[float, Any]]] = {}
    for key, scores in points.items():
        first, _, second = key.partition(";")
        if sweep == "churn":
            curves.setdefault(f"churn.{second}", []).append((float(first), scores))
        else:
            curves.setdefault(f"{sweep}.{first}" if second else sweep, []).append((scores["evals"].mean, scores))
    return curves
