"""Generated sets on disk: shards of samples and ``manifest.json``, which says what they are and carries the hash of each shard's content.

Images are bytes, b = floor(127.5 x + 128) clipped to 0 .. 255, which stand for b / 127.5 - 1; vectors are float32. Format "npz": files
``shard-NNNNNN.npz`` with ``images`` (n, C, H, W) uint8 or ``x`` (n, D) float32, ``ids`` and, if there are any, ``labels``. Format "png": EDM's layout,
``000000/000123.png`` with a folder for every thousand ids, and ``dataset.json`` with the labels. The hash is of ids, values and labels, not of
the file, so both formats of the same samples have the same one.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from contrastive_diffusion.errors import UsageError, require
from contrastive_diffusion.files import write_atomic

FORMAT, VERSION = "contrastive-diffusion-generated", 1
MANIFEST = "manifest.json"


class Shard(NamedTuple):
    """ids (n,) int64; data (n, C, H, W) uint8 or (n, D) float32; labels (n,) int64 or None."""

    ids: Tensor
    data: Tensor
    labels: Tensor | None

    def sha256(self) -> str:
        """Of the content, whatever file it is in."""
        digest = hashlib.sha256(f"{tuple(self.data.shape)} {self.data.dtype} {self.labels is not None}".encode())
        for part in (self.ids, self.data, *(() if self.labels is None else (self.labels,))):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


def to_bytes(x: Tensor) -> Tensor:
    """Images x in [-1, 1] as uint8; values outside are clipped."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)


def to_floats(data: Tensor) -> Tensor:
    """What bytes stand for, in [-1, 1]; floats as they are."""
    return data.float() / 127.5 - 1 if data.dtype == torch.uint8 else data


@dataclass(frozen=True)
class Generated:
    """A finished set: ``manifest`` says what it is, ``shards()`` gives its samples."""

    path: Path
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return int(self.manifest["n"])

    def shards(self) -> Iterator[Shard]:
        """Shards in the order of ids; one whose content is not what the manifest says is a ``UsageError`` with its name."""
        storage = STORAGE[self.manifest["format"]]
        for entry in self.manifest["shards"]:
            shard, where = storage.read(self.path, entry), self.path / entry["file"]
            found, todo = shard.sha256(), "remove it and run the same cdl generate again"
            given = f"{where} with content {found[:12]}, ids {int(shard.ids[0])} .. {int(shard.ids[-1])}"
            require(found == entry["sha256"], given, f"{entry['sha256'][:12]} of {entry['n']} ids from {entry['first']}, as {MANIFEST} says", todo)
            yield shard

    def all(self, most: int | None = None) -> Tensor:
        """The first ``most`` samples (all by default) as float32, images in [-1, 1]; only the shards that are needed are read."""
        found, count = [], 0
        for shard in self.shards():
            found.append(to_floats(shard.data))
            count += len(shard.ids)
            if most is not None and count >= most:
                break
        return torch.cat(found)[:most]


def open_generated(path: str | Path) -> Generated:
    """The set that ``cdl generate`` left at ``path``. Raises ``UsageError`` if it is none, unfinished, or its manifest does not add up."""
    path = Path(path)
    file = path / MANIFEST
    require(file.is_file(), f"{path} without {MANIFEST}", "a finished set of cdl generate", "run its command again to finish it")
    try:
        manifest = json.loads(file.read_text())
        shards, known = manifest["shards"], (manifest["type"], manifest["version"])
        counted, kind = sum(int(entry["n"]) for entry in shards), str(manifest["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"given {file}, expected a whole manifest of cdl generate: {type(error).__name__} {error}") from error
    require(known == (FORMAT, VERSION), f"{file} of type and version {known}", f"{(FORMAT, VERSION)}")
    require(kind in STORAGE, f"{file} of format {kind!r}", f"one of {', '.join(STORAGE)}")
    require(counted == manifest["n"], f"{file} whose shards hold {counted} samples", f"{manifest['n']}, as it says")
    return Generated(path, manifest)


@dataclass(frozen=True)
class Storage:
    """How shards lie on disk: ``write(folder, number, shard)`` returns the name of its (first) file; ``read(folder, entry of the manifest)``."""

    write: Callable[[Path, int, Shard], str]
    read: Callable[[Path, dict[str, Any]], Shard]
    files: Callable[[dict[str, Any]], list[str]]


def _write_npz(folder: Path, number: int, shard: Shard) -> str:
    arrays = {"images" if shard.data.dtype == torch.uint8 else "x": shard.data.numpy(), "ids": shard.ids.numpy()}
    if shard.labels is not None:
        arrays["labels"] = shard.labels.numpy()
    buffer, name = io.BytesIO(), f"shard-{number:06d}.npz"
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomic(folder / name, buffer.getvalue())
    return name


def _read_npz(folder: Path, entry: dict[str, Any]) -> Shard:
    path = folder / entry["file"]
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            found = {key: torch.from_numpy(stored[key]) for key in stored.files}
        return Shard(found["ids"], found["images"] if "images" in found else found["x"], found.get("labels"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"given {path}, expected a whole shard: {' '.join(str(error).split())[:120]}; remove it and generate again") from error


def image_name(sample: int) -> str:
    """The file of a sample id in EDM's layout."""
    return f"{sample - sample % 1000:06d}/{sample:06d}.png"


def _write_png(folder: Path, number: int, shard: Shard) -> str:
    for sample, image in zip(shard.ids.tolist(), shard.data, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
        write_atomic(folder / image_name(sample), buffer.getvalue())
    return image_name(int(shard.ids[0]))


def _read_png(folder: Path, entry: dict[str, Any]) -> Shard:
    ids, images = range(entry["first"], entry["first"] + entry["n"]), []
    for sample in ids:
        path = folder / image_name(sample)
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise UsageError(f"given {path}, expected a whole image: {' '.join(str(error).split())[:120]}; remove it and generate again") from error
        images.append(torch.from_numpy(pixels.copy() if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()).reshape(-1, *pixels.shape[:2]))
    require(len({image.shape for image in images}) == 1, f"{folder / entry['file']} and those after it with images of different sizes", "one size")
    return Shard(torch.tensor(ids), torch.stack(images), _labels(folder, ids))


def _labels(folder: Path, ids: range) -> Tensor | None:
    """Those of dataset.json."""
    file = folder / "dataset.json"
    if not file.is_file():
        return None
    try:
        known = dict(json.loads(file.read_text())["labels"])
        return torch.tensor([int(known[image_name(i)]) for i in ids])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"given {file}, expected the label of every image: {type(error).__name__} {error}") from error


STORAGE: dict[str, Storage] = {
    "npz": Storage(_write_npz, _read_npz, lambda entry: [entry["file"]]),
    "png": Storage(_write_png, _read_png, lambda entry: [image_name(i) for i in range(entry["first"], entry["first"] + entry["n"])]),
}
