"""What is compared: sets of images as bytes, or of vectors, with a hash of their content and what is known of where they come from."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contrastive_diffusion.data.archives import Source
from contrastive_diffusion.data.images import is_images, open_images
from contrastive_diffusion.data.toys import TOYS, toy
from contrastive_diffusion.errors import UsageError, require

DRAWS = 10_000  # of a toy's law, as a reference


@dataclass(frozen=True)
class Samples:
    """Samples by position.

    Args:
        name: what to call them. n: how many. shape: of each: (C, H, W) bytes, or (D,) floats. hash: of their content.
        read: [from, to) -> (to - from, *shape), uint8 images or float32 vectors. origin: what is known of a generated set (solver, seed, ...).
        ids: whether sample i of two sets with equal seeds comes from the same noise.
    """

    name: str
    n: int
    shape: tuple[int, ...]
    hash: str
    read: Callable[[int, int], Tensor]
    origin: dict[str, Any] = field(default_factory=dict)
    ids: bool = False

    @property
    def images(self) -> bool:
        return len(self.shape) == 3

    def first(self, n: int | None) -> "Samples":
        """The first ``n`` samples, None for all. Raises ``UsageError`` if there are fewer."""
        if n is None or n == self.n:
            return self
        require(0 < n <= self.n, f"{n} samples of {self.name}", f"at most the {self.n} that there are", "generate more, or ask for fewer")
        return replace(self, n=n, hash=hashlib.sha256(f"{self.hash} {n}".encode()).hexdigest())


def as_bytes(x: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes floor(127.5 x + 128), clipped: what a saved image has left of them."""
    return (x.float() * 127.5 + 128).clamp_(0, 255).to(torch.uint8)


def of_tensor(x: Tensor, name: str, digest: str | None = None, **origin: Any) -> Samples:
    """Samples in memory: images uint8 or float in [-1, 1] (n, C, H, W), or vectors (n, D)."""
    if x.dim() == 4 and x.is_floating_point():
        _in_range(x, name)
        x, origin = as_bytes(x), {"quantised": "float in [-1, 1] to 8 bits", **origin}
    known = len(x) and (x.dim() == 2 or (x.dim() == 4 and x.dtype == torch.uint8 and x.shape[1] in (1, 3)))
    require(known, f"{name} of shape {tuple(x.shape)} and dtype {x.dtype}", "images (N, 1 or 3, H, W), uint8 or float in [-1, 1], or vectors (N, D)")
    x = x if x.dtype == torch.uint8 and x.dim() == 4 else x.float()
    bad = (~x.flatten(1).isfinite().all(1)).nonzero().flatten() if x.is_floating_point() else []
    require(not len(bad), f"{name} with values that are not finite, first in sample {int(bad[0]) if len(bad) else 0}", "finite ones")
    digest = digest or hashlib.sha256(str(tuple(x.shape)).encode() + x.contiguous().numpy().tobytes()).hexdigest()
    return Samples(name, len(x), tuple(x.shape[1:]), digest, lambda begin, end: x[begin:end], origin)


def _in_range(x: Tensor, name: str) -> None:
    finite = bool(x.isfinite().all())
    require(finite, f"{name} with values that are not finite", "finite images in [-1, 1]")
    # A sampler may overshoot a little, and is clipped as any saved image; bytes as floats are a mistake.
    low, high = float(x.min()), float(x.max())
    require(
        low > -16 and high < 16, f"{name} with values from {low:.3g} to {high:.3g}", "images in [-1, 1], or bytes", "scale bytes by v / 127.5 - 1"
    )


def open_samples(name: str, n: int | None = None) -> Samples:
    """The set called ``name``: a bundled one, a toy's law, or a path to an array, a table, a folder or an archive of images."""
    if name in TOYS:
        x = toy(name).sample(n or DRAWS, torch.Generator().manual_seed(1))
        return of_tensor(x, name, drawn="seed 1 of the law")
    require(is_images(name) or Path(name).exists(), f"{name!r}", f"an existing file or folder, or one of digits, patches, {', '.join(TOYS)}")
    path = Path(name)
    if path.suffix in (".csv", ".txt", ".npy") and name not in ("digits", "patches"):
        array = _array(path)
        if array.ndim == 2 or array.dtype.kind == "f":
            return of_tensor(torch.from_numpy(array), name).first(n)
    images = open_images(name)
    return Samples(name, len(images), images.shape, images.source.content_hash(), _reader(images.source, images.shape)).first(n)


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, delimiter=",", ndmin=2)
    except (ValueError, OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"given {path}, expected a numeric array: {' '.join(str(error).split())[:160]}") from error
    require(
        array.dtype.kind in "fiu" and array.ndim >= 2 and array.size,
        f"{path} of shape {array.shape} and dtype {array.dtype}",
        "numbers (N, D) or images",
    )
    return array.astype(np.float32) if array.dtype.kind == "f" or array.ndim == 2 else array


def _reader(source: Source, shape: tuple[int, ...]) -> Callable[[int, int], Tensor]:
    """Bytes of 255 levels; every image has the size and the channels of the first, or the set is refused by that image's name."""

    def one(index: int) -> np.ndarray:
        image = source.read(index)
        same, kinds = image.shape == shape, {1: "grey", 3: "colour"}
        given = f"{source.name(index)}, {kinds[image.shape[0]]} of {image.shape[2]} x {image.shape[1]} pixels"
        require(same, given, f"{kinds[shape[0]]} of {shape[2]} x {shape[1]} like the first", "a distance over mixed sizes or colours means nothing")
        return image

    def read(begin: int, end: int) -> Tensor:
        x = torch.from_numpy(np.stack([one(i) for i in range(begin, end)]))
        return x if source.levels == 255 else as_bytes(x.float() * (2 / source.levels) - 1)

    return read


def check_alike(sets: Iterable[Samples]) -> None:
    """Raises ``UsageError`` unless all sets hold the same kind of sample."""
    first, *others = sets
    for other in others:
        given = f"samples of shape {other.shape} in {other.name}"
        require(
            other.shape == first.shape, given, f"{first.shape} as in {first.name}", "resize or convert one of them first, and say so with the number"
        )
