"""Where images lie: arrays in memory or mapped, CIFAR-10's archives, zips and folders of image files with or without ``dataset.json``.

A source gives image i as bytes (C, H, W) and, if it has them, labels. Image files are read when they are asked for, so a source is
cheap to open and may be larger than memory; a broken one is told by its name.
"""

import hashlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from contrastive_diffusion.errors import UsageError, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")


class Source(Protocol):
    """Images by index; ``labels`` (N,) integers or (N, L) floats, or None. ``levels``: the byte that stands for 1, half of which is 0."""

    labels: np.ndarray | None
    levels: float

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def read(self, index: int) -> np.ndarray:
        """(C, H, W) uint8. Raises ``UsageError`` with the image's name."""
        ...

    def content_hash(self) -> str: ...


@dataclass
class Array:
    """Images (N, C, H, W) uint8 in memory or memory-mapped."""

    images: np.ndarray
    labels: np.ndarray | None
    where: str
    levels: float = 255.0

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index} of {self.where}"

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def content_hash(self) -> str:
        digest = hashlib.sha256(str((self.images.shape, self.levels)).encode())
        for start in range(0, len(self.images), 1024):
            digest.update(self.images[start : start + 1024].tobytes())
        return _with_labels(digest, self.labels)


class Files:
    """Image files of a folder (or ``only`` one of them) or an uncompressed or compressed zip, sorted by name."""

    levels = 255.0

    def __init__(self, root: Path, only: str | None = None):
        self.root, self.zipped = root, root.is_file()
        self._open: dict[int, zipfile.ZipFile] = {}  # one handle for each process
        inside = [only] if only else (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
        listed = self._zip().namelist() if self.zipped else list(inside)
        self.files = sorted(n for n in listed if n.lower().endswith(SUFFIXES))
        require(self.files, f"{root} without image files", f"files ending in {', '.join(SUFFIXES)}")
        self.labels = self._labels("dataset.json" in listed)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return f"{self.root}/{self.files[index]}"

    def read(self, index: int) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(self._bytes(self.files[index]))) as image:
                image = image if image.mode in ("L", "RGB") else image.convert("RGB" if len(image.getbands()) > 2 or image.mode == "P" else "L")
                pixels = np.asarray(image)
        except (OSError, UnidentifiedImageError, zipfile.BadZipFile, ValueError, SyntaxError, KeyError) as error:
            raise UsageError(f"given {self.name(index)}, expected a whole image: {' '.join(str(error).split())[:120]}") from error
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.encode())
            digest.update(str(self._zip().getinfo(file).CRC).encode() if self.zipped else hashlib.sha256(self._bytes(file)).digest())
        return _with_labels(digest, self.labels)

    def _zip(self) -> zipfile.ZipFile:
        if os.getpid() not in self._open:
            try:
                self._open[os.getpid()] = zipfile.ZipFile(self.root)
            except (zipfile.BadZipFile, OSError) as error:
                raise UsageError(f"given {self.root}, expected a whole zip archive: {error}") from error
        return self._open[os.getpid()]

    def _bytes(self, file: str) -> bytes:
        return self._zip().read(file) if self.zipped else (self.root / file).read_bytes()

    def _labels(self, has_json: bool) -> np.ndarray | None:
        """Those of dataset.json, else those of the top-level folders if there is more than one."""
        if not has_json:
            tops = [f.split("/")[0] if "/" in f else "" for f in self.files]
            classes = {top: index for index, top in enumerate(sorted(set(tops)))}
            return np.array([classes[top] for top in tops]) if len(classes) > 1 and "" not in classes else None
        where = f"{self.root}/dataset.json"
        try:
            listed = json.loads(self._bytes("dataset.json")).get("labels")
            if listed is None:
                return None
            labels = {file.replace("\\", "/"): label for file, label in listed}
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f'given {where}, expected {{"labels": [[file, label], ...]}} or null: {error}') from error
        missing = [file for file in self.files if labels.get(file) is None]
        require(not missing, f"{where} without a label for {missing[0] if missing else ''} and {max(len(missing) - 1, 0)} more", "one for each image")
        return check_labels([labels[file] for file in self.files], where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # handles stay with their process


def check_labels(values: Sequence[Any], where: str) -> np.ndarray:
    """Labels as (N,) integers from 0 on, or (N, L) floats."""
    try:
        labels = np.array(values)
    except ValueError as error:
        raise UsageError(f"given {where} with labels of different lengths, expected alike ones") from error
    if labels.ndim == 2 and labels.dtype.kind in "fi":
        require(np.isfinite(labels).all(), f"{where} with labels that are not finite", "finite numbers")
        return labels.astype(np.float32)
    require(labels.ndim == 1 and labels.dtype.kind in "iub", f"{where} with labels such as {values[0]!r}", "integers or vectors")
    wrong = np.flatnonzero((labels < 0) | (labels > 65535))
    require(not len(wrong), f"{where} with label {labels[wrong[0]] if len(wrong) else ''}", "labels in 0 .. 65535")
    return labels.astype(np.int64)


def _with_labels(digest: Any, labels: np.ndarray | None) -> str:
    if labels is not None:
        digest.update(labels.tobytes())
    return digest.hexdigest()


def npz(path: Path) -> Array:
    """A .npz with "images" (or "x", "arr_0") and perhaps "labels" ("y", "arr_1"), or a .npy, mapped; uint8 (N, H, W[, C]) or (N, C, H, W)."""
    try:
        found = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        stored = {"images": found} if isinstance(found, np.ndarray) else dict(found.items())
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise UsageError(f"given {path}, expected numeric arrays: {error}") from error
    images = next((stored[k] for k in ("images", "x", "arr_0") if k in stored), None)
    labels = next((stored[k] for k in ("labels", "y", "arr_1") if k in stored), None)
    if images is None:
        raise UsageError(f"given {path} with arrays {', '.join(stored)}, expected one called images")
    ok = images.dtype == np.uint8 and images.ndim in (3, 4) and len(images)
    require(ok, f"{path} with images of shape {images.shape} and dtype {images.dtype}", "uint8 (N, H, W), (N, H, W, C) or (N, C, H, W)")
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    require(images.shape[1] in (1, 3), f"{path} with images of shape {images.shape[1:]}", "1 or 3 channels")
    if labels is not None:
        require(len(labels) == len(images), f"{path} with {len(labels)} labels for {len(images)} images", "one for each image")
        labels = check_labels(labels.tolist(), str(path))
    return Array(images, labels, str(path))


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """An empty array, which the pickle then fills."""
    return np.ndarray((0,), np.uint8)


class _Numbers(pickle.Unpickler):
    """Reads the batches of CIFAR's Python archive: dictionaries and numpy arrays, no other names."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ("_reconstruct", "ndarray", "dtype") and module.split(".")[0] == "numpy":
            return {"_reconstruct": _reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}[name]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        raise UsageError(f"given the name {module}.{name}, expected only numpy's; nothing was executed")


def _python_batch(raw: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    try:
        batch = _Numbers(io.BytesIO(raw), encoding="latin1").load()
        return np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32), list(batch["labels"])
    except UsageError as error:
        raise UsageError(f"given {where}, expected a batch of CIFAR-10: {error}") from error
    except Exception as error:  # a broken pickle can raise anything
        raise UsageError(f"given {where}, expected a batch of CIFAR-10: {' '.join(str(error).split())[:120]}") from error


def _binary_batch(raw: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    require(raw and len(raw) % 3073 == 0, f"{where} of {len(raw)} bytes", "a multiple of 3073: a label and 32 x 32 x 3 bytes")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].tolist()


def cifar10(path: Path, test: bool = False) -> Array:
    """CIFAR-10 from its Python or binary archive (.tar.gz) or the folder it unpacks to: 50,000 training images in the order of the batches, or the test batch."""
    files = _cifar_files(path)
    names = ["test_batch"] if test else [f"data_batch_{i}" for i in range(1, 6)]
    parts = []
    for name in names:
        raw = files.get(name) or files.get(f"{name}.bin")
        require(raw, f"{path} without {name}", "the whole archive of CIFAR-10")
        assert raw is not None
        reader = _python_batch if name in files else _binary_batch
        parts.append(reader(raw(), f"{path}/{name}"))
    labels = check_labels([label for _, labels in parts for label in labels], str(path))
    require(labels.max() < 10, f"{path} with label {labels.max()}", "labels 0 .. 9")
    return Array(np.concatenate([images for images, _ in parts]), labels, str(path))


def _cifar_files(path: Path) -> dict[str, Callable[[], bytes]]:
    """Base name -> its bytes, for the batches in an archive or folder."""
    if path.is_dir():
        return {p.name: p.read_bytes for p in path.rglob("*_batch*") if p.is_file()}
    try:
        with tarfile.open(path) as tar:
            found = {Path(m.name).name: tar.extractfile(m) for m in tar.getmembers() if m.isfile() and "_batch" in m.name}
            content = {name: file.read() for name, file in found.items() if file is not None}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"given {path}, expected a whole tar archive: {error}") from error
    return {name: (lambda raw=raw: raw) for name, raw in content.items()}


def is_cifar(path: Path) -> bool:
    return path.name.endswith((".tar.gz", ".tar", ".tgz")) or (path.is_dir() and any(path.rglob("data_batch_1*")))


def open_source(path: Path, test: bool = False) -> Source:
    """The source at ``path`` by what it is."""
    require(path.exists(), f"images {path}", "an existing file or folder")
    if is_cifar(path):
        return cifar10(path, test)
    require(not test, f"the test part of {path}", "CIFAR-10, the only source with one", "name another folder or use holdout")
    if path.suffix in (".npz", ".npy"):
        return npz(path)
    if path.is_dir() or path.suffix == ".zip":
        return Files(path)
    if path.suffix.lower() in SUFFIXES:
        return Files(path.parent, path.name)
    raise UsageError(f"given images {path}, expected an image, a folder, .zip, .npz, .npy, or CIFAR-10's .tar.gz")
