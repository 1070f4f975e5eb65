"""Recipes: the schema of a training run, and how its YAML is read.

The constructors are the schema (pydantic, unknown keys forbidden). A recipe file holds differences from the defaults only; bundled ones
lie beside this module.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as schema
from torch import Tensor, nn

from contrastive_diffusion.data.toys import TOYS, toy
from contrastive_diffusion.denoisers import Bounded
from contrastive_diffusion.errors import UsageError, choose, require
from contrastive_diffusion.nets import NETS
from contrastive_diffusion.objectives import Contrastive, Denoising, Likelihood, Objective, Weighted
from contrastive_diffusion.schedules import Schedule, ddpm, ends, logistic, lognormal, uniform
from contrastive_diffusion.training import Data, Rows, Training

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid")


@schema(config=STRICT, frozen=True)
class Net:
    """The network."""

    kind: Literal["mlp", "plain-mlp"] = "mlp"
    """mlp: residual on Fourier features; plain-mlp: the paper's, on raw coordinates."""
    width: int = Field(default=64, ge=1)
    """Hidden units."""
    blocks: int = Field(default=3, ge=1)
    """Residual blocks of two layers."""
    octaves: int = Field(default=6, ge=1)
    """Fourier octaves per coordinate (mlp only)."""

    def build(self, dim: int, seed: int) -> nn.Module:
        """A fresh network for vectors of ``dim``, initialised by ``seed`` without touching the global stream."""
        kwargs = {"octaves": self.octaves} if self.kind == "mlp" else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return NETS[self.kind](dim, self.width, self.blocks, **kwargs)


@schema(config=STRICT, frozen=True)
class Loss:
    """The training objective: a denoising loss, plus the contrastive one with ``contrastive`` as its weight."""

    denoising: Literal["ddpm", "uniform", "edm", "likelihood"] = "ddpm"
    """ddpm: eps error, uniform timestep; uniform: eps error, uniform log-SNR over the same range; edm: EDM's law and weight; likelihood: nll (ITD)."""
    contrastive: float = Field(default=0.0, ge=0)
    """Weight of the contrastive loss; 0 leaves it out."""
    zeta: tuple[float, float] = (-4.0, 10.0)
    """Range of the contrasted log-SNR, uniform."""
    points: int = Field(default=8, ge=4, multiple_of=4)
    """(log-SNR, noise) points per likelihood ratio, a multiple of four."""
    share: float = Field(default=1 / 16, gt=0, le=1)
    """Share of the batch that is contrasted."""

    def law(self) -> Schedule:
        """The law of noise levels of the denoising part."""
        laws = {"ddpm": ddpm, "uniform": lambda: uniform(*ends(ddpm())), "edm": lognormal, "likelihood": logistic}
        return laws[self.denoising]()

    def build(self) -> Objective:
        if self.denoising == "likelihood":
            plain: Objective = Likelihood(self.law())
        else:
            plain = Denoising(self.law(), "edm" if self.denoising == "edm" else "eps")
        if not self.contrastive:
            return plain
        contrast = Contrastive(uniform(*self.zeta), self.points, self.share)
        return Weighted({"denoising": (1.0, plain), "contrastive": (self.contrastive, contrast)})

    def bounded(self, net: nn.Module) -> Bounded:
        """The denoiser of ``net``, trusted on the levels it was trained on and continued beyond them."""
        return Bounded(net, *ends(self.law()))


@schema(config=STRICT, frozen=True)
class Train:
    """Train a denoiser on a toy law, a .npy or .csv array; run again to resume."""

    data: str = "dino"
    """A toy's name, or a .npy / .csv file of shape (N, D)."""
    out: str = "runs/train"
    """The run folder."""
    init: str | None = None
    """A run folder whose averaged weights to start from (fine-tuning)."""
    net: Net = Field(default_factory=Net)
    loss: Loss = Field(default_factory=Loss)
    training: Training = Field(default_factory=Training)
    checkpoint_every: int = Field(default=1000, ge=1)
    """Steps between checkpoints."""


def load_data(name: str) -> Data:
    """The law called ``name``: a toy, or the rows of a .npy or .csv file."""
    if name.endswith((".npy", ".csv", ".txt")):
        return Rows(load_array(Path(name)))
    require(name in TOYS or os.path.sep not in name, f"data {name!r}", "a toy or a .npy / .csv file")
    return toy(name)


def load_array(path: Path) -> Tensor:
    """A float32 batch (N, D) from a .npy or .csv file (a header line is skipped). Nothing in it is executed."""
    require(path.is_file(), f"file {path}", "an existing .npy or .csv file")
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            lines = path.read_text().splitlines()
            header = bool(lines) and any(c.isalpha() for c in lines[0].replace("e", "").replace("nan", "").replace("inf", ""))
            array = np.loadtxt(lines[header:], delimiter=",", ndmin=2) if lines[header:] else np.zeros((0, 1))
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"given {path}, expected a numeric array: {error}") from error
    require(array.ndim >= 2 and array.size, f"{path} of shape {array.shape}", "(N, D) with N >= 1")
    require(array.dtype.kind in "fiu", f"{path} of dtype {array.dtype}", "numbers")
    return torch.from_numpy(np.ascontiguousarray(array)).float()


def recipe(cls: type[T], name: str | None, prefix: str = "") -> T:
    """The recipe called ``name`` as a ``cls``: a YAML file, or a bundled one; None gives the defaults.

    Raises ``UsageError`` for an unknown name (with the nearest ones), an unknown key (with its path and the nearest keys) or a bad value.
    """
    if name is None:
        return cls()
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        require(path.is_file(), f"recipe {name}", "an existing YAML file")
        text = path.read_text()
    else:
        bundled = {
            f.name.removesuffix(".yaml").removeprefix(prefix): f
            for f in files("contrastive_diffusion.recipes").iterdir()
            if f.name.startswith(prefix) and f.name.endswith(".yaml")
        }
        text = bundled[choose(name, bundled, "recipe")].read_text()
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"given recipe {name}, expected YAML: {' '.join(str(error).split())}") from error
    require(isinstance(values, dict), f"recipe {name} holding a {type(values).__name__}", "a mapping of keys to values")
    return validate(cls, values, name)


def validate(cls: type[T], values: dict[str, Any], source: str) -> T:
    """``values`` as a ``cls``, or one line on the first thing wrong with them."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            names = _fields_at(cls, first["loc"][:-1])
            near = difflib.get_close_matches(str(first["loc"][-1]), names, n=3) or names
            raise UsageError(f"given {source} with unknown key {where!r}, expected one of {', '.join(near)}") from None
        raise UsageError(f"given {source} with {where} = {first['input']!r}, expected: {first['msg']}") from None


def _fields_at(cls: Any, path: Iterable[Any]) -> list[str]:
    for part in path:
        cls = next((f.type for f in dataclasses.fields(cls) if f.name == part), cls)
    return [f.name for f in dataclasses.fields(cls)]


def plain(value: Any) -> Any:
    """A recipe as JSON values."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")
