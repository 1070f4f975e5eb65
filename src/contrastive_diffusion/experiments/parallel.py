"""Slopes of parallel-in-time sampling, on exact and trained denoisers: rounds, evaluations and errors against the sequential sample.

Exact denoisers come first, then networks: the plain and the contrastive branch of the Dino experiment at the budget given here and a small U-Net on digits,
or those of the folders named in ``nets``. Every method gets the same noise; "paradigms" is Picard in lock step with the published rule. The
questions: how much does the slope save, at equal error too, does it still save on trained networks, and does contrastive training change the number of rounds?
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as schema
from torch import Tensor

from contrastive_diffusion import schedules, solvers
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import choose, require
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._branches import branch_recipes, fit_branch, made_before, settled, train_branches
from contrastive_diffusion.experiments._laws import LAWS
from contrastive_diffusion.experiments._look import Look, dino_map
from contrastive_diffusion.experiments._parallel_page import BASELINE, METHODS, SWEPT, Table, blocks
from contrastive_diffusion.parallel import Paradigms, Parallel
from contrastive_diffusion.recipes import STRICT, Loss, Net, Train
from contrastive_diffusion.runs import Run, named_denoiser, work
from contrastive_diffusion.sampling import Round, Sequential
from contrastive_diffusion.training import Training

BRANCHES = ("plain", "contrastive")
PICTURED = ("ring", *BRANCHES, "digits")  # whose first seed is looked at closely
CHUNK = 1024  # rows per call: larger ones leave the cache


@schema(config=STRICT, frozen=True)
class Config:
    """Slopes of parallel-in-time sampling."""

    out: str = "runs/parallel"
    """The run folder; the same command continues it."""
    laws: tuple[str, ...] = tuple(LAWS)
    """Exact denoisers."""
    nets: tuple[str, ...] = ()
    """NAME=FOLDER of trained denoisers, for example plain=runs/dino/plain; plain, contrastive and digits are trained here if they are not named."""
    net: Net = Field(default_factory=Net)
    base: Training = Field(default_factory=lambda: Training(steps=3000))
    """Training of the common start of plain and contrastive."""
    branch: Training = Field(default_factory=lambda: Training(steps=1000, lr=1e-3, seed=1))
    """Training of the contrastive branch; the plain one gets the steps that make the evaluations equal."""
    loss: Loss = Field(default_factory=lambda: Loss(contrastive=0.1))
    """Objective of the contrastive branch."""
    unet: Net = Field(default_factory=lambda: Net(kind="ddpm", width=32, blocks=1, mult=(1, 1), attention=()))
    """Network of the digits."""
    digits: Training = Field(default_factory=lambda: Training(steps=400, batch=128, warmup=50))
    """Its training."""
    steps: int = Field(default=1000, ge=10)
    """DDPM steps."""
    short: int = Field(default=100, ge=10)
    """DDIM steps."""
    windows: tuple[int, ...] = (32, 64, 128)
    """Sliding windows, beside the whole grid."""
    samples: int = Field(default=32, ge=2)
    """Samples of a seed in two dimensions."""
    large: int = Field(default=3, ge=1)
    """Samples of a seed in more: their evaluations cost up to a hundred times as much."""
    seeds: int = Field(default=3, ge=2)
    """Sampling seeds."""
    tolerance: float = Field(default=0.1, gt=0)
    """Of all methods."""
    sweep: tuple[float, ...] = (0.5, 0.03, 1e-3)
    """Further tolerances on networks, for the comparison at equal error. The smallest is also that of the rounds to a given error."""
    jobs: int = Field(default=2, ge=1)
    """Processes, one thread each."""

    def __post_init__(self):
        for law in self.laws:
            choose(law, LAWS, "law")
        require(all(1 <= w <= self.steps for w in self.windows), f"windows {self.windows}", f"1 to the {self.steps} steps")
        given = (*self.sweep, self.tolerance)
        require(
            len(self.sweep) > 0 and 0 < min(self.sweep) < self.tolerance and len(set(given)) == len(given),
            f"sweep = {self.sweep}",
            f"different tolerances > 0 beside {self.tolerance:g}, one of them smaller",
        )
        require(
            all(len(n.partition("=")[2]) and n[0] != "=" for n in self.nets), f"nets = {self.nets}", "NAME=FOLDER, for example plain=runs/dino/plain"
        )


@dataclass(frozen=True)
class Case:
    """One call of each of the ``methods``."""

    solver: str
    steps: int
    window: int | None
    tolerance: float
    methods: tuple[str, ...] = METHODS


def run(config: Config) -> Path:
    """Trains the networks that are missing, samples with every method; returns the run folder."""
    main = Run.open(config.out, config)
    nets = _nets(config)
    sources = {name: name for name in config.laws} | nets
    work([(_sample, (config, name, source, seed)) for name, source in sources.items() for seed in range(config.seeds)], config.jobs)
    parts = {name: [main.part(_label(name, seed), made_before) for seed in range(config.seeds)] for name in sources}
    table = Table(
        [{"denoiser": name, "seed": seed} | row for name, found in parts.items() for seed, (_, meta) in enumerate(found) for row in meta["rows"]]
    )
    arrays = {f"{name}.{key}": value for name in PICTURED if name in parts for key, value in parts[name][0][0].items()}
    numbers, shown = blocks(config, table, list(nets), arrays)
    main.write_results(
        {"experiment": "parallel", "title": "Parallel in time: slopes", "numbers": page.numbers(numbers), "blocks": shown},
        arrays | {"step": torch.arange(config.steps).float()},
    )
    return main.path


def _nets(config: Config) -> dict[str, str]:
    """Name -> run folder of every network, the given ones and those that are trained here."""
    given = dict(n.split("=", 1) for n in config.nets)
    recipes = branch_recipes(config, "dino", [name for name in BRANCHES if name not in given])
    tasks = []
    if "digits" not in given:
        recipe = Train(data="digits", out=f"{config.out}/digits", net=config.unet, training=settled(config.digits), checkpoint_every=200)
        tasks, given = [(fit_branch, (recipe,))], given | {"digits": recipe.out}
    if len(recipes) > 1:
        train_branches(recipes, config.jobs, tasks)
    elif tasks:
        work(tasks, config.jobs)
    return {name: recipes[name].out for name in BRANCHES if name in recipes} | given


def _cases(config: Config, net: bool) -> Iterator[Case]:
    strict = min(config.sweep)
    for window in (*config.windows, None):
        yield Case("ddpm", config.steps, window, config.tolerance)
    yield Case("ddpm", config.steps, None, strict)
    yield Case("ddim", config.short, None, strict)
    if net:
        yield from (Case("ddpm", config.steps, None, t, SWEPT) for t in config.sweep if t > strict)


def _label(name: str, seed: int) -> str:
    return f"samples-{name}-{seed}"


def _sample(config: Config, name: str, source: str, seed: int, position: int) -> None:
    """All methods from the same noise; of the first seed of some denoisers also what happened round by round."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        if name == source:
            maker, item, _ = LAWS[name]
            denoiser = maker()
        else:
            denoiser, item = named_denoiser(source)
        shape, tensors, rows = (config.samples if item == (2,) else config.large, *item), {"none": torch.zeros(1)}, []
        exact: dict[str, Tensor] = {}
        for case in _cases(config, name != source):
            for method in case.methods:
                close = seed == 0 and name in PICTURED and case.tolerance == config.tolerance
                found, drawn = _draw(case, method, denoiser, shape, seed, exact, close)
                rows.append(
                    {"solver": case.solver, "steps": case.steps, "window": case.window, "tolerance": case.tolerance, "method": method} | found
                )
                tensors |= drawn
        if seed == 0 and name in BRANCHES:
            tensors |= dino_map(denoiser)
        return tensors, {"rows": rows}

    Run(Path(config.out)).part(_label(name, seed), make)


def _draw(
    case: Case, method: str, denoiser: Denoiser, shape: tuple[int, ...], seed: int, exact: dict[str, Tensor], close: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One method's numbers, and what happened round by round if it is looked at closely; ``exact`` keeps the sequential samples."""
    grid, solver = schedules.grid(schedules.ddpm(), case.steps), solvers.ddpm() if case.solver == "ddpm" else solvers.ddim()
    if case.solver not in exact:
        exact[case.solver] = Sequential(solver)(denoiser, grid, shape, seed).x
    errors, look = [], Look(grid, shape)

    def watch(seen: Round) -> None:
        errors.append(float(_apart(seen.states[-1], exact[case.solver]).max()))
        look.see(seen)

    if method == BASELINE:
        drawn = Paradigms(solver, case.window, case.tolerance, max_rows=CHUNK)(denoiser, grid, shape, seed, watch=watch)
    else:
        sampler = Parallel(solver, method, case.window or "all", case.tolerance, max_rows=CHUNK)
        drawn = sampler(denoiser, grid, shape, seed, watch=watch, trace=look.trace if close else None)
    each = _apart(drawn.x, exact[case.solver])
    name, spent = f"{method}.{case.window or 'all'}", drawn.evals / shape[0] / case.steps
    numbers = {"rounds": drawn.rounds, "evals": spent, "worst": float(each.max()), "typical": float(each.median()), "to 1e-2": _below(errors)}
    return numbers, look.arrays(name) | {f"{name}.error": torch.tensor(errors)} if close else {}


def _apart(x: Tensor, exact: Tensor) -> Tensor:
    """Root mean square distance of each sample, (B,)."""
    return (x - exact).square().flatten(1).mean(1).sqrt()


def _below(errors: list[float], bound: float = 1e-2) -> int:
    """The first round after which the error stays below ``bound``; one more than there were if it never does."""
    k = len(errors)
    while k and errors[k - 1] <= bound:
        k -= 1
    return k + 1
