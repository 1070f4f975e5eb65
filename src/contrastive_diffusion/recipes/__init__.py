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
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from contrastive_diffusion.data.images import Images as ImageSet
from contrastive_diffusion.data.images import is_images, open_images
from contrastive_diffusion.data.toys import TOYS, toy
from contrastive_diffusion.errors import UsageError, choose, require
from contrastive_diffusion.recipes.schema import STRICT, Images, Loss, Net, Train, Watch
from contrastive_diffusion.training import Data, Rows

__all__ = ["STRICT", "Images", "Loss", "Net", "Train", "Watch", "load_array", "load_data", "load_images", "plain", "recipe", "validate"]
T = TypeVar("T")


def load_images(name: str, options: Images) -> tuple[ImageSet, ImageSet]:
    """The images called ``name``: those to train on and those held out."""
    found = open_images(name, resolution=options.resolution, channels=options.channels, labels=options.labels, corrupt=options.corrupt)
    return found.split(options.holdout)


def load_data(name: str) -> Data:
    """The law called ``name``: a toy, or the rows of a .npy or .csv file."""
    if name.endswith((".npy", ".csv", ".txt")):
        return Rows(load_array(Path(name)))
    require(
        not is_images(name),
        f"data {name!r} for a network of vectors",
        "a toy or a .npy / .csv file",
        "set net.kind to ddpm++, ncsn++ or ddpm for images",
    )
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
