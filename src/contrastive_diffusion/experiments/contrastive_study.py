"""Does contrastive training help? Equal evaluations, several training seeds, exact truth; three laws and 8x8 digits.

Every arm continues one plain network per training seed and spends the same denoiser evaluations (except "plain, equal steps"), or starts
afresh and spends those of the common start as well. Arms are compared by paired differences over training seeds.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as schema

from contrastive_diffusion.errors import choose
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._branches import evals_of, fit_branch, made_before, settled
from contrastive_diffusion.experiments._study_measures import digit_rows, matched_range, measure, off_level_map
from contrastive_diffusion.experiments._study_page import blocks
from contrastive_diffusion.recipes import STRICT, Loss, Net, Train
from contrastive_diffusion.runs import Run, work
from contrastive_diffusion.training import Training

REFERENCE = "plain"  # what every other arm is compared with
UNIFORM = Loss(denoising="uniform")
PLAIN = {"plain": Loss(), "likelihood": Loss(denoising="likelihood"), "perturbed": Loss(perturbation=0.1), "uniform": UNIFORM}


@schema(config=STRICT, frozen=True)
class Law:
    """How much one law is trained."""

    base: int = Field(default=1000, ge=1)
    """Steps of the common start."""
    branch: int = Field(default=400, ge=1)
    """Steps of the contrastive arm; the others get those that make the evaluations equal."""


@schema(config=STRICT, frozen=True)
class Config:
    """Contrastive against plain training and its rivals."""

    out: str = "runs/contrastive-study"
    """The run folder; the same command continues it."""
    laws: dict[str, Law] = Field(default_factory=lambda: {"dino": Law(3000, 1000), "two-modes": Law(), "circles": Law(), "digits": Law(800, 250)})
    """Toy mixtures, and "digits" (8x8, as vectors)."""
    net: Net = Field(default_factory=lambda: Net(width=64, blocks=3))
    """For the toys; digits take a plain MLP of width 128."""
    loss: Loss = Field(default_factory=lambda: Loss(contrastive=0.1))
    """Objective of the contrastive arms."""
    batch: int = Field(default=512, ge=2)
    """Rows per step."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak rate of the arms; the common start has twice that."""
    seeds: int = Field(default=5, ge=2)
    """Training seeds."""
    factor_seeds: int = Field(default=2, ge=0)
    """Training seeds of the sweep over the contrastive loss's own choices, on the first law; 0 leaves it out."""
    samples: int = Field(default=400, ge=10)
    """Samples per arm and seed."""
    steps: tuple[int, ...] = (1000, 100, 25, 10)
    """DDPM steps of the sequential samples."""
    jobs: int = Field(default=2, ge=1)
    """Processes, one thread each."""

    def __post_init__(self):
        for law in self.laws:
            choose(law, ("circles", "digits", "dino", "eight-gaussians", "two-modes"), "law")


def run(config: Config) -> Path:
    """Trains and measures every arm; returns the run folder."""
    main = Run.open(config.out, config)
    first = next(iter(config.laws))
    work([(_law_facts, (config, law)) for law in config.laws if law != "digits"], config.jobs)
    facts = {law: main.part(f"facts-{law}", made_before) for law in config.laws if law != "digits"}
    matched = tuple(facts[first][1]["matched"]) if first in facts else (-4.0, 10.0)
    arms = {(law, seed): _arms(config, law, seed) for law in config.laws for seed in range(config.seeds)}
    sweep = {seed: _factors(config, first, seed, matched) for seed in range(config.factor_seeds)}
    if "digits" in config.laws:
        _digits(config)
    work([(fit_branch, (_base(config, law, seed),)) for law, seed in arms], config.jobs)
    tasks = [(_arm, (config, law, name, recipe)) for (law, _), found in arms.items() for name, recipe in found.items()]
    tasks += [(_arm, (config, first, name, recipe)) for found in sweep.values() for name, recipe in found.items()]
    work(tasks, config.jobs)
    results = {
        law: {name: [_measured(config, arms[law, seed][name]) for seed in range(config.seeds)] for name in arms[law, 0]} for law in config.laws
    }
    factors = {name: [_measured(config, sweep[seed][name]) for seed in sweep] for name in (sweep[0] if sweep else {})}
    arrays = {f"{law}.{key}": value for law, (tensors, _) in facts.items() for key, value in tensors.items() if not key.startswith("points")}
    shown, numbers, drawn = blocks(config, results, factors, {law: meta for law, (_, meta) in facts.items()}, REFERENCE, arrays)
    main.write_results(
        {"experiment": "contrastive-study", "title": "Does contrastive training help?", "numbers": page.numbers(numbers), "blocks": shown},
        arrays | drawn,
    )
    return main.path


def _net(config: Config, law: str) -> Net:
    return Net(kind="plain-mlp", width=128, blocks=3) if law == "digits" else config.net


def _data(config: Config, law: str) -> str:
    return f"{config.out}/digits.npy" if law == "digits" else law


def _train(config: Config, law: str, seed: int, name: str, loss: Loss, steps: int, lr: float, init: str | None) -> Train:
    warmup = min(200, max(1, steps // 5))
    training = settled(Training(steps=steps, batch=config.batch, lr=lr, seed=seed + 1000 * (init is not None), warmup=warmup))
    return Train(data=_data(config, law), out=f"{config.out}/{law}/{seed}/{name}", init=init, net=_net(config, law), loss=loss, training=training)


def _base(config: Config, law: str, seed: int) -> Train:
    return _train(config, law, seed, "base", Loss(), config.laws[law].base, 2 * config.lr, None)


def _budget(config: Config, law: str) -> int:
    return config.laws[law].branch * config.loss.build().evals(config.batch)


def _arms(config: Config, law: str, seed: int) -> dict[str, Train]:
    """The arms of one law and training seed, by name."""
    start, budget, steps = _base(config, law, seed).out, _budget(config, law), config.laws[law].branch
    both = {
        "contrastive": config.loss,
        "contrastive, uniform": dataclasses.replace(config.loss, denoising="uniform"),
    }
    losses = PLAIN | both
    arms = {
        name: _train(config, law, seed, name, loss, budget // loss.build().evals(config.batch), config.lr, start) for name, loss in losses.items()
    }
    arms["plain, equal steps"] = _train(config, law, seed, "plain-equal-steps", Loss(), steps, config.lr, start)
    total = budget + config.laws[law].base * config.batch
    arms["contrastive, from scratch"] = _train(
        config, law, seed, "scratch", config.loss, total // config.loss.build().evals(config.batch), 2 * config.lr, None
    )
    return arms


def _factors(config: Config, law: str, seed: int, matched: tuple[float, ...]) -> dict[str, Train]:
    """One choice of the contrastive loss changed at a time, at equal evaluations."""
    loss, budget, start = config.loss, _budget(config, law), _base(config, law, seed).out
    low, high = (round(v, 1) for v in matched)
    choices = {
        "zeta in [6, 15]": {"zeta": (6.0, 15.0)},
        "zeta in [-9, 9]": {"zeta": (-9.0, 9.0)},
        f"zeta in [{low:g}, {high:g}], matched": {"zeta": (low, high)},
        "weight x 0.1": {"contrastive": loss.contrastive * 0.1},
        "weight x 10": {"contrastive": loss.contrastive * 10},
        "share / 4": {"share": loss.share / 4},
        "share x 4": {"share": loss.share * 4},
        "points / 2, share x 2": {"points": loss.points // 2, "share": loss.share * 2},
        "points x 2, share / 2": {"points": loss.points * 2, "share": loss.share / 2},
    }
    changed = {name: dataclasses.replace(loss, **change) for name, change in choices.items()}
    return {
        name: _train(config, law, seed, f"factor-{i}", new, budget // new.build().evals(config.batch), config.lr, start)
        for i, (name, new) in enumerate(changed.items())
    }


def _digits(config: Config) -> None:
    """The training rows of the digits as a file that recipes can name."""
    path = Path(_data(config, "digits"))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        np.save(part, digit_rows(held_out=False).numpy())
        part.replace(path)


def _law_facts(config: Config, law: str, position: int) -> None:
    """Where the parallel sampler's iterates are, with the exact denoiser: points to measure errors on, and their levels."""
    Run(Path(config.out)).part(f"facts-{law}", lambda: (off := off_level_map(law), {"matched": list(matched_range(off))}))


def _arm(config: Config, law: str, name: str, recipe: Train, position: int) -> None:
    """Trains one arm and measures it; what is done already is left as it is."""
    path = Path(recipe.out) / "measured.json"
    if not path.exists():
        fit_branch(recipe, position)
        facts = None if law == "digits" else Run(Path(config.out)).part(f"facts-{law}", made_before)[0]
        found = measure(law, recipe.out, facts, config.samples, config.steps, parallel=name in ("contrastive", REFERENCE))
        Run(Path(recipe.out)).write(path.name, json.dumps({"evals": evals_of(recipe)} | found))


def _measured(config: Config, recipe: Train) -> dict[str, Any]:
    return json.loads((Path(recipe.out) / "measured.json").read_text())
