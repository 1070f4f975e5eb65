"""Image networks fine-tuned plain and contrastive at equal evaluations, then measured and sampled: what digits and patches share."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from contrastive_diffusion import metrics, schedules, solvers
from contrastive_diffusion.denoisers import noised
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._branches import at_equal_evals, fit_branch, made_before, settled, spent
from contrastive_diffusion.likelihood import llr, mse_curve, nll
from contrastive_diffusion.metrics import Score, average
from contrastive_diffusion.parallel import Parallel
from contrastive_diffusion.recipes import Images, Loss, Net, Train, load_images
from contrastive_diffusion.runs import Run, named_denoiser, work
from contrastive_diffusion.sampling import Sequential
from contrastive_diffusion.training import Training, stream

BRANCHES = ("plain", "contrastive")
LEVELS = torch.linspace(-8, 9, 18, dtype=torch.float64)
ZETAS = (-2.0, 0.0, 2.0, 4.0, 6.0, 8.0)
CHUNK = 1024  # rows per call: larger ones leave the cache

Denoising = Literal["ddpm", "uniform", "edm", "likelihood"]
Nets = Mapping[str, tuple[Net, Denoising]]


class Study(Protocol):
    """The fields of an experiment's recipe that describe it."""

    @property
    def out(self) -> str: ...
    @property
    def images(self) -> Images: ...
    @property
    def base(self) -> Training: ...
    @property
    def branch(self) -> Training: ...
    @property
    def loss(self) -> Loss: ...
    @property
    def rows(self) -> int: ...
    @property
    def evals(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def seeds(self) -> int: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def device(self) -> str: ...
    @property
    def jobs(self) -> int: ...


def recipes_of(config: Study, data: str, name: str, net: Net, denoising: Denoising) -> dict[str, Train]:
    """Recipes of "base", "plain" and "contrastive" of one network; the branches spend the same evaluations after the common base."""
    plain = Loss(denoising=denoising)
    losses = {"plain": plain, "contrastive": dataclasses.replace(config.loss, denoising=denoising)}
    start = f"{config.out}/{name}-base"
    common: dict[str, Any] = {"data": data, "net": net, "images": config.images, "device": config.device, "checkpoint_every": 200}
    recipes = {"base": Train(out=start, loss=plain, training=settled(config.base), **common)}
    for branch in BRANCHES:
        training = settled(at_equal_evals(config.branch, losses["contrastive"], losses[branch]))
        recipes[branch] = Train(out=f"{config.out}/{name}-{branch}", init=start, loss=losses[branch], training=training, **common)
    return recipes


def study(config: Study, experiment: str, title: str, data: str, nets: Nets) -> Path:
    """Trains, measures and samples every network; writes the results and returns the run folder."""
    main = Run.open(config.out, config)
    recipes = {name: recipes_of(config, data, name, *net) for name, net in nets.items()}
    work([(fit_branch, (r["base"],)) for r in recipes.values()], config.jobs)
    work([(fit_branch, (r[branch],)) for r in recipes.values() for branch in BRANCHES], config.jobs)
    arms = [(name, branch) for name in nets for branch in BRANCHES]
    tasks = [(measure, (config, data, recipes[name][branch].out)) for name, branch in arms]
    work(tasks + [(draw, (config, recipes[name][branch].out, seed)) for name, branch in arms for seed in range(config.seeds)], config.jobs)
    kept, held = load_images(data, config.images)
    real, other = kept.all(2000)[0], held.all()[0]
    distance = metrics.MMD(real, bandwidth := _median(real))
    arrays: dict[str, Tensor] = {"levels": LEVELS, "zetas": torch.tensor(ZETAS), "real": other[:64]}
    rows = {f"{name}, {branch}": _row(config, main, f"{name}-{branch}", distance, arrays) for name, branch in arms}
    control = {"mmd of held-out images": distance(other), "bandwidth": bandwidth}
    evals = {name: spent(r) for name, r in recipes.items()}
    changes = {name: _change(main, name) for name in nets}
    numbers = {"rows": rows, "contrastive less plain, paired": changes, "denoiser evaluations": evals, **control}
    blocks = _blocks(config, rows, changes, evals, control, list(nets))
    main.write_results({"experiment": experiment, "title": title, "numbers": page.numbers(numbers), "blocks": blocks}, arrays)
    return main.path


def measure(config: Study, data: str, path: str, position: int) -> None:
    """Errors over log-SNR, nll and ratio accuracy of one branch on held-out images; the same noise for every branch."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        denoiser = _denoiser(path, config.device)
        x = load_images(data, config.images)[1].all(config.rows)[0].to(config.device)
        dim = x[0].numel()
        found = {"errors": mse_curve(denoiser, x, LEVELS, 8 * len(LEVELS), stream(0, "errors")).mean / dim}
        found["nll"] = nll(denoiser, x, config.evals, stream(0, "nll"), max_rows=CHUNK).mean / dim
        noisy = torch.arange(len(x), device=x.device) % 2 == 1
        right = []
        for zeta in tqdm(ZETAS, desc=f"measure {Path(path).name}", position=position, leave=False, mininterval=5):
            mixed = torch.where(noisy.reshape(-1, 1, 1, 1), noised(x, zeta, stream(0, f"zeta {zeta}")), x)
            ratio = llr(denoiser, mixed, zeta, config.evals, stream(0, f"ratio {zeta}"), max_rows=CHUNK).mean
            right.append((ratio > 0) == noisy)
        return {k: v.cpu().contiguous() for k, v in found.items()} | {"right": torch.stack(right, 1).float().cpu()}, {}

    with torch.no_grad():
        Run(Path(config.out)).part(f"measure-{Path(path).name}", make)


def draw(config: Study, path: str, seed: int, position: int) -> None:
    """Samples of one seed with the same noise, in sequence and in parallel."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        denoiser, grid = _denoiser(path, config.device), schedules.grid(schedules.ddpm(), config.steps)
        shape, tensors, meta = (config.samples, *named_denoiser(path)[1]), {}, {}
        samplers = {
            "sequential": Sequential(solvers.ddpm()),
            "parallel": Parallel(solvers.ddpm(), window="all", tolerance=config.tolerance, max_rows=CHUNK),
        }
        for kind, sampler in samplers.items():
            with tqdm(total=config.steps, desc=f"{kind} {Path(path).name}-{seed}", position=position, leave=False, mininterval=5) as bar:
                drawn = sampler(denoiser, grid, shape, seed, device=config.device, watch=lambda seen, bar=bar: bar.update(seen.begin - bar.n))
            tensors[kind], meta[kind] = drawn.x.cpu(), {"evals": drawn.evals, "rounds": drawn.rounds, "seconds": drawn.seconds}
        return tensors, meta

    Run(Path(config.out)).part(f"samples-{Path(path).name}-{seed}", make)


def _denoiser(path: str, device: str) -> Any:
    return named_denoiser(path)[0].to(device)  # pyright: ignore[reportAttributeAccessIssue]


def _median(x: Tensor) -> float:
    """Median distance between images, the kernel's bandwidth."""
    flat = x[:500].flatten(1)
    return float(torch.pdist(flat).median())


def _row(config: Study, main: Run, name: str, distance: metrics.MMD, arrays: dict[str, Tensor]) -> dict[str, Any]:
    """The numbers of one branch; its curves go to ``arrays``."""
    found, _ = main.part(f"measure-{name}", made_before)
    errors, right = found["errors"].double(), found["right"].double()
    arrays[f"error.{name}"], arrays[f"error.{name}.err"] = errors.mean(0), errors.std(0) / len(errors) ** 0.5
    arrays[f"accuracy.{name}"], arrays[f"accuracy.{name}.err"] = right.mean(0), right.std(0) / len(right) ** 0.5
    parts = [main.part(f"samples-{name}-{seed}", made_before) for seed in range(config.seeds)]
    row: dict[str, Any] = {"nll": average(found["nll"]), "accuracy": average(right.mean(1))}
    for kind in ("sequential", "parallel"):
        arrays[f"{kind}.{name}"] = parts[0][0][kind][:64]
        row[kind] = {
            "mmd": average([distance(tensors[kind]).mean for tensors, _ in parts]),
            "rounds": average([float(meta[kind]["rounds"]) for _, meta in parts]),
            "evals per sample": average([meta[kind]["evals"] / config.samples for _, meta in parts]),
            "seconds": average([meta[kind]["seconds"] for _, meta in parts]),
        }
    return row


def _change(main: Run, net: str) -> dict[str, Score]:
    """Contrastive less plain on the same images and noise."""
    plain, other = (main.part(f"measure-{net}-{branch}", made_before)[0] for branch in BRANCHES)
    return {
        "nll": average(other["nll"].double() - plain["nll"].double()),
        "accuracy": average(other["right"].double().mean(1) - plain["right"].double().mean(1)),
    }


def _blocks(
    config: Study,
    rows: dict[str, Any],
    changes: dict[str, dict[str, Score]],
    evals: dict[str, dict[str, int]],
    control: dict[str, Any],
    nets: list[str],
) -> list[page.Block]:
    names = [f"{net}-{branch}" for net in nets for branch in BRANCHES]
    columns = [
        "",
        "nll, nats per dimension",
        "ratio accuracy, %",
        "MMD² × 1000, sequential",
        "MMD² × 1000, parallel",
        "rounds, parallel",
        "evals per sample, parallel",
    ]
    body = [
        [label, r["nll"], page.cell(r["accuracy"], 100), page.cell(r["sequential"]["mmd"], 1e3), page.cell(r["parallel"]["mmd"], 1e3), r["parallel"]["rounds"], r["parallel"]["evals per sample"]]
        for label, r in rows.items()
    ]  # fmt: skip
    body.append(["held-out images", None, None, page.cell(control["mmd of held-out images"], 1e3), None, None, None])
    shown = [
        (label, f"{kind}.{name}") for name in names for label, kind in ((f"{name}, sequential", "sequential"), (f"{name}, parallel", "parallel"))
    ]
    return [
        page.text(_verdict(rows, changes, evals, nets), "One training seed for each branch: differences between two trainings of the same branch are not in the errors."),
        page.table(
            "Plain and contrastive fine-tuning at equal evaluations", columns, body,
            f"nll and ratio accuracy (zeta of {', '.join(f'{z:g}' for z in ZETAS)}; data against noised data, half of each; chance is 50 %) over {config.rows} held-out images, "
            f"{config.evals} evaluations each, ± standard error over images. Samples: DDPM, {config.steps} steps, {config.samples} for each of {config.seeds} seeds, ± standard error over "
            f"seeds; MMD in pixels with a Gaussian kernel of std {control['bandwidth']:.2f} (the median distance) to training images. Parallel: the whole grid as window, tolerance {config.tolerance:g}.",
        ),
        page.lines(
            "Denoising error over log-SNR", "log-SNR, nats", "squared error of eps-hat per dimension",
            [page.series(name, "levels", f"error.{name}", f"error.{name}.err") for name in names], "On held-out images; bands: one standard error over images.",
        ),
        page.lines(
            "Ratio accuracy", "zeta, nats", "share told right", [page.series(name, "zetas", f"accuracy.{name}", f"accuracy.{name}.err") for name in names],
            "How often the sign of the likelihood ratio tells an image from one noised to zeta.", levels={"chance": 0.5},
        ),
        page.images("Samples", [*shown, ("held-out images", "real")], "The same noise in every panel.", rows=8, columns=8, across=4),
    ]  # fmt: skip


def _verdict(rows: dict[str, Any], changes: dict[str, dict[str, Score]], evals: dict[str, dict[str, int]], nets: list[str]) -> str:
    """What came out, in words that follow the numbers; differences are paired over images."""
    parts = []
    for net in nets:
        plain, other = (rows[f"{net}, {branch}"] for branch in BRANCHES)
        spent_ = ", ".join(f"{n:,} ({name})" for name, n in evals[net].items())
        accuracy, nll_ = changes[net]["accuracy"], changes[net]["nll"]
        parts.append(
            f"{net}: after a common start the branches spent {spent_} evaluations. As a noise classifier the contrastive one is {_word(accuracy, 'more accurate', 'less accurate')} "
            f"({100 * accuracy.mean:+.1f} ± {100 * accuracy.stderr:.1f} points, from {100 * plain['accuracy'].mean:.1f} %), its nll is {_word(nll_, 'higher', 'lower')} "
            f"({nll_.mean:+.3f} ± {nll_.stderr:.3f} nats per dimension), and its parallel sampler took {other['parallel']['rounds'].mean:.0f} rounds against "
            f"{plain['parallel']['rounds'].mean:.0f}."
        )
    return " ".join(parts)


def _word(change: Score, above: str, below: str) -> str:
    """Which way a difference goes, if it is more than two standard errors."""
    return (
        (above if change.mean > 0 else below) if abs(change.mean) > 2 * change.stderr else f"neither {above} nor {below} within two standard errors"
    )
