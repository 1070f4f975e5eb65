"""Checkpoints: one safetensors file with its JSON in the header, written atomically. Nothing in a file is ever executed."""

import json
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from contrastive_diffusion.errors import UsageError, require
from contrastive_diffusion.files import write_atomic

FORMAT = "contrastive-diffusion"
VERSION = 1


def save(path: Path | str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes ``tensors`` and ``meta`` (JSON values) to ``path``, atomically."""
    header = {"format": FORMAT, "version": str(VERSION), "meta": json.dumps(meta)}
    write_atomic(Path(path), serialise(tensors, metadata=header))


def load(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of ``save``. Raises ``UsageError`` for a missing, truncated or foreign file."""
    path = Path(path)
    require(path.is_file(), f"checkpoint {path}", "an existing file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"given {path}, expected a whole safetensors checkpoint ({error}); it is truncated or of another kind") from error
    ours = header.get("format") == FORMAT and header.get("version") == str(VERSION)
    require(ours, f"{path} of format {header.get('format')!r}, version {header.get('version')!r}", f"format {FORMAT!r}, version '{VERSION}'")
    return tensors, json.loads(header["meta"])
