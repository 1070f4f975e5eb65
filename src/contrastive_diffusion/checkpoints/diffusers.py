"""Folders of diffusers' ``UNet2DModel`` that are Ho et al.'s network under other names, read and written; diffusers itself is not needed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from contrastive_diffusion.checkpoints.foreign import _sha256, ddpm_net, load_torch
from contrastive_diffusion.errors import UsageError, require
from contrastive_diffusion.files import write_atomic
from contrastive_diffusion.nets.spec import ImageNet
from contrastive_diffusion.schedules import ddpm, ends

# Settings with which UNet2DModel is Ho et al.'s network; the value of a missing key is its default there.
SETTINGS: dict[str, tuple[Any, Any]] = {
    "act_fn": ("silu", "silu"),
    "center_input_sample": (False, False),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "norm_eps": (1e-6, 1e-5),
    "norm_num_groups": (32, 32),
    "time_embedding_type": ("positional", "positional"),
    "resnet_time_scale_shift": ("default", "default"),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
}
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "epsilon"}
OUTER = {"temb.dense.0": "time_embedding.linear_1", "temb.dense.1": "time_embedding.linear_2", "norm_out": "conv_norm_out"}
BLOCK = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
NEW = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def read(folder: Path) -> tuple[dict[str, Tensor], ImageNet, tuple[float, float], dict[str, Any]]:
    """Tensors in our names, the architecture, the trusted log-SNRs and the source of a folder."""
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    config = json.loads((inner / "config.json").read_text())
    _check_config(inner, config)
    _check_schedule(folder)
    path = next((inner / n for n in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin") if (inner / n).is_file()), None)
    if path is None:
        raise UsageError(f"given {inner}, expected a folder with diffusion_pytorch_model.safetensors or .bin")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else load_torch(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"given {path}, expected a whole file ({error}); it is truncated or of another kind") from error
    levels = len(config["block_out_channels"])
    ours = {from_diffusers(name, levels): value for name, value in tensors.items()}
    ours = {k: v[..., None, None] if _is_projection(k) and k.endswith("weight") and v.dim() == 2 else v for k, v in ours.items()}
    net = ddpm_net(str(inner), ours, int(config["sample_size"]))
    return ours, ImageNet(**{**net.__dict__, "dropout": float(config.get("dropout", 0.0))}), ends(ddpm()), {"sha256": _sha256(path)}


def write(folder: str | Path, net: ImageNet, tensors: Mapping[str, Tensor], old_names: bool = False) -> None:
    """A pipeline-less ``UNet2DModel`` folder with its scheduler's config; ``old_names``: those of attention before diffusers 0.15."""
    require(net.kind == "ddpm", f"a network of kind {net.kind!r}", "ddpm, the only one UNet2DModel can express")
    levels = len(net.mult)
    theirs = {to_diffusers(k, levels, OLD if old_names else NEW): v for k, v in tensors.items()}
    theirs = {k: v.flatten(1) if "attentions" in k and v.dim() == 4 else v for k, v in theirs.items()}
    folder = Path(folder)
    write_atomic(folder / "diffusion_pytorch_model.safetensors", serialise({k: v.contiguous() for k, v in theirs.items()}, {"format": "pt"}))
    write_atomic(folder / "config.json", json.dumps(_config(net), indent=1))
    scheduler = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.30.0", "clip_sample": True, "variance_type": "fixed_large", **SCHEDULE}
    write_atomic(folder / "scheduler_config.json", json.dumps(scheduler, indent=1))


def to_diffusers(name: str, levels: int, attention: Mapping[str, str] = NEW) -> str:
    """Our name of a tensor in diffusers' words; ``up`` counts from the coarsest level there."""
    parts = name.split(".")
    end = parts[-1]
    outer = ".".join(parts[:-1])
    if outer in OUTER or parts[0] not in ("down", "up", "mid"):
        return f"{OUTER.get(outer, outer)}.{end}"
    if parts[0] == "mid":
        place, inner = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}[parts[1]], parts[2:-1]
        head = "mid_block"
    else:
        head = f"{parts[0]}_blocks.{parts[1] if parts[0] == 'down' else levels - 1 - int(parts[1])}"
        place, inner = {"block": "resnets", "attn": "attentions"}.get(parts[2], f"{parts[2]}rs.0"), parts[3:-1]
        if parts[2] in ("block", "attn"):
            place, inner = f"{place}.{parts[3]}", parts[4:-1]
    words = attention if "attentions" in place else BLOCK
    return ".".join([head, place, *(words.get(w, w) for w in inner), end])


def from_diffusers(name: str, levels: int) -> str:
    """The inverse of ``to_diffusers``, for both namings of attention."""
    parts = name.split(".")
    end, outer = parts[-1], ".".join(parts[:-1])
    back = {v: k for k, v in OUTER.items()}
    if parts[0] not in ("down_blocks", "up_blocks", "mid_block"):
        return f"{back.get(outer, outer)}.{end}"
    if parts[0] == "mid_block":
        head, rest = ["mid", {"resnets.0": "block_1", "resnets.1": "block_2", "attentions.0": "attn_1"}.get(".".join(parts[1:3]), "?")], parts[3:-1]
    else:
        side = parts[0].removesuffix("_blocks")
        level = parts[1] if side == "down" else str(levels - 1 - int(parts[1]))
        inner = {"resnets": ["block", parts[3]], "attentions": ["attn", parts[3]]}.get(parts[2], [parts[2].removesuffix("rs")])
        head, rest = [side, level, *inner], parts[4:-1]
    words = {v: k for table in (NEW, OLD, BLOCK) for k, v in table.items()}
    joined = ".".join(rest)
    return ".".join([*head, *([words.get(joined, joined)] if joined else []), end])


def _is_projection(name: str) -> bool:
    return any(f".{part}." in name for part in ("q", "k", "v", "proj_out")) and "attn" in name


def _config(net: ImageNet) -> dict[str, Any]:
    at = [net.resolution >> i in net.attention for i in range(len(net.mult))]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.30.0",
        "sample_size": net.resolution,
        "in_channels": net.channels,
        "out_channels": net.channels,
        "block_out_channels": [net.width * m for m in net.mult],
        "layers_per_block": net.blocks,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in at],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(at)],
        "attention_head_dim": None,
        "dropout": net.dropout,
        **{key: value for key, (value, _) in SETTINGS.items()},
    }


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    wrong = [f"{k} = {config.get(k, default)!r}, not {value!r}" for k, (value, default) in SETTINGS.items() if config.get(k, default) != value]
    kinds = {*config.get("down_block_types", ["?"]), *config.get("up_block_types", [])} - {
        "DownBlock2D",
        "AttnDownBlock2D",
        "UpBlock2D",
        "AttnUpBlock2D",
    }
    wrong += [f"block {kind}" for kind in sorted(kinds)]
    heads = config.get("attention_head_dim", 8)
    widths = set(config.get("block_out_channels", []))
    wrong += [] if heads is None or {heads} >= widths else [f"attention_head_dim = {heads}, not null (one head)"]
    todo = "wrap the model itself with denoisers.from_timesteps"
    require(not wrong, f"{folder} with {'; '.join(wrong[:3])}", "the settings of Ho et al.'s network", todo)
    require(isinstance(config.get("sample_size"), int), f"{folder} with sample_size {config.get('sample_size')}", "a square image size")


def _check_schedule(folder: Path) -> None:
    """The scheduler's config, if there is one, must be Ho et al.'s."""
    path = next((p for p in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json") if p.is_file()), None)
    values = json.loads(path.read_text()) if path else {}
    values = {"num_train_timesteps": values.get("timesteps", 1000), **values}
    wrong = [f"{k} = {values[k]!r}, not {v!r}" for k, v in SCHEDULE.items() if k in values and values[k] != v]
    require(
        not wrong,
        f"{path} with {'; '.join(wrong)}",
        "the linear schedule of a thousand steps",
        "wrap the model with denoisers.from_timesteps and its table",
    )
