"""What likelihood ratios say about networks and their samples: noise classifier on real and generated images, nll, memorisation gap.

A denoiser implies log p_zeta(x) - log p(x), the optimal classifier of clean against noised images at every zeta (Wu et al. 2024, Eq. 2-3). Its
accuracy and calibration on images it was trained on, held-out and generated ones tell, level by level, where the network is wrong and where
its samples are unlike data; the nll of held-out less that of trained-on images is what it memorised. Networks: those of ``cdl run digits``, or
any run or model folders of images. All sets are put on the data's own grid of grey levels first, so that the grid gives nothing away.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as schema
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm

from contrastive_diffusion.data.images import Images as ImageSet
from contrastive_diffusion.data.images import open_images
from contrastive_diffusion.denoisers import Denoiser, noised
from contrastive_diffusion.errors import require
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._branches import fit_branch, made_before
from contrastive_diffusion.experiments._images import BRANCHES, CHUNK
from contrastive_diffusion.experiments._ratios_page import blocks, summarised
from contrastive_diffusion.experiments._sets import digits_recipes
from contrastive_diffusion.experiments.digits import Config as Digits
from contrastive_diffusion.likelihood import discrete_nll, llr
from contrastive_diffusion.recipes import STRICT, load_images
from contrastive_diffusion.runs import Run, work
from contrastive_diffusion.runs.generate import Request, generate
from contrastive_diffusion.runs.generated import open_generated
from contrastive_diffusion.runs.source import Source, open_source
from contrastive_diffusion.training import stream

KINDS = ("trained on", "held-out", "generated")


@schema(config=STRICT, frozen=True)
class Config:
    """Ratios and likelihoods on images trained on, held out and generated."""

    out: str = "runs/ratios"
    """The run folder; the same command continues it."""
    sources: tuple[str, ...] = ()
    """Run folders or model folders; by default the plain and the contrastive ddpm++ of cdl run digits."""
    data: str = "digits"
    """The images that the networks were trained on."""
    held_out: str | None = None
    """Images that they were not trained on; by default trained.images.holdout of the data."""
    generated: tuple[str, ...] = ()
    """Sets of cdl generate, one for each source; made here by default."""
    trained: Digits = Field(default_factory=Digits)
    """The recipe of the digits networks, and how images are read and split."""
    points: int = Field(default=200, ge=30)
    """Images of each kind."""
    zetas: tuple[float, ...] = (-4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0)
    """Log-SNRs of the noised images."""
    evals: int = Field(default=64, ge=16)
    """Denoiser evaluations of a ratio, and twice as many of an nll."""
    solver: str = "heun"
    """Of the generated images."""
    sample_evals: int = Field(default=35, ge=1)
    """Evaluations a generated image."""
    device: str = "cpu"
    """cpu or cuda."""
    jobs: int = Field(default=2, ge=1)
    """Processes, one thread each."""


def run(config: Config) -> Path:
    """Trains what is missing, generates, measures; returns the run folder."""
    require(not config.generated or len(config.generated) == len(config.sources), f"{len(config.generated)} generated sets", "one for each source")
    require(len(set(config.zetas)) == len(config.zetas) > 0, f"zetas {config.zetas}", "different log-SNRs")
    main, sources = Run.open(config.out, config), _sources(config)
    _split(config)
    work([(_measure, (config, name, path, kind)) for name, path in sources.items() for kind in KINDS], config.jobs)
    parts = {name: {kind: main.part(_slug(name, kind), made_before)[0] for kind in KINDS} for name in sources}
    numbers = {name: {kind: summarised(found[kind], config.zetas) for kind in KINDS} for name, found in parts.items()}
    arrays: dict[str, Tensor] = {"zetas": torch.tensor(config.zetas, dtype=torch.float64)}
    shown = blocks(config, parts, numbers, arrays)
    title = "What likelihood ratios say: real, held-out and generated images"
    main.write_results({"experiment": "ratios", "title": title, "numbers": page.numbers(numbers), "blocks": shown}, arrays)
    return main.path


def _sources(config: Config) -> dict[str, str]:
    """Name -> folder of each network."""
    if config.sources:
        names = [Path(path).name for path in config.sources]
        return dict(zip(names if len(set(names)) == len(names) else config.sources, config.sources, strict=True))
    require(config.data == "digits", f"--data {config.data} without --sources", "the networks that were trained on it")
    recipes = digits_recipes(config.trained, "ddpm++")
    fit_branch(recipes["base"])
    work([(fit_branch, (recipes[branch],)) for branch in BRANCHES], config.jobs)
    return {branch: recipes[branch].out for branch in BRANCHES}


def _slug(name: str, kind: str) -> str:
    return f"{name.replace('/', '-')}-{kind.replace(' ', '-')}"


def _split(config: Config) -> tuple[ImageSet, ImageSet]:
    """The images trained on, and held out."""
    kept, held = load_images(config.data, config.trained.images)
    if config.held_out is not None:
        held = open_images(config.held_out, resolution=kept.shape[1], channels=1 if kept.shape[0] == 1 else 3, labels=config.trained.images.labels)
    else:
        for path in config.sources:
            todo = "name images that it has not seen as --held-out"
            require(
                _held_by(path) == (config.data, len(held)), f"{path}, which may have been trained on all of {config.data}", "held-out images", todo
            )
    for found, what in ((kept, config.data), (held, config.held_out or f"those held out of {config.data}")):
        require(len(found) >= config.points, f"{len(found)} images, {what}", f"at least {config.points}, the points", "lower --points")
    return kept, held


def _held_by(path: str) -> tuple[str, int] | None:
    """The data of a run and how many images it held out; None of what is no run."""
    file = Path(path) / "recipe.yaml"
    recipe = Run(Path(path)).recipe() if file.is_file() else {}
    return (recipe["data"], recipe["images"]["holdout"]) if {"data", "images"} <= recipe.keys() else None


def _images(config: Config, name: str, path: str, kind: str, position: int) -> tuple[Tensor, Tensor | None]:
    """Images (n, C, H, W) on the data's grid and their labels."""
    kept, held = _split(config)
    if kind != "generated":
        images = kept if kind == "trained on" else held
        return images.rows(torch.arange(config.points) * (len(images) // config.points))
    if config.generated:
        made = open_generated(config.generated[config.sources.index(path)])
    else:
        out = str(Path(config.out) / "sets" / name.replace("/", "-"))
        made = generate(
            Request(path, out, config.points, config.solver, evals=config.sample_evals, device=config.device), position, f"generate {name}"
        )
    assert made is not None
    require(len(made) >= config.points, f"{made.path} of {len(made)} samples", f"at least {config.points}, the points", "lower --points")
    classes = [one_hot(shard.labels, open_source(path).label_dim).float() for shard in made.shards() if shard.labels is not None]
    return on_grid(made.all(config.points), kept.source.levels), torch.cat(classes)[: config.points] if classes else None


def on_grid(x: Tensor, levels: float) -> Tensor:
    """x in [-1, 1] at the nearest of ``levels`` + 1 even grey levels."""
    return ((x.clamp(-1, 1) + 1) * (levels / 2)).round().mul_(2 / levels).sub_(1)


def _measure(config: Config, name: str, path: str, kind: str, position: int) -> None:
    """Ratios (n, zetas) of clean and of noised images, and the nll (n,) in bits per dimension."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        source = open_source(path, device=config.device)
        x, labels = _images(config, name, path, kind, position)
        require(tuple(x.shape[1:]) == source.shape, f"images {tuple(x.shape[1:])} for {path}", f"{source.shape}", "name the data it was trained on")
        denoiser = _denoiser(source, labels, config.device)
        levels = int(_split(config)[0].source.levels) + 1
        found = classified(denoiser, x.to(config.device), config.zetas, config.evals, f"{name}, {kind}", position)
        nll = discrete_nll(denoiser, x.to(config.device), 2 * config.evals, stream(0, "ratios nll"), levels=levels, max_rows=CHUNK)
        bits = nll.mean.double().cpu() / (x[0].numel() * torch.log(torch.tensor(2.0)).item())
        return found | {"bits": bits, "shown": x[:64].contiguous()}, {}

    with torch.no_grad():
        Run(Path(config.out)).part(_slug(name, kind), make)


def _denoiser(source: Source, labels: Tensor | None, device: str) -> Denoiser:
    todo = "set trained.images.labels"
    require(not source.label_dim or labels is not None, f"images without labels for {source.name}", "the classes it was trained on", todo)
    return source.denoiser(labels.to(device) if source.label_dim and labels is not None else None)


def classified(denoiser: Denoiser, x: Tensor, zetas: tuple[float, ...], evals: int, label: str = "ratios", position: int = 0) -> dict[str, Tensor]:
    """Ratios log p_zeta - log p (n, zetas) of x (n, *S) "clean", and "noised" to each zeta; the same noise whatever the denoiser."""
    clean, dirty = [], []
    ratio: Callable[[Tensor, float, str], Tensor] = lambda v, zeta, what: (  # noqa: E731
        llr(denoiser, v, zeta, evals, stream(0, f"ratios {what} {zeta}"), max_rows=CHUNK).mean.double().cpu()
    )
    for zeta in tqdm(zetas, desc=f"measure {label}", position=position, leave=False, mininterval=5):
        clean.append(ratio(x, zeta, "clean"))
        dirty.append(ratio(noised(x, zeta, stream(0, f"ratios noise {zeta}")), zeta, "noised"))
    return {"clean": torch.stack(clean, 1), "noised": torch.stack(dirty, 1)}
