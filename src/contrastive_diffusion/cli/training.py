"""``cdl train`` and ``cdl finetune``."""

import os
from pathlib import Path
from typing import Any

from contrastive_diffusion.cli._command import Command, Parsed, take
from contrastive_diffusion.errors import require


def _train_options(args: list[str]) -> Parsed:
    from contrastive_diffusion.recipes import Train, recipe

    name, args = take(args)
    return Parsed(Train, args, "train", recipe(Train, name, "train-"))


def _finetune_options(args: list[str]) -> Parsed:
    import dataclasses

    from contrastive_diffusion.recipes import Train, recipe

    source, args = take(args)
    if source is None:
        return Parsed(Train, args, "finetune SOURCE [RECIPE]", Train())
    name, args = take(args)
    default = recipe(Train, name, "finetune-") if name else _as_trained(Path(source))
    out = "runs/finetuned" if default.out == Train.out else default.out
    return Parsed(Train, args, f"finetune {source}", dataclasses.replace(default, init=source, out=out))


def _as_trained(source: Path) -> Any:
    """The recipe a run was trained with, to be changed by options; the defaults for a model folder, with a network for images."""
    import json

    import yaml

    from contrastive_diffusion.recipes import Loss, Net, Train, validate

    if not (source / "recipe.yaml").is_file():
        require((source / "config.json").is_file(), f"{source}", "a run folder, or a model folder of cdl convert")
        ho = json.loads((source / "config.json").read_text()).get("net", {}).get("kind") == "ddpm"
        return Train(net=Net(kind="ddpm" if ho else "ddpm++"), loss=Loss(denoising="ddpm" if ho else "edm"))
    return validate(Train, yaml.safe_load((source / "recipe.yaml").read_text()) | {"out": "runs/finetuned", "init": None}, str(source))


def _act_train(config: Any) -> None:
    from contrastive_diffusion.runs import fit
    from contrastive_diffusion.training.processes import leave

    fit(config)
    leave()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"trained: {config.out}\nnext: cdl sample {config.out} --parallel")


def _act_finetune(config: Any) -> None:
    require(config.init, "no source", "a run folder, or a model folder of cdl convert", "try cdl finetune runs/base --loss.contrastive 0.1")
    _act_train(config)


TRAIN = Command("Train a denoiser, or resume: cdl train [RECIPE].", _train_options, _act_train, resumes=True)
FINETUNE = Command("Train on from a run or a converted checkpoint: cdl finetune SOURCE [RECIPE].", _finetune_options, _act_finetune, resumes=True)
