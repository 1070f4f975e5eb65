"""``cdl convert`` and ``cdl inspect``."""

from dataclasses import dataclass
from typing import Annotated, Literal

from contrastive_diffusion.cli._command import Command, simple


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint (EDM pickle, DDPM state dict, diffusers folder, run folder) into a model folder; nothing in it is executed."""

    source: Annotated[str, "positional"]
    """The file or folder."""
    out: Annotated[str, "positional"]
    """The model folder to write."""
    weights: Literal["ema", "raw"] | None = None
    """Which weights: for files that do not say, and for runs, which have both (default: ema)."""
    resolution: int | None = None
    """Of the images, where a file does not imply it."""


@dataclass(frozen=True)
class Inspect:
    """Say what a checkpoint is, without loading or executing it."""

    file: Annotated[str, "positional"]
    """The file or folder."""


def _act_convert(options: Convert) -> None:
    from contrastive_diffusion.checkpoints import convert

    card = convert(options.source, options.out, options.weights, options.resolution)
    print(f"{options.out}: {card['net']['kind']}, {card['net']['resolution']} x {card['net']['resolution']}, {card['weights']} weights")
    print(f"licence: {card['licence']}\nnext: cdl sample {options.out}, or cdl finetune {options.out}")


def _act_inspect(options: Inspect) -> None:
    import yaml

    from contrastive_diffusion.checkpoints import inspect

    print(yaml.safe_dump(inspect(options.file), sort_keys=False, width=120).strip())


CONVERT = Command("Turn a foreign checkpoint into a model folder, executing nothing.", simple(Convert, "convert"), _act_convert)
INSPECT = Command("Say what a checkpoint is.", simple(Inspect, "inspect"), _act_inspect)
