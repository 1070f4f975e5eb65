"""Plain against contrastive training on Dino, sampled in sequence and in parallel (Fig. 4, Table 1, Fig. 8).

A denoiser is trained on the exact Dino law and continued in branches at equal denoiser evaluations: with the DDPM loss alone ("plain"),
with the contrastive loss added ("contrastive"), and, as a control, with the DDPM loss at levels uniform in log-SNR ("uniform"): the
contrastive loss too puts weight on high log-SNRs, which uniform timesteps hardly visit. All are sampled with DDPM, step by step, with
Picard iteration over the whole trajectory and with the measured slope, with the same noise, and judged against the exact density and denoiser of the law. One
training seed; errors are over sampling seeds.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as schema
from torch import Tensor
from tqdm import tqdm

from contrastive_diffusion import metrics, schedules, solvers
from contrastive_diffusion.data.toys import dino
from contrastive_diffusion.denoisers import Counted, noised
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._branches import branch_recipes, made_before, spent, train_branches
from contrastive_diffusion.experiments._dino_page import ARMS, BRANCHES, KERNEL_SCALE, SAMPLERS, THEIRS
from contrastive_diffusion.experiments._dino_page import blocks as show
from contrastive_diffusion.experiments._look import Look, dino_map
from contrastive_diffusion.metrics import Score, average
from contrastive_diffusion.parallel import Paradigms, Parallel
from contrastive_diffusion.recipes import STRICT, Loss, Net, Train
from contrastive_diffusion.runs import Run, Task, named_denoiser, work
from contrastive_diffusion.sampling import Round, Sequential
from contrastive_diffusion.training import Training, stream

LEVELS = (8.0, 6.0, 4.0, 0.0)  # log-SNRs at which the denoisers are examined
OFFSETS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0)  # how much noisier than claimed the points are, nats


@schema(config=STRICT, frozen=True)
class Config:
    """Plain against contrastive training on Dino."""

    out: str = "runs/dino"
    """The run folder; the same command continues it."""
    net: Net = Field(default_factory=Net)
    base: Training = Field(default_factory=lambda: Training(steps=5000))
    """Training of the common start."""
    branch: Training = Field(default_factory=lambda: Training(steps=2000, lr=1e-3, seed=1))
    """Training of the contrastive branch; the plain one gets the steps that make the evaluations equal."""
    loss: Loss = Field(default_factory=lambda: Loss(contrastive=0.1))
    """Objective of the contrastive branch."""
    samples: int = Field(default=2000, ge=6)
    """Samples per branch and sampler, split evenly over the seeds."""
    seeds: int = Field(default=3, ge=2)
    """Sampling seeds."""
    steps: int = Field(default=1000, ge=2)
    """DDPM steps."""
    tolerance: float = Field(default=0.1, ge=0)
    """Of the parallel sampler."""
    bandwidth: float = Field(default=0.03**0.5, gt=0)
    """MMD kernel std; sqrt(0.03) is what the paper's code uses."""
    threshold: float = Field(default=0.002 / KERNEL_SCALE, gt=0)
    """MMD that counts as converged: the paper's 0.002 without its kernel's factor."""
    jobs: int = Field(default=2, ge=1)
    """Processes, one thread each."""


def run(config: Config) -> Path:
    """Trains, samples, measures; returns the run folder with results.json and arrays."""
    main = Run.open(config.out, config)
    count = [config.samples // config.seeds + (i < config.samples % config.seeds) for i in range(config.seeds)]
    branches = branch_recipes(config, "dino", ARMS)
    tasks: list[Task] = []
    train_branches(branches, config.jobs, [(_sequential, (config, "dino", seed, n)) for seed, n in enumerate(count)])
    for seed, n in enumerate(count):
        tasks += [(_parallel, (config, sampler, branches[name].out, seed, n)) for name in BRANCHES for sampler in SAMPLERS]
        tasks += [(_sequential, (config, branches[name].out, seed, n)) for name in ARMS]
    work(tasks, config.jobs)
    arrays: dict[str, Tensor] = {"truth": _reference()[: config.samples]}
    for name, curve in THEIRS.items():
        arrays[f"theirs.{name}"], arrays[f"theirs.{name}.rounds"] = torch.tensor(curve) / KERNEL_SCALE, torch.arange(1, len(curve) + 1)
    rows = {name: {"sequential": _measure_sequential(config, main, name, arrays)} for name in (*ARMS, "dino")}
    for name in BRANCHES:
        rows[name] |= {sampler: _measure_parallel(config, main, sampler, name, count, arrays) for sampler in SAMPLERS}
    errors = _errors(branches, arrays)
    scan = _scan(arrays)
    evals = spent(branches)
    results = {"branches": rows, "denoiser error": errors, "bandwidth scan": scan, "denoiser evaluations": evals}
    blocks = show(config, rows, errors, evals, scan, float(_grid(config)[-2]), arrays)
    main.write_results({"experiment": "dino", "title": "Dino: plain against contrastive", "numbers": page.numbers(results), "blocks": blocks}, arrays)
    return main.path


def _label(sampler: str, name: str, seed: int) -> str:
    return f"{sampler}-{Path(name).name}-{seed}"


def _reference() -> Tensor:
    return dino().sample(4000, stream(0, "reference"))


def _grid(config: Config) -> Tensor:
    return schedules.grid(schedules.ddpm(), config.steps)


def _sequential(config: Config, name: str, seed: int, n: int, position: int) -> None:
    """Samples of one seed, step by step; kept with the state before the last step, which is a draw of the law at the grid's last finite level."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        denoiser, shape = named_denoiser(name)
        with tqdm(total=config.steps, desc=_label("sequential", name, seed), position=position, mininterval=5, leave=False) as bar:
            before: list[Tensor] = []

            def watch(seen: Round) -> None:
                bar.update()
                if seen.number == config.steps - 1:
                    before.append(seen.states[0])

            drawn = Sequential(solvers.ddpm())(denoiser, _grid(config), (n, *shape), seed, watch=watch)
        return {"x": drawn.x, "before": before[0]}, {"evals": drawn.evals, "rounds": drawn.rounds, "seconds": drawn.seconds}

    Run(Path(config.out)).part(_label("sequential", name, seed), make)


def _parallel(config: Config, kind: str, name: str, seed: int, n: int, position: int) -> None:
    """Samples of one seed over the whole grid at once, with the quality of the current sample after every round; of the first seed also what happened in it."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        denoiser, item = named_denoiser(name)
        shape, counted = (n, *item), Counted(denoiser)
        look = Look(_grid(config), shape)
        grid, law, distance = _grid(config), dino(), metrics.MMD(_reference(), config.bandwidth)
        curves: dict[str, list[float]] = {"mmd": [], "log_density": [], "evals": []}
        shown: dict[str, Tensor] = {}
        with tqdm(total=config.steps, desc=_label(kind, name, seed), position=position, mininterval=5, leave=False) as bar:

            def watch(seen: Round) -> None:
                bar.update(seen.begin - bar.n)
                curves["mmd"].append(distance(seen.states[-1]).mean)
                shown["before"] = _before_last(seen, shown.get("before"))
                curves["log_density"].append(_log_density(law, grid, shown["before"]))
                curves["evals"].append(float(counted.rows))
                look.see(seen)
                if seen.number in (20, 25):
                    shown[f"round{seen.number}"] = seen.states[-1].clone()

            if kind == "parallel":
                drawn = Paradigms(solvers.ddpm(), None, config.tolerance)(counted, grid, shape, seed, path=True, watch=watch)
            else:
                sampler = Parallel(solvers.ddpm(), window="all", tolerance=config.tolerance)
                drawn = sampler(counted, grid, shape, seed, path=True, watch=watch, trace=look.trace if seed == 0 else None)
        assert drawn.path is not None
        shown["before"] = drawn.path[-2]
        curves["log_density"][-1] = _log_density(law, grid, drawn.path[-2])
        tensors = {"x": drawn.x, **{k: v.contiguous() for k, v in shown.items()}} | {
            k: torch.tensor(v, dtype=torch.float64) for k, v in curves.items()
        }
        tensors |= look.arrays("look") | dino_map(denoiser) if seed == 0 else {}
        return tensors, {"evals": drawn.evals, "rounds": drawn.rounds, "seconds": drawn.seconds}

    Run(Path(config.out)).part(_label(kind, name, seed), make)


def _before_last(seen: Round, known: Tensor | None) -> Tensor:
    """The states before the last step; of samples that are done, whose window is their last state alone, those ``known`` of the round before."""
    if len(seen.states) == 1:
        assert known is not None
        return known
    done = (seen.states[-2] == seen.states[-1]).all(1, keepdim=True)
    return seen.states[-2].clone() if known is None else torch.where(done, known, seen.states[-2])


def _log_density(law: Any, grid: Tensor, before: Tensor) -> float:
    return metrics.log_density(lambda z: law.log_prob(z, grid[-2]), before).mean


def _scores(config: Config, parts: list[tuple[dict[str, Tensor], dict[str, Any]]]) -> dict[str, Any]:
    """Columns of Table 1 that both samplers have, over sampling seeds."""
    law, truth, level = dino(), _reference(), float(_grid(config)[-2])
    density = lambda z: law.log_prob(z, level)  # noqa: E731
    before = noised(truth, level, stream(0, "reference at the last level"))
    distance = metrics.MMD(truth, config.bandwidth)
    return {
        "samples": sum(len(tensors["x"]) for tensors, _ in parts),
        "rounds": average([float(meta["rounds"]) for _, meta in parts]),
        "evals per sample": average([meta["evals"] / len(tensors["x"]) for tensors, meta in parts]),
        "seconds": average([meta["seconds"] for _, meta in parts]),
        "mmd": average([distance(tensors["x"]).mean for tensors, _ in parts]),
        "mmd of all": distance(torch.cat([tensors["x"] for tensors, _ in parts])),
        "log density": average([metrics.log_density(density, tensors["before"]).mean for tensors, _ in parts]),
        "log density of truth": metrics.log_density(density, before),
        "off support": average([metrics.off_support(density, tensors["before"], before).mean for tensors, _ in parts]),
    }


def _parts(config: Config, main: Run, sampler: str, name: str) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    return [main.part(_label(sampler, name, seed), made_before) for seed in range(config.seeds)]


def _measure_sequential(config: Config, main: Run, name: str, arrays: dict[str, Tensor]) -> dict[str, Any]:
    parts = _parts(config, main, "sequential", name)
    arrays[f"{name}.sequential"] = torch.cat([tensors["x"] for tensors, _ in parts])
    return _scores(config, parts)


def _measure_parallel(config: Config, main: Run, kind: str, branch: str, count: list[int], arrays: dict[str, Tensor]) -> dict[str, Any]:
    """Table 1's columns, the curves over rounds, and what happened in them."""
    parallel, name = _parts(config, main, kind, branch), branch if kind == "parallel" else f"{branch}.{kind}"
    arrays[f"{branch}.{kind}"] = torch.cat([tensors["x"] for tensors, _ in parallel])
    arrays |= {f"{name}.{key}": value for key, value in parallel[0][0].items() if key.startswith("look.") or key in ("axis", "map", "inside")}
    for key in ("round20", "round25"):
        found = [tensors[key] for tensors, _ in parallel if key in tensors]
        if len(found) == len(parallel):
            arrays[f"{name}.{key}"] = torch.cat(found)
    for key in ("mmd", "log_density", "evals"):
        longest = max(len(tensors[key]) for tensors, _ in parallel)
        # A seed that has converged stays where it is.
        curves = torch.stack([torch.cat([tensors[key], tensors[key][-1:].expand(longest - len(tensors[key]))]) for tensors, _ in parallel])
        arrays[f"{name}.{key}"], arrays[f"{name}.{key}.err"] = curves.mean(0), curves.std(0) / len(parallel) ** 0.5
        arrays[f"{name}.rounds"] = torch.arange(1, longest + 1)
    reached = [_first(tensors["mmd"], config.threshold) for tensors, _ in parallel]
    cost = [float(tensors["evals"][r - 1]) / n for (tensors, _), r, n in zip(parallel, reached, count, strict=True) if r]
    apart = (arrays[f"{branch}.{kind}"] - arrays[f"{branch}.sequential"]).square().sum(1).sqrt()
    return _scores(config, parallel) | {
        "rounds to threshold": average([float(r) for r in reached if r]) if any(reached) else None,
        "seeds that reached it": sum(r is not None for r in reached),
        "evals per sample to threshold": average(cost) if cost else None,
        "inefficiency": average([meta["evals"] / n / config.steps for (_, meta), n in zip(parallel, count, strict=True)]),
        "largest distance to the sequential sample": float(apart.max()),
    }


def _first(curve: Tensor, threshold: float) -> int | None:
    below = (curve <= threshold).nonzero()
    return int(below[0]) + 1 if len(below) else None


def _errors(branches: dict[str, Train], arrays: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Exact denoiser error at log-SNR a on points of log-SNR a - d, the same points for both branches, with the paired change."""
    law, denoisers = dino(), {name: named_denoiser(branches[name].out)[0] for name in ARMS}
    x = law.sample(4000, stream(0, "points of the denoiser error"))
    table: dict[str, dict[str, Any]] = {}
    for level in LEVELS:
        for offset in OFFSETS:
            z = noised(x, level - offset, stream(0, f"noise of the denoiser error {offset}"))
            each = {name: _row_errors(denoiser, law, z, level) for name, denoiser in denoisers.items()}
            table[f"{level:g};{offset:g}"] = {name: average(v) for name, v in each.items()} | {"ratio": _ratio(each["contrastive"], each["plain"])}
        for name in ARMS:
            scores = [table[f"{level:g};{offset:g}"][name] for offset in OFFSETS]
            arrays[f"error.{level:g}.{name}"] = torch.tensor([s.mean for s in scores])
            arrays[f"error.{level:g}.{name}.err"] = torch.tensor([s.stderr for s in scores])
    arrays["offsets"] = torch.tensor(OFFSETS)
    return table


def _ratio(above: Tensor, below: Tensor) -> Score:
    """Ratio of means of paired values (n,), with its standard error by linearisation."""
    ratio = float(above.mean() / below.mean())
    return Score(ratio, average((above - ratio * below) / below.mean()).stderr)


def _row_errors(denoiser: Any, law: Any, z: Tensor, level: float) -> Tensor:
    with torch.no_grad():
        levels = torch.full((len(z),), level)
        return (denoiser(z, levels) - law(z, levels)).square().sum(1).double()


def _scan(arrays: dict[str, Tensor]) -> dict[str, Any]:
    """Fig. 8: MMD between data and N(0, I) against the bandwidth; the paper keeps the largest."""
    widths = torch.logspace(-2, 0.7, 28, dtype=torch.float64)
    data, gauss = _reference()[:2000], torch.randn(2000, 2, generator=stream(0, "gauss"))
    scores = metrics.bandwidth_scan(data, gauss, widths.tolist())
    arrays["scan.bandwidth"] = widths
    arrays["scan.mmd"], arrays["scan.err"] = torch.tensor([s.mean for s in scores]), torch.tensor([s.stderr for s in scores])
    best = int(arrays["scan.mmd"].argmax())
    return {"bandwidth": float(widths[best]), "mmd": scores[best]}
