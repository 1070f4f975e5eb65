"""Checkpoints of others: what a file is (``inspect``), and its conversion into a model folder (``convert``).

EDM network pickles, DDPM state dicts in the names of pytorch_diffusion, diffusers' ``UNet2DModel`` folders, and our own runs. A file is
known by its content, never by its name.
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from contrastive_diffusion.channel import logsnr_of_sigma
from contrastive_diffusion.checkpoints import pickles
from contrastive_diffusion.checkpoints.store import load
from contrastive_diffusion.errors import UsageError, require
from contrastive_diffusion.nets.spec import FAMILIES, ImageNet
from contrastive_diffusion.schedules import ddpm, ends

CC = "CC BY-NC-SA 4.0 (NVIDIA, EDM): non-commercial, share alike; whatever is fine-tuned from these weights inherits it"
UNKNOWN = "not stated in the file: that of its source"
# MD5 of the two CIFAR-10 files of pytorch_diffusion, which share their file name.
PUBLISHED = {"1fa350b952534ae442b1d5235cce5cd3": "ema", "82ed3067fd1002f5cf4c339fb80c4669": "raw"}


def convert(source: str | Path, out: str | Path, weights: str | None = None, resolution: int | None = None) -> dict[str, Any]:
    """Writes the model folder ``out`` from the checkpoint ``source`` and returns its card as JSON values.

    Args:
        weights: "ema" or "raw"; for files that do not say, and for our own runs, which hold both (default "ema").
        resolution: of the images, where a file does not imply it.

    Raises:
        UsageError: naming what the file is instead, or the first tensors that differ from its architecture.
    """
    from contrastive_diffusion.checkpoints.model import Card, Model, adopt

    source = Path(source)
    require(source.exists(), f"checkpoint {source}", "an existing file or folder")
    require(weights in (None, "ema", "raw"), f"weights {weights!r}", "ema or raw")
    require(Path(out).resolve() != source.resolve(), f"{out} as source and result", "another folder for the result")
    kind = _kind(source)
    require(kind in READERS, f"{source}, {kind}", f"one of: {', '.join(READERS)}", "cdl inspect says more")
    tensors, net, levels, which, licence, about = READERS[kind](source, weights, resolution)
    card = Card(net, levels, which, licence, {"file": source.name, "kind": kind, **about})
    with torch.device("meta"):
        built = net.build()
    adopt(built, tensors, str(source), assign=True)
    Model(card, built).save_pretrained(out)
    return card.plain()


Reading = tuple[Mapping[str, Tensor], ImageNet, tuple[float, float], str, str, dict[str, Any]]


def _edm(path: Path, weights: str | None, resolution: int | None) -> Reading:
    """An EDM network pickle: a snapshot's "ema", or a bare network."""
    content = pickles.read(path)
    record = content.get("ema") if isinstance(content, dict) else content
    require(isinstance(record, pickles.Record), f"{path} holding a {type(content).__name__} without a network under 'ema'", "an EDM snapshot")
    assert isinstance(record, pickles.Record)
    classes = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
    require(record.class_name in classes, f"{path} of class {record.class_name!r}", f"one of {', '.join(classes)}")
    require(weights != "raw", "weights raw", "ema, the only ones in such a file")
    options = dict(record.state.get("_init_kwargs") or {})
    net = _edm_net(path, options, classes[record.class_name])
    sigma = {"edm": (0.002, 80.0), "vp": (1.0e-3, 152.0), "ve": (0.02, 100.0), "iddpm": (0.0064, 20291.0)}[net.precondition]
    low, high = float(logsnr_of_sigma(sigma[1])), float(logsnr_of_sigma(sigma[0]))
    about = {"sha256": _sha256(path), "class": record.class_name, "source_hash": record.source_hash}
    return dict(pickles.tensors(record)), net, (low, high), "ema", CC, about


def _edm_net(path: Path, options: dict[str, Any], precondition: str) -> ImageNet:
    """The architecture from a preconditioner's constructor arguments, with the defaults of the published code."""
    kind = options.get("model_type", "SongUNet" if precondition in ("vp", "ve") else "DhariwalUNet")
    require(
        kind == "SongUNet", f"{path} with a network of type {kind!r}", "SongUNet (DDPM++ or NCSN++); the ADM network of ImageNet is not supported"
    )
    song = {
        "embedding": options.get("embedding_type", "positional"),
        "channel_mult_noise": int(options.get("channel_mult_noise", 1)),
        "encoder": options.get("encoder_type", "standard"),
        "decoder": options.get("decoder_type", "standard"),
        "taps": tuple(int(v) if float(v).is_integer() else v for v in options.get("resample_filter", (1, 1))),
    }
    family = next((name for name, values in FAMILIES.items() if values == song), None)
    extra = {} if family else song
    if int(options.get("channel_mult_emb", 4)) != 4:
        extra["channel_mult_emb"] = int(options["channel_mult_emb"])
    try:
        return ImageNet(
            kind=family or "ddpm++",
            resolution=int(options["img_resolution"]),
            channels=int(options["img_channels"]),
            label_dim=int(options.get("label_dim", 0)),
            augment_dim=int(options.get("augment_dim", 0)),
            width=int(options.get("model_channels", 128)),
            mult=tuple(int(v) for v in options.get("channel_mult", (1, 2, 2, 2))),
            blocks=int(options.get("num_blocks", 4)),
            attention=tuple(int(v) for v in options.get("attn_resolutions", (16,))),
            dropout=float(options.get("dropout", 0.10)),
            precondition=precondition,
            sigma_data=float(options.get("sigma_data", 0.5)),
            options=extra,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"given {path} with constructor arguments {sorted(options)}, expected those of an EDM network: {error}") from error


def _ddpm(path: Path, weights: str | None, resolution: int | None) -> Reading:
    """A state dict in the names of pytorch_diffusion. The resolution is 32 for CIFAR-10's widths and 256 for LSUN's."""
    tensors = load_torch(path)
    which = PUBLISHED.get(_md5(path), weights)
    require(which is not None, f"{path}, which does not say whether its weights are averaged", "that to be told", "add --weights ema or raw")
    net = ddpm_net(str(path), tensors, resolution)
    return tensors, net, ends(ddpm()), str(which), UNKNOWN, {"sha256": _sha256(path), "md5": _md5(path)}


def ddpm_net(where: str, tensors: Mapping[str, Tensor], resolution: int | None = None) -> ImageNet:
    """The architecture of DDPM tensors, read off their names and shapes."""
    try:
        width, channels = tensors["conv_in.weight"].shape[:2]
        levels = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("down."))
        mult = tuple(len(tensors[f"down.{i}.block.0.conv1.bias"]) // width for i in range(levels))
        blocks = 1 + max(int(k.split(".")[3]) for k in tensors if k.startswith("down.0.block."))
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"given {where}, expected the tensors of a DDPM U-Net: {error}") from error
    known = {(1, 2, 2, 2): 32, (1, 1, 2, 2, 4, 4): 256}
    size = resolution or known.get(mult, 0)
    require(size, f"{where} with widths {mult}, which imply no image size", "a known one", "add --resolution")
    attention = tuple(size >> i for i in range(levels) if f"down.{i}.attn.0.q.weight" in tensors)
    return ImageNet("ddpm", size, channels, width=width, mult=mult, blocks=blocks, attention=attention, dropout=0.1 if size == 32 else 0.0)


def _run(path: Path, weights: str | None, resolution: int | None) -> Reading:
    """A checkpoint of a training run of this package."""
    path = max((path / "checkpoints").glob("step-*.safetensors")) if path.is_dir() else path
    tensors, meta = load(path)
    require("image_net" in meta, f"{path} of a network for vectors", "one for images", "cdl sample and cdl estimate read the run folder itself")
    which = weights or "ema"
    prefix = {"ema": "ema.module.", "raw": "net."}[which]
    net, (low, high) = ImageNet.of(meta["image_net"]), meta["levels"]
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    about = {"sha256": _sha256(path), "step": meta["step"], "recipe": meta["recipe"]}
    return found, net, (low, high), which, str(meta.get("licence", UNKNOWN)), about


def _model(path: Path, weights: str | None, resolution: int | None) -> Reading:
    """A model folder of this package: copied."""
    from contrastive_diffusion.checkpoints.model import load_model

    model = load_model(path)
    card = model.card
    require(weights in (None, card.weights), f"weights {weights}", f"{card.weights}, the only ones of {path}")
    return model.net.state_dict(), card.net, card.levels, card.weights, card.licence, {"from": dict(card.source)}


def _diffusers(path: Path, weights: str | None, resolution: int | None) -> Reading:
    from contrastive_diffusion.checkpoints import diffusers

    tensors, net, levels, about = diffusers.read(path)
    return tensors, net, levels, weights or "unknown", UNKNOWN, about


READERS: dict[str, Callable[[Path, str | None, int | None], Reading]] = {
    "a DDPM state dict (pytorch_diffusion)": _ddpm,
    "a diffusers UNet2DModel folder": _diffusers,
    "a model folder": _model,
    "a training run": _run,
    "an EDM network pickle": _edm,
}


def inspect(path: str | Path) -> dict[str, Any]:
    """What a file or folder is, without loading or executing it: its kind, size, hash, and what its header tells."""
    path = Path(path)
    require(path.exists(), f"checkpoint {path}", "an existing file or folder")
    kind = _kind(path)
    about: dict[str, Any] = {"path": str(path), "kind": kind, "converts": kind in READERS}
    if path.is_file():
        about |= {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    if kind in ("a model folder", "a diffusers UNet2DModel folder"):
        config = json.loads(_config(path).read_text())
        about["config"] = {k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"}
    elif kind.startswith(("a safetensors", "a training run")):
        about |= _header(path)
    elif "pickle" in kind:
        found = pickles.names(path)
        about |= {"names": found, "names that are refused": [n for n in found if n not in {".".join(k) for k in pickles.NAMES}]}
    elif kind == "a DDPM state dict (pytorch_diffusion)":
        about["weights"] = PUBLISHED.get(_md5(path), "unknown file: the published ones are known by MD5")
    return about


def _header(path: Path) -> dict[str, Any]:
    path = max((path / "checkpoints").glob("step-*.safetensors")) if path.is_dir() else path
    with safetensors.safe_open(path, framework="pt") as file:
        shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118 - it is no mapping
        header = file.metadata() or {}
    meta = {k: v for k, v in json.loads(header.get("meta", "{}")).items() if k in ("step", "image_net", "levels", "package")}
    return {"tensors": len(shapes), "numbers": sum(math.prod(s) for s in shapes.values()), **meta}


def _kind(path: Path) -> str:
    if path.is_dir():
        return _folder_kind(path)
    with open(path, "rb") as file:
        head = file.read(16)
    if head[8:9] == b"{":
        return _safetensors_kind(path)
    if zipfile.is_zipfile(path) or _legacy(path):
        return _torch_kind(path)
    if head[:1] == b"\x80":
        found = pickles.names(path)
        return "an EDM network pickle" if "torch_utils.persistence._reconstruct_persistent_obj" in found else "a pickle of something else"
    return "a file of an unknown kind"


def _folder_kind(path: Path) -> str:
    if list((path / "checkpoints").glob("step-*.safetensors")):
        return "a training run"
    config = _config(path)
    if not config.is_file():
        return "a folder without config.json or checkpoints"
    try:
        values = json.loads(config.read_text())
    except ValueError:
        return "a folder with a broken config.json"
    if values.get("_class_name") in ("UNet2DModel", "UNetUnconditionalModel"):
        return "a diffusers UNet2DModel folder"
    return "a model folder" if str(values.get("format", "")).startswith("contrastive-diffusion") else "a folder with a foreign config.json"


def _config(path: Path) -> Path:
    return path / "unet" / "config.json" if (path / "unet" / "config.json").is_file() else path / "config.json"


def _safetensors_kind(path: Path) -> str:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError):
        return "a truncated safetensors file"
    return "a training run" if header.get("format") == "contrastive-diffusion" else "a safetensors file without its config.json (give the folder)"


def _legacy(path: Path) -> bool:
    """torch.save before 1.6: a pickle that opens with its magic number."""
    with open(path, "rb") as file:
        return b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in file.read(32)


def _torch_kind(path: Path) -> str:
    try:
        tensors = load_torch(path)
    except UsageError:
        return "a torch file that holds more than tensors, or is truncated"
    return "a DDPM state dict (pytorch_diffusion)" if "temb.dense.0.weight" in tensors else "a torch file of other tensors"


def load_torch(path: Path) -> dict[str, Tensor]:
    """A state dict saved by torch, by its weights-only loader; memory-mapped where the file allows it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a broken or hostile file can raise anything
        raise UsageError(f"given {path}, expected tensors only ({' '.join(str(error).split())[:160]}); nothing was executed") from error
    ok = isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    require(ok, f"{path} holding a {type(content).__name__} of other things than tensors", "a state dict: names and tensors")
    return content


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
