"""How good a noise classifier is a denoiser? Posteriors over levels, calibration, AUC and cross-entropy against Bayes, foreign data.

The exact denoiser of Dino and two trained ones, plain and contrastive from a common start at equal evaluations, beside the closed form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as schema
from torch import Tensor
from torch.nn.functional import softplus

from contrastive_diffusion import metrics
from contrastive_diffusion.data.toys import circles, dino
from contrastive_diffusion.denoisers import Denoiser, noised
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._branches import branch_recipes, made_before, train_branches
from contrastive_diffusion.likelihood import credible_interval, llr, noise_posterior, ood_score
from contrastive_diffusion.metrics import Score, average
from contrastive_diffusion.recipes import STRICT, Loss, Net
from contrastive_diffusion.runs import Run, named_denoiser, work
from contrastive_diffusion.training import Training, stream

BRANCHES = ("plain", "contrastive")
LEVELS = torch.arange(-6, 11, dtype=torch.float64)
ZETAS = torch.arange(-6, 13, 2, dtype=torch.float64)
SHIFTS = {
    "circles": "draws of another law",
    "moved": "Dino moved by 0.1",
    "noised 8": "Dino noised to log-SNR 8",
    "noised 5": "Dino noised to log-SNR 5",
}


@schema(config=STRICT, frozen=True)
class Config:
    """The noise classifier that a denoiser is."""

    out: str = "runs/noise-classifier"
    """The run folder; the same command continues it."""
    net: Net = Field(default_factory=lambda: Net(width=64, blocks=3))
    base: Training = Field(default_factory=lambda: Training(steps=3000))
    """Training of the common start."""
    branch: Training = Field(default_factory=lambda: Training(steps=1000, lr=1e-3, seed=1))
    """Training of the contrastive branch; the plain one gets the steps that make the evaluations equal."""
    loss: Loss = Field(default_factory=lambda: Loss(contrastive=0.1))
    """Objective of the contrastive branch."""
    points: int = Field(default=400, ge=40)
    """Points for each part."""
    evals: int = Field(default=1024, ge=272)
    """Evaluations per point and posterior; an eighth of them per ratio."""
    jobs: int = Field(default=2, ge=1)
    """Processes, one thread each."""


def run(config: Config) -> Path:
    """Trains, classifies; returns the run folder."""
    main = Run.open(config.out, config)
    recipes = branch_recipes(config, "dino", BRANCHES)
    train_branches(recipes, config.jobs)
    sources = {"exact denoiser": "dino"} | {name: recipes[name].out for name in BRANCHES}
    work([(_classify, (config, name, source)) for name, source in sources.items()], config.jobs)
    parts = {name: main.part(f"classified-{_slug(name)}", made_before)[0] for name in sources}
    truth = _said(config, _bayes())
    arrays: dict[str, Tensor] = {"levels": LEVELS, "zetas": ZETAS, "index": torch.arange(len(truth["posterior"]), dtype=torch.float64)}
    numbers = {name: _numbers(found, truth) for name, found in ({"Bayes": truth} | parts).items()}
    blocks = _blocks(config, {"Bayes": truth} | parts, numbers, arrays)
    main.write_results(
        {"experiment": "noise-classifier", "title": "A denoiser as a noise classifier", "numbers": page.numbers(numbers), "blocks": blocks}, arrays
    )
    return main.path


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def _levelled(config: Config) -> tuple[Tensor, Tensor]:
    """Points of every level in turn, and the index of the level."""
    index = torch.arange(config.points) * len(LEVELS) // config.points
    x = dino().sample(config.points, stream(0, "points"))
    return noised(x, LEVELS[index], stream(0, "noise")), index


def _binary(config: Config, zeta: float) -> tuple[Tensor, Tensor]:
    x = dino().sample(2 * config.points, stream(1, "points"))
    return x[: config.points], noised(x[config.points :], zeta, stream(1, "noise"))


def _foreign(config: Config, name: str) -> Tensor:
    x = dino().sample(config.points, stream(2, name))
    made = {
        "circles": lambda: circles().sample(config.points, stream(2, "circles")),
        "moved": lambda: x + 0.1 / 2**0.5,
        "noised 8": lambda: noised(x, 8.0, stream(3, "eight")),
        "noised 5": lambda: noised(x, 5.0, stream(3, "five")),
    }
    return made[name]()


@dataclass(frozen=True)
class Reader:
    """What is said of points: log-probabilities of LEVELS, log p_zeta - log p, and the scores "nll" and "llr" by kind."""

    posterior: Callable[[Tensor], Tensor]
    ratio: Callable[[Tensor, float], Tensor]
    score: Callable[[Tensor, str], Tensor]


def _bayes() -> Reader:
    """The closed form."""
    law = dino()
    return Reader(
        lambda x: torch.stack([law.log_prob(x.double(), float(level)) for level in LEVELS], 1).log_softmax(1),
        lambda x, zeta: law.llr(x.double(), zeta),
        lambda x, kind: law.nll(x.double()) if kind == "nll" else law.llr(x.double(), 0.0),
    )


def _estimates(denoiser: Denoiser, evals: int) -> Reader:
    """What a denoiser says at ``evals`` evaluations a posterior and an eighth of them a ratio."""
    each = evals // 8
    return Reader(
        lambda x: noise_posterior(denoiser, x, LEVELS, evals, stream(0, "posterior")).double(),
        lambda x, zeta: llr(denoiser, x, zeta, each, stream(0, f"ratio {zeta}")).mean.double(),
        lambda x, kind: ood_score(denoiser, x, kind, each, stream(0, kind)).mean.double(),
    )


def _said(config: Config, reader: Reader) -> dict[str, Tensor]:
    """Everything a reader says."""
    x, index = _levelled(config)
    found = {"posterior": reader.posterior(x), "index": index}
    for zeta in ZETAS.tolist():
        clean, dirty = (reader.ratio(v, zeta) for v in _binary(config, zeta))
        found |= {f"clean {zeta:g}": clean, f"dirty {zeta:g}": dirty}
    scored = {name: _foreign(config, name) for name in SHIFTS} | {"own": dino().sample(config.points, stream(4, "own"))}
    return found | {f"{kind} {name}": reader.score(v, kind) for kind in ("nll", "llr") for name, v in scored.items()}


@torch.no_grad()
def _classify(config: Config, name: str, source: str, position: int) -> None:
    Run(Path(config.out)).part(f"classified-{_slug(name)}", lambda: (_said(config, _estimates(named_denoiser(source)[0], config.evals)), {}))


def _numbers(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Any]:
    probability, index = found["posterior"].exp(), found["index"]
    hits = torch.nn.functional.one_hot(index, len(LEVELS)).bool()
    calibration = metrics.calibration(probability.flatten(), hits.flatten())
    low, high = credible_interval(found["posterior"], LEVELS, 0.9)
    level = LEVELS[index]
    rows: dict[str, Any] = {
        "total variation to Bayes": average((probability - truth["posterior"].exp()).abs().sum(1) / 2),
        "calibration error": calibration.error,
        "calibration error by chance": calibration.chance,
        "90 % interval holds": average(((low - 0.5 <= level) & (level <= high + 0.5)).double()),
        "cross-entropy of the level, nats": average(-found["posterior"].gather(1, index[:, None])[:, 0].clamp_min(-30)),
    }
    for zeta in ZETAS.tolist():
        clean, dirty = found[f"clean {zeta:g}"], found[f"dirty {zeta:g}"]
        rows[f"auc {zeta:g}"] = metrics.auroc(dirty, clean)
        rows[f"cross-entropy {zeta:g}"] = average(torch.cat([softplus(clean), softplus(-dirty)]))
    for kind in ("nll", "llr"):
        for key in SHIFTS:
            rows[f"{kind}: {key}"] = metrics.auroc(found[f"{kind} {key}"], found[f"{kind} own"])
    rows["curve"] = {"said": calibration.said.tolist(), "found": calibration.found.tolist(), "stderr": calibration.stderr.tolist()}
    return rows


def _blocks(config: Config, parts: dict[str, dict[str, Tensor]], numbers: dict[str, Any], arrays: dict[str, Tensor]) -> list[page.Block]:
    panels, reliability, auc, entropy = [], [], [], []
    for name, found in parts.items():
        slug = _slug(name)
        arrays[f"posterior.{slug}"] = found["posterior"].exp().clamp_min(1e-4)
        panels.append({"title": name, "values": f"posterior.{slug}"})
        curve = numbers[name].pop("curve")
        for key, value in curve.items():
            arrays[f"{key}.{slug}"] = torch.tensor(value)
        reliability.append(page.series(name, f"said.{slug}", f"found.{slug}", f"stderr.{slug}"))
        for key, curves in (("auc", auc), ("cross-entropy", entropy)):
            scores: list[Score] = [numbers[name][f"{key} {zeta:g}"] for zeta in ZETAS.tolist()]
            arrays[f"{key}.{slug}"], arrays[f"{key}.{slug}.err"] = torch.tensor([s.mean for s in scores]), torch.tensor([s.stderr for s in scores])
            curves.append(page.series(name, "zetas", f"{key}.{slug}", f"{key}.{slug}.err", "dashed" if name == "Bayes" else "line"))
    first = [
        "total variation to Bayes",
        "calibration error",
        "calibration error by chance",
        "90 % interval holds",
        "cross-entropy of the level, nats",
    ]
    foreign = [key for key in numbers["Bayes"] if key.startswith(("nll: ", "llr: "))]
    words = (
        f"With the exact denoiser the posterior over {len(LEVELS)} levels is {numbers['exact denoiser'][first[0]].mean:.3f} in total variation from Bayes at {config.evals} evaluations; "
        f"with the plain network {numbers['plain'][first[0]].mean:.3f}, with the contrastive one {numbers['contrastive'][first[0]].mean:.3f}."
    )
    return [
        page.text(words),
        page.table("Which level? Posterior over levels", ["denoiser", *first], [[name, *[numbers[name][k] for k in first]] for name in parts], f"{config.points} points, one level each, uniform priors; mean and standard error."),
        page.maps("Posteriors", "levels", "index", panels, "A row for every point, sorted by its true level (clean at the top); colour: probability.", xlabel="log-SNR, nats", ylabel="point", colour="probability"),
        page.lines("Calibration", "stated probability of a level", "share that had it", reliability, "Bins of equal count; bands of one standard error."),
        page.lines("Clean or noised? Area under the ROC curve", "zeta, nats", "AUC", auc, f"{config.points} points of each class, {config.evals // 8} evaluations each."),
        page.lines("Clean or noised? Cross-entropy", "zeta, nats", "nats", entropy, "Dashed: the Bayes classifier. log 2 = 0.693 is chance.", logy=True),
        page.table("Foreign data: area under the ROC curve of the scores", ["denoiser", *foreign], [[name, *[numbers[name][k] for k in foreign]] for name in parts], "; ".join(f"{k}: {v}" for k, v in SHIFTS.items()) + ". nll: -log p(x); llr: log p_0(x) - log p(x)."),
    ]  # fmt: skip
