"""Where the denoiser of a two-mode Gaussian is wrong, and where a parallel sampler looks (Fig. 1).

A small network is trained on N(-5, 1) + N(5, 1) with the DDPM loss, then continued in two branches at equal denoiser evaluations, plain
and contrastive. The map shows the squared error of eps-hat against the closed form (App. A.3) over (log-SNR, x), the region of the
forward paths, and the first iterates of the parallel sampler drawn over it.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as schema
from torch import Tensor
from tqdm import tqdm

from contrastive_diffusion import metrics, schedules, solvers
from contrastive_diffusion.data.toys import two_modes
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._branches import branch_recipes, made_before, spent, train_branches
from contrastive_diffusion.metrics import Score, average
from contrastive_diffusion.parallel import Paradigms
from contrastive_diffusion.recipes import STRICT, Loss, Net
from contrastive_diffusion.runs import Run, named_denoiser, work
from contrastive_diffusion.sampling import Round, Sequential
from contrastive_diffusion.training import Training, stream

BRANCHES = ("plain", "contrastive")
SHOWN = (1, 2, 3)  # the iterates that are drawn
MASS = 0.999  # of the forward law that counts as inside


@schema(config=STRICT, frozen=True)
class Config:
    """Error map of the two-mode Gaussian."""

    out: str = "runs/two-modes"
    """The run folder; the same command continues it."""
    net: Net = Field(default_factory=lambda: Net(width=64, blocks=2, octaves=3))
    base: Training = Field(default_factory=lambda: Training(steps=3000, batch=256))
    """Training of the common start."""
    branch: Training = Field(default_factory=lambda: Training(steps=1500, batch=256, lr=1e-3, seed=1))
    """Training of the contrastive branch; the plain one gets the steps that make the evaluations equal."""
    loss: Loss = Field(default_factory=lambda: Loss(contrastive=0.1, zeta=(-6.0, 6.0)))
    """Objective of the contrastive branch."""
    steps: int = Field(default=1000, ge=2)
    """DDPM steps."""
    samples: int = Field(default=300, ge=6)
    """Samples of the parallel sampler per seed."""
    seeds: int = Field(default=3, ge=2)
    """Sampling seeds."""
    jobs: int = Field(default=2, ge=1)
    """Processes, one thread each."""


def run(config: Config) -> Path:
    """Trains, maps the error, samples; returns the run folder."""
    main = Run.open(config.out, config)
    recipes = branch_recipes(config, "two-modes", BRANCHES)
    train_branches(recipes, config.jobs)
    work([(_sample, (config, recipes[name].out, seed)) for seed in range(config.seeds) for name in BRANCHES], config.jobs)
    law, grid = two_modes(), schedules.grid(schedules.ddpm(), config.steps)
    logsnrs, x = grid[:-1][:: _every(config)], torch.linspace(-10, 10, 241, dtype=torch.float64)
    inside, density = _inside(law, logsnrs, x)
    arrays: dict[str, Tensor] = {"logsnr": logsnrs, "x": x, "density": density.T.contiguous(), "inside": inside.T.float().contiguous()}
    numbers: dict[str, Any] = {"denoiser evaluations": spent(recipes)}
    for name in BRANCHES:
        denoiser, _ = named_denoiser(recipes[name].out)
        error = error_map(denoiser, law, logsnrs, x)
        arrays[f"error.{name}"] = error.T.contiguous()
        numbers[name] = {"error inside": float(error[inside].mean()), "error outside": float(error[~inside].mean())}
        parts = [main.part(f"samples-{name}-{seed}", made_before) for seed in range(config.seeds)]
        arrays |= {f"{key}.{name}": v for key, v in parts[0][0].items() if key.startswith("round")}
        numbers[name] |= _scores(parts)
    main.write_results(
        {
            "experiment": "two-modes",
            "title": "Two modes: where the denoiser is wrong",
            "numbers": page.numbers(numbers),
            "blocks": _blocks(config, numbers),
        },
        arrays,
    )
    return main.path


def error_map(denoiser: Denoiser, truth: Denoiser, logsnrs: Tensor, x: Tensor) -> Tensor:
    """Squared error of eps_hat at every (log-SNR, x), (L, X), for scalars x."""
    z, level = x.repeat(len(logsnrs))[:, None].float(), logsnrs.repeat_interleave(len(x)).float()
    with torch.no_grad():
        return (denoiser(z, level) - truth(z, level)).square().sum(1).reshape(len(logsnrs), len(x)).double()


def _inside(law: Any, logsnrs: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest region of x that holds MASS of the forward law at each log-SNR, (L, X) bool; and the density there."""
    z, level = x.repeat(len(logsnrs))[:, None], logsnrs.repeat_interleave(len(x))
    density = law.log_prob(z, level).exp().reshape(len(logsnrs), len(x))
    ranked, order = density.sort(1, descending=True)
    held = ranked.cumsum(1) * (x[1] - x[0]) <= MASS
    return torch.zeros_like(held).scatter(1, order, held), density


def _sample(config: Config, branch: str, seed: int, position: int) -> None:
    """Samples of one seed, both ways; the first Picard iterates of a few of them are kept for the picture."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        denoiser, grid, kept = named_denoiser(branch)[0], schedules.grid(schedules.ddpm(), config.steps), {}
        with tqdm(total=config.steps, desc=f"sample {Path(branch).name}-{seed}", position=position, mininterval=5, leave=False) as bar:

            def watch(seen: Round) -> None:
                bar.update(seen.begin - bar.n)
                if seed == 0 and seen.number in SHOWN:
                    # What left the window stands still: its left end.
                    path = torch.cat([seen.states[:1].expand(seen.begin, *seen.states.shape[1:]), seen.states])[: config.steps]
                    kept[f"round{seen.number}"] = path[:: _every(config), :6, 0].T.contiguous()

            drawn = Paradigms(solvers.ddpm())(denoiser, grid, (config.samples, 1), seed, watch=watch)
        one_by_one = Sequential(solvers.ddpm())(denoiser, grid, (config.samples, 1), seed)
        return {"parallel": drawn.x, "sequential": one_by_one.x, **kept}, {"rounds": drawn.rounds, "evals": drawn.evals}

    Run(Path(config.out)).part(f"samples-{Path(branch).name}-{seed}", make)


def _every(config: Config) -> int:
    """The map shows about 200 levels."""
    return max(1, config.steps // 200)


def _scores(parts: list[tuple[dict[str, Tensor], dict[str, Any]]]) -> dict[str, Score]:
    """Quality over sampling seeds."""
    law, truth = two_modes(), two_modes().sample(4000, stream(0, "reference"))
    return {
        "rounds": average([float(meta["rounds"]) for _, meta in parts]),
        "evals per sample": average([meta["evals"] / len(tensors["parallel"]) for tensors, meta in parts]),
        "mmd": average([metrics.mmd(tensors["parallel"], truth, 1.0).mean for tensors, _ in parts]),
        "sequential mmd": average([metrics.mmd(tensors["sequential"], truth, 1.0).mean for tensors, _ in parts]),
        "log density": average([metrics.log_density(law.log_prob, tensors["parallel"]).mean for tensors, _ in parts]),
    }


def _blocks(config: Config, numbers: dict[str, Any]) -> list[page.Block]:
    plain, contrastive = (numbers[name] for name in BRANCHES)
    change = {where: contrastive[f"error {where}"] / plain[f"error {where}"] - 1 for where in ("inside", "outside")}
    columns = [
        "branch",
        "error inside",
        "error outside",
        "rounds",
        "evals per sample",
        "MMD² × 1000, parallel",
        "MMD² × 1000, sequential",
        "log-density, nats",
    ]
    rows = [
        [
            name,
            v["error inside"],
            v["error outside"],
            v["rounds"],
            v["evals per sample"],
            page.cell(v["mmd"], 1e3),
            page.cell(v["sequential mmd"], 1e3),
            v["log density"],
        ]
        for name, v in ((name, numbers[name]) for name in BRANCHES)
    ]
    evals = numbers["denoiser evaluations"]
    return [
        page.text(
            f"Against the plain branch the contrastive one changes the mean squared error by {change['inside']:+.0%} inside the forward paths and by "
            f"{change['outside']:+.0%} outside them. Both spent {evals['plain']:,} and {evals['contrastive']:,} denoiser evaluations after a common start; one training seed."
        ),
        page.maps(
            "Error of the denoiser (Fig. 1)", "logsnr", "x",
            [
                {"title": name, "values": f"error.{name}", "contour": "inside", "contour_levels": [0.5], "paths": {f"round {k}": f"round{k}.{name}" for k in SHOWN}}
                for name in BRANCHES
            ],
            f"Squared error of eps-hat against the closed form. Green: the region that holds {MASS:.1%} of the forward law at each level. Lines: the trajectories of "
            "six samples after the first Picard rounds, drawn from noise (left) to data (right).",
            xlabel="log-SNR, nats", ylabel="x", colour="squared error",
        ),
        page.table(
            "Error and samples", columns, rows,
            f"Errors: mean over the map's grid, uniform in x over [-10, 10] and in DDPM step. Samples: mean ± standard error over {config.seeds} seeds of {config.samples}; MMD with bandwidth 1.",
        ),
    ]  # fmt: skip
