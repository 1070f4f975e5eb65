"""Slopes of parallel-in-time sampling, on exact and trained denoisers: rounds, evaluations and errors against the sequential sample.

The first rows have exact denoisers. The trained ones are the plain and the contrastive branch of the Dino experiment at the budget given here. Every
method gets the same noise; "paradigms" is Picard in lock step with the published rule. The questions: how much does the slope save, does it still save on
trained networks, and does contrastive training change the number of rounds?
"""

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as schema
from torch import Tensor

from contrastive_diffusion import schedules, solvers
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._branches import branch_recipes, made_before, train_branches
from contrastive_diffusion.metrics import average
from contrastive_diffusion.parallel import Paradigms, Parallel, Trace
from contrastive_diffusion.recipes import STRICT, Loss, Net
from contrastive_diffusion.runs import Run, named_denoiser, work
from contrastive_diffusion.sampling import Round, Sequential
from contrastive_diffusion.training import Training

METHODS = ("paradigms", "picard", "x0", "gauss", "secant")
BRANCHES = ("plain", "contrastive")
LAWS = ("ring", "blobs64", "curve", "ring+error")


@schema(config=STRICT, frozen=True)
class Config:
    """Slopes of parallel-in-time sampling."""

    out: str = "runs/parallel"
    """The run folder; the same command continues it."""
    net: Net = Field(default_factory=Net)
    base: Training = Field(default_factory=lambda: Training(steps=3000))
    """Training of the common start of the trained denoisers."""
    branch: Training = Field(default_factory=lambda: Training(steps=1000, lr=1e-3, seed=1))
    """Training of the contrastive branch; the plain one gets the steps that make the evaluations equal."""
    loss: Loss = Field(default_factory=lambda: Loss(contrastive=0.1))
    """Objective of the contrastive branch."""
    steps: int = Field(default=1000, ge=10)
    """DDPM steps."""
    samples: int = Field(default=32, ge=2)
    """Samples of a seed."""
    seeds: int = Field(default=3, ge=2)
    """Sampling seeds."""
    tolerance: float = Field(default=0.1, ge=0)
    """Of all methods."""
    jobs: int = Field(default=2, ge=1)
    """Processes, one thread each."""


def run(config: Config) -> Path:
    """Trains two denoisers, samples with every method; returns the run folder."""
    main = Run.open(config.out, config)
    recipes = branch_recipes(config, "dino", BRANCHES)
    train_branches(recipes, config.jobs)
    sources = [*LAWS, *(recipes[name].out for name in BRANCHES)]
    work([(_sample, (config, source, seed)) for source in sources for seed in range(config.seeds)], config.jobs)
    parts = {_name(source): [main.part(_label(source, seed), made_before) for seed in range(config.seeds)] for source in sources}
    numbers = {name: {method: _scores(config, found, method) for method in METHODS} for name, found in parts.items()}
    arrays: dict[str, Tensor] = {}
    for name in ("ring", "plain", "contrastive"):
        arrays |= {f"{name}.{key}": value for key, value in parts[name][0][0].items() if not key.endswith(".rounds of each")}
    arrays |= {"step": torch.arange(config.steps).float()}
    main.write_results(
        {"experiment": "parallel", "title": "Parallel in time: slopes", "numbers": page.numbers(numbers), "blocks": _blocks(config, numbers, arrays)},
        arrays,
    )
    return main.path


def law(name: str) -> tuple[Denoiser, tuple[int, ...]]:
    """A law's exact denoiser (or, for ring+error, one with an error of random features of a tenth) and the shape of an item."""
    generator = torch.Generator().manual_seed(64)
    if name == "blobs64":
        return GaussianMixture(torch.randn(10, 64, generator=generator, dtype=torch.float64), 0.3), (64,)
    if name == "curve":
        t = torch.linspace(-1.5, 1.5, 200, dtype=torch.float64)
        return GaussianMixture(torch.stack([t, 0.8 * (4 * t).sin()], 1), 0.02), (2,)
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    ring = GaussianMixture(1.4 * torch.stack([angle.cos(), angle.sin()], 1), 0.05)
    if name == "ring":
        return ring, (2,)
    weight, out = 3 * torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator) * (2 / 64) ** 0.5
    return lambda z, logsnr: ring(z, logsnr) + 0.1 * (z @ weight + 0.3 * logsnr[:, None]).cos() @ out, (2,)


def _name(source: str) -> str:
    return Path(source).name


def _label(source: str, seed: int) -> str:
    return f"samples-{_name(source)}-{seed}"


def _sample(config: Config, source: str, seed: int, position: int) -> None:
    """All methods from the same noise; for the first seed also the error after every round and the trace of one sample."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        denoiser, item = law(source) if source in LAWS else named_denoiser(source)
        grid, shape = schedules.grid(schedules.ddpm(), config.steps), (config.samples, *item)
        exact, tensors, meta = Sequential(solvers.ddpm())(denoiser, grid, shape, seed).x, {"exact": torch.zeros(1)}, {}
        for method in METHODS:
            errors: list[float] = []
            watch = lambda seen, errors=errors: errors.append(_rms(seen, exact))  # noqa: E731
            trace = Trace(limit=200)
            if method == "paradigms":
                drawn = Paradigms(solvers.ddpm(), None, config.tolerance)(denoiser, grid, shape, seed, watch=watch)
            else:
                drawn = Parallel(solvers.ddpm(), method, "all", config.tolerance)(denoiser, grid, shape, seed, watch=watch, trace=trace)
                tensors |= {f"{method}.heat": trace.heat(0, config.steps), f"{method}.windows": trace.windows(0).float()}
            each = (drawn.x - exact).square().flatten(1).mean(1).sqrt()
            tensors |= {f"{method}.curve": torch.tensor(errors), f"{method}.number": torch.arange(1.0, len(errors) + 1)}
            meta[method] = {"rounds": drawn.rounds, "evals": drawn.evals / config.samples / config.steps, "worst": float(each.max()), "typical": float(each.median()),
                            "to 1e-2": _below(errors)}  # fmt: skip
        return tensors, meta

    Run(Path(config.out)).part(_label(source, seed), make)


def _rms(seen: Round, exact: Tensor) -> float:
    return float((seen.states[-1] - exact).square().flatten(1).mean(1).sqrt().max())


def _below(errors: list[float], bound: float = 1e-2) -> int:
    """The first round after which the error stays below ``bound``; one more than there were if it never does."""
    k = len(errors)
    while k and errors[k - 1] <= bound:
        k -= 1
    return k + 1


def _scores(config: Config, parts: list[tuple[dict[str, Tensor], dict[str, Any]]], method: str) -> dict[str, Any]:
    found = [meta[method] for _, meta in parts]
    mean = {key: average([float(f[key]) for f in found]) for key in ("rounds", "evals", "to 1e-2", "typical")}
    return mean | {"worst": max(f["worst"] for f in found)}


def _blocks(config: Config, numbers: dict[str, Any], arrays: dict[str, Tensor]) -> list[page.Block]:
    columns = ["denoiser, method", "rounds", "evaluations a step", "rounds to worst error 1e-2", "median error", "worst error"]
    rows = [
        [f"{name}, {method}", v["rounds"], v["evals"], v["to 1e-2"], v["typical"], v["worst"]]
        for name, methods in numbers.items() for method, v in methods.items()
    ]  # fmt: skip
    ratio = lambda name, key: numbers[name]["secant"][key].mean / numbers[name]["paradigms"][key].mean  # noqa: E731
    trained = [f"{name}: {ratio(name, 'rounds'):.2f} of the rounds and {ratio(name, 'evals'):.2f} of the evaluations" for name in BRANCHES]
    between = [
        f"{method} {numbers['plain'][method]['rounds'].mean:.1f} plain, {numbers['contrastive'][method]['rounds'].mean:.1f} contrastive"
        for method in ("paradigms", "secant")
    ]
    heats = [
        page.heat(f"Error by round and step ({method})", f"ring.{method}.heat", f"ring.{method}.windows",
                  "log10 of the error that the slopes predict for the state after each step, one sample of the ring; lines: its window.")
        for method in ("picard", "secant")
    ]  # fmt: skip
    return [
        page.text(
            f"Secant against ParaDiGMS on trained networks: {'; '.join(trained)}. Rounds to convergence: {'; '.join(between)}. "
            f"The whole grid of {config.steps} steps is the window, the tolerance {config.tolerance:g} for all."
        ),
        page.table(
            "Rounds, evaluations and errors", columns, rows,
            f"Mean ± standard error over {config.seeds} seeds of {config.samples} samples; rounds until the slowest sample is done. Error: root mean square "
            "of a sample against the sequential one from the same noise; the worst of all samples. A sample between two modes may end in the other one.",
        ),
        *[
            page.lines(f"Worst error after each round ({name})", "round", "root mean square error, worst sample",
                       [page.series(m, f"{name}.{m}.number", f"{name}.{m}.curve") for m in METHODS], "First seed.", logy=True)
            for name in ("ring", *BRANCHES)
        ],
        *heats,
    ]  # fmt: skip
