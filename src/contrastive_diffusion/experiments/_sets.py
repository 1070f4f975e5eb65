"""Generated sets of a plain and a contrastive network, measured against data: what the tables and figures of images share.

The networks are those of ``cdl run digits`` (trained once, in its folder, whoever comes first), or two checkpoints of the user. Every set is made by
``runs.generate`` in ``sets/``: killed anywhere, continued; sample i of a seed starts from the same noise for both networks and meets the same
noise at every step, in sequence and in parallel, so differences are paired. Both networks are read at the same log-SNRs through the same
adapters, with one posterior variance, no clipping on the way and one conversion to bytes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as schema
from torch import Tensor

from contrastive_diffusion import evaluation
from contrastive_diffusion.errors import require
from contrastive_diffusion.evaluation.references import is_moments
from contrastive_diffusion.evaluation.samples import of_tensor
from contrastive_diffusion.experiments._branches import fit_branch, made_before, spent
from contrastive_diffusion.experiments._images import BRANCHES, recipes_of
from contrastive_diffusion.experiments.digits import Config as Digits
from contrastive_diffusion.recipes import STRICT, Train, load_images
from contrastive_diffusion.runs import Run, work
from contrastive_diffusion.runs.generate import Request, generate
from contrastive_diffusion.runs.generated import Generated, to_floats

SHOWN = 64  # samples of a set that a page can show


@schema(config=STRICT, frozen=True)
class Checkpoints:
    """Two run folders or model folders instead of the digits networks."""

    plain: str | None = None
    """The baseline."""
    contrastive: str | None = None
    """The one fine-tuned with the contrastive loss."""
    name: str = "checkpoints"
    """What they are; a name of the paper's (vp-cifar10, ve-ffhq, ...) puts the paper's numbers beside ours where data, n and measure match."""


@schema(config=STRICT, frozen=True)
class Sets:
    """How sets are made and measured."""

    n: int = Field(default=1000, ge=50)
    """Samples of a set."""
    seeds: int = Field(default=3, ge=2)
    """Sets of each kind, with seeds 0, 1, ..."""
    extractor: str = "digits"
    """Features: digits (the bundled classifier), pixels, or torchscript:FILE, such as Inception's."""
    label: str | None = None
    """Classes, of networks trained on labels: random, balanced, ..."""
    batch: int = Field(default=250, ge=1)
    """Samples drawn at a time."""
    rows: int = Field(default=1024, ge=1)
    """Rows in a call of the network."""
    device: str = "cpu"
    """cpu or cuda."""
    jobs: int = Field(default=2, ge=1)
    """Processes, one thread each."""


class Compared(Protocol):
    """The fields that the recipes of these experiments share."""

    @property
    def out(self) -> str: ...
    @property
    def checkpoints(self) -> Checkpoints: ...
    @property
    def data(self) -> str: ...
    @property
    def trained(self) -> Digits: ...
    @property
    def sets(self) -> Sets: ...


@dataclass(frozen=True)
class Arm:
    """A network: ``net`` is the pair it belongs to, ``branch`` "plain" or "contrastive", ``path`` its folder."""

    net: str
    branch: str
    path: str

    @property
    def key(self) -> str:
        return f"{self.net}-{self.branch}"


@dataclass(frozen=True)
class Point:
    """A way to sample: a key for files, a label for pages, and the options of ``cdl generate``."""

    key: str
    label: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What came out: ``scores[arm.key, point.key]`` is one dictionary of numbers for each seed; ``shown``: the first images of seed 0.

    ``control``: numbers of held-out data against the reference, if there are any; ``title``: what the distance is called; ``evals``: of training.
    """

    arms: list[Arm]
    points: list[Point]
    scores: dict[tuple[str, str], list[dict[str, float]]]
    shown: dict[tuple[str, str], Tensor]
    control: dict[str, float]
    title: str
    data: Tensor
    evals: dict[str, dict[str, int]]

    @property
    def nets(self) -> list[str]:
        return list(dict.fromkeys(arm.net for arm in self.arms))


def measured(config: Compared, main: Run, nets: tuple[str, ...], points: list[Point], scored: bool = True) -> Found:
    """Trains what is missing, makes every set, measures it (unless it is only to be shown)."""
    arms, evals = _arms(config, nets)
    held = _reference(config, main)[1] if scored else None  # before the workers, who then find its features
    work([(_one, (config, arm, point, seed, scored)) for arm in arms for point in points for seed in range(config.sets.seeds)], config.sets.jobs)
    scores, shown = {}, {}
    for arm in arms:
        for point in points:
            parts = [main.part(_name(arm, point, seed), made_before) for seed in range(config.sets.seeds)]
            scores[arm.key, point.key], shown[arm.key, point.key] = [meta for _, meta in parts], parts[0][0]["shown"]
    title = evaluation.extractor(config.sets.extractor).frechet if scored else ""
    return Found(arms, points, scores, shown, held or {}, title, _real(config), evals)


def _arms(config: Compared, nets: tuple[str, ...]) -> tuple[list[Arm], dict[str, dict[str, int]]]:
    """The networks, trained if they are the digits', and what their branches cost."""
    given = config.checkpoints
    if given.plain or given.contrastive:
        paths = {"plain": given.plain, "contrastive": given.contrastive}
        for branch, path in paths.items():
            require(path and Path(path).exists(), f"checkpoints.{branch} {path}", "a run folder or a model folder of cdl convert", "give both")
        require(config.data != "digits", "checkpoints without their data", "--data, the images they were trained on")
        return [Arm(given.name, branch, str(path)) for branch, path in paths.items()], {}
    require(config.data == "digits", f"--data {config.data} without checkpoints", "--checkpoints.plain and --checkpoints.contrastive")
    recipes = {net: digits_recipes(config.trained, net) for net in nets}
    work([(fit_branch, (r["base"],)) for r in recipes.values()], config.sets.jobs)
    work([(fit_branch, (r[branch],)) for r in recipes.values() for branch in BRANCHES], config.sets.jobs)
    return [Arm(net, branch, recipes[net][branch].out) for net in nets for branch in BRANCHES], {net: spent(r) for net, r in recipes.items()}


def digits_recipes(trained: Digits, net: str) -> dict[str, Train]:
    """Those of ``cdl run digits``: "ddpm++" with EDM's loss or "ddpm" with DDPM's."""
    spec, denoising = {"ddpm++": (trained.edm, "edm"), "ddpm": (trained.ddpm, "ddpm")}[net]
    return recipes_of(trained, "digits", net, spec, denoising)  # pyright: ignore[reportArgumentType]


def _name(arm: Arm, point: Point, seed: int) -> str:
    return f"{arm.key}-{point.key}-{seed}"


def _one(config: Compared, arm: Arm, point: Point, seed: int, scored: bool, position: int) -> None:
    """One set: made, measured."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        made = generated(config, arm, point, seed, position)
        found = {"evals": made.manifest["evals_per_sample"], "seconds": made.manifest["seconds"] / len(made)}
        return {"shown": made.all(SHOWN)}, found | (_scores(config, Run(Path(config.out)), made) if scored else {})

    Run(Path(config.out)).part(_name(arm, point, seed), make)


def generated(config: Compared, arm: Arm, point: Point, seed: int, position: int = 0) -> Generated:
    """The set of an arm, a point and a seed, from ``sets/`` or made there."""
    sets, out = config.sets, Path(config.out) / "sets" / _name(arm, point, seed)
    request = Request(arm.path, str(out), sets.n, seed=seed, label=sets.label, batch=sets.batch, rows=sets.rows, device=sets.device, **point.options)
    made = generate(request, position, _name(arm, point, seed))
    assert made is not None
    return made


def _scores(config: Compared, main: Run, made: Generated) -> dict[str, float]:
    """Distances of a set to the data."""
    data = torch.cat([shard.data for shard in made.shards()])
    digest = hashlib.sha256("".join(entry["sha256"] for entry in made.manifest["shards"]).encode()).hexdigest()
    return _distances(config, main, of_tensor(data, made.path.name, digest))


def _distances(config: Compared, main: Run, samples: evaluation.Samples) -> dict[str, float]:
    extractor, folder = evaluation.extractor(config.sets.extractor, config.sets.device), main.path / "features"
    to, names = _reference(config, main)[0], ["frechet"] if is_moments(config.data) else ["frechet", "kid"]
    found, _ = evaluation.evaluate(evaluation.features(samples, extractor, folder), to, extractor, names)
    more = {f"{m.key}, extrapolated": m.unbiased.mean for m in found if m.unbiased}
    return {m.key: m.value for m in found} | more


def _reference(config: Compared, main: Run) -> tuple[evaluation.Reference, dict[str, float] | None]:
    """What sets are measured against: all of the user's data, or the digits trained on; then the held-out ones tell what to expect of real images."""
    extractor, folder = evaluation.extractor(config.sets.extractor, config.sets.device), main.path / "features"
    if config.data != "digits":
        samples = Path(config.data) if is_moments(config.data) else evaluation.open_samples(config.data)
        return evaluation.reference(samples, extractor, folder), None
    kept, held = (of_tensor(part.all()[0], name) for part, name in zip(load_images("digits", config.trained.images), ("digits", "held"), strict=True))
    to, names = evaluation.reference(kept, extractor, folder), ["frechet", "kid"]
    found, _ = evaluation.evaluate(evaluation.features(held, extractor, folder), to, extractor, names)
    return to, {m.key: m.value for m in found} | {f"{m.key}, extrapolated": m.unbiased.mean for m in found if m.unbiased}


def _real(config: Compared) -> Tensor:
    """A few images of the data, to be shown; none where it is known by its moments."""
    if is_moments(config.data):
        return torch.empty(0)
    if config.data == "digits":
        return load_images("digits", config.trained.images)[1].all(SHOWN)[0]
    samples = evaluation.open_samples(config.data)
    return to_floats(samples.read(0, min(SHOWN, samples.n)))
