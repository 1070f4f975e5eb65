"""Images to train on, as float tensors (N, C, H, W) in [-1, 1]: those that come with other packages, and those that lie on a disk.

``digits()`` and ``patches()`` need no download (they need the ``images`` extra). ``open_images`` makes a data set of either, or of a
folder, zip or archive (``archives``): every image of one size and channel count, bytes b as b / 127.5 - 1, labels one-hot.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from contrastive_diffusion.data.archives import Array, Source, open_source
from contrastive_diffusion.errors import UsageError, require

PHOTOS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket", "stereo_motorcycle")  # of scikit-image
SIDE = 512  # longest side of a photograph before it is cut up


def digits() -> Tensor:
    """The 1,797 handwritten digits of scikit-learn (UCI, Alpaydin & Kaynak 1998), (1797, 1, 8, 8) float32 in [-1, 1], grey levels in eighths."""
    return torch.from_numpy(_digits().images[:, None] / 8 - 1).float()


def digit_labels() -> Tensor:
    """What the digits show, (1797,) int64 in 0 .. 9."""
    return torch.from_numpy(_digits().target).long()


def patches(size: int = 32, stride: int = 16) -> Tensor:
    """Square patches of the ten photographs of scikit-learn and scikit-image, at most 512 pixels wide, every ``stride`` pixels: (N, 3, size, size) uint8."""
    require(size >= 1 and stride >= 1, f"size {size}, stride {stride}", "both >= 1")
    found = []
    for photo in _photos():
        height, width = photo.shape[:2]
        scale = min(1.0, SIDE / max(height, width))
        shrunk = Image.fromarray(photo[..., :3]).resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        image = torch.from_numpy(np.array(shrunk)).permute(2, 0, 1)
        tiles = image.unfold(1, size, stride).unfold(2, size, stride)  # (3, rows, columns, size, size)
        found.append(tiles.permute(1, 2, 0, 3, 4).flatten(0, 1))
    return torch.cat(found).contiguous()


def _digits() -> Any:
    return _extra(lambda: __import__("sklearn.datasets", fromlist=["x"]), "scikit-learn").load_digits()


def _photos() -> list[np.ndarray]:
    """The photographs, (H, W, 3) uint8."""
    photos = list(_extra(lambda: __import__("sklearn.datasets", fromlist=["x"]), "scikit-learn").load_sample_images().images)
    data = _extra(lambda: __import__("skimage.data", fromlist=["x"]), "scikit-image")
    return photos + [getattr(data, name)()[0] if name.startswith("stereo") else getattr(data, name)() for name in PHOTOS]


def _extra(load: Callable[[], Any], package: str) -> Any:
    try:
        return load()
    except ImportError as error:
        raise UsageError(f"given no {package}, expected it for these images; pip install 'contrastive-diffusion[images]'") from error


# Sources that come with other packages.
BUNDLED: dict[str, Callable[[], Source]] = {
    "digits": lambda: Array(_digits().images[:, None].astype(np.uint8), _digits().target, "digits", levels=16.0),
    "patches": lambda: Array(patches().numpy(), None, "patches"),
}


def is_images(name: str) -> bool:
    """Whether ``name`` can be opened as images: a bundled set, or a path to something else than a vector array."""
    return name in BUNDLED or (not name.endswith((".csv", ".txt", ".npy")) and Path(name).exists())


@dataclass
class Images:
    """A data set of images.

    Args:
        source: where they come from. shape: (C, H, W) of every image. label_dim: length of a label, 0 for none.
        resize: crop the centre square and resample it (Lanczos, with antialiasing) if an image has another size; else that is an error.
        corrupt: "stop" at a broken image, or "skip" it, with a warning, and take the next whole one.
        index: which images of the source, in order.
    """

    source: Source
    shape: tuple[int, int, int]
    label_dim: int
    resize: bool
    corrupt: Literal["stop", "skip"]
    index: np.ndarray

    def __post_init__(self):
        self.skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images ``index`` (n,) of the set and their labels: (n, C, H, W) in [-1, 1] and (n, label_dim) or None."""
        found = [self._read(int(i)) for i in index]
        x = torch.from_numpy(np.stack([image for image, _ in found])).float().mul_(2 / self.source.levels).sub_(1)
        return x, self.labels(torch.tensor([at for _, at in found]))

    def labels(self, at: Tensor) -> Tensor | None:
        """Labels of images ``at`` of the source, one-hot where they are classes."""
        if not self.label_dim or self.source.labels is None:
            return None
        labels = torch.from_numpy(self.source.labels[at.numpy()])
        return labels if labels.dim() == 2 else torch.nn.functional.one_hot(labels, self.label_dim).float()

    def all(self, most: int = 2**20) -> tuple[Tensor, Tensor | None]:
        """The first ``most`` images."""
        return self.rows(torch.arange(min(len(self), most)))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` images drawn with replacement."""
        return self.rows(torch.randint(len(self), (n,), generator=generator))[0]

    def split(self, holdout: int, seed: int = 0) -> tuple["Images", "Images"]:
        """The set without ``holdout`` images, and those images; which ones depends on ``seed`` and the size of the set only."""
        require(0 <= holdout < len(self), f"holdout {holdout} of {len(self)} images", "less than the whole set")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).numpy()
        kept, held = np.sort(order[holdout:]), np.sort(order[:holdout])
        return tuple(Images(self.source, self.shape, self.label_dim, self.resize, self.corrupt, self.index[part]) for part in (kept, held))  # pyright: ignore

    def _read(self, i: int) -> tuple[np.ndarray, int]:
        """Image i of the set, or the next whole one, and its place in the source."""
        for step in range(len(self)):
            at = int(self.index[(i + step) % len(self)])
            try:
                return fit_to(self.source.read(at), self.shape, self.resize, self.source.name(at)), at
            except UsageError as error:
                if self.corrupt == "stop":
                    raise UsageError(f"{error}; repair it, or set images.corrupt to skip") from error
                if at not in self.skipped:
                    self.skipped.add(at)
                    warnings.warn(f"skipped: {error}", stacklevel=2)
        raise UsageError(f"given {len(self)} images, expected at least one that can be read")


def fit_to(image: np.ndarray, shape: tuple[int, int, int], resize: bool, name: str) -> np.ndarray:
    """``image`` (C, H, W) uint8 in the shape of the set; raises ``UsageError`` with its ``name``."""
    if image.shape[1:] != shape[1:]:
        given, expected = f"{name} of {image.shape[2]} x {image.shape[1]} pixels", f"{shape[2]} x {shape[1]}"
        require(resize, given, expected, "set images.resolution to resize")
        image = _resized(image, shape[1])
    if image.shape[0] != shape[0]:
        given = f"{name} with {image.shape[0]} channels"
        require(shape[0] == 3 and image.shape[0] == 1, given, f"{shape[0]}", "set images.channels to 1 only for grey images")
        image = np.repeat(image, 3, 0)
    return image


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    """The centre square, resampled."""
    height, width = image.shape[1:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = image[:, top : top + short, left : left + short]
    picture = Image.fromarray(square[0] if len(square) == 1 else square.transpose(1, 2, 0))
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def open_images(
    name: str, *, resolution: int | None = None, channels: int | None = None, labels: bool = False, corrupt: Literal["stop", "skip"] = "stop", test: bool = False
) -> Images:  # fmt: skip
    """The data set called ``name``: digits, patches, or a path.

    Args:
        resolution: of square images, made by cropping and resizing; that of the first image, which all must have, by default.
        channels: 1 or 3; the first image's by default. labels: use the set's labels, which it must have. test: CIFAR-10's test images.
    """
    source = BUNDLED[name]() if name in BUNDLED else open_source(Path(name), test)
    first = next((image for image in (_try(source, i, corrupt) for i in range(min(len(source), 100))) if image is not None), None)
    if first is None:
        raise UsageError(f"given {name}, expected a readable image among the first hundred")
    shape = (channels or first.shape[0], resolution or first.shape[1], resolution or first.shape[2])
    require(shape[1] == shape[2], f"{name} with images of {shape[2]} x {shape[1]} pixels", "square ones", "set images.resolution to crop and resize")
    require(shape[0] in (1, 3), f"channels = {shape[0]}", "1 or 3")
    require(
        not labels or source.labels is not None,
        f"{name} without labels",
        "labels",
        "add dataset.json or class folders, or set images.labels to false",
    )
    dim = 0
    if labels and source.labels is not None:
        dim = source.labels.shape[1] if source.labels.ndim == 2 else int(source.labels.max()) + 1
    return Images(source, shape, dim, resolution is not None, corrupt, np.arange(len(source)))


def _try(source: Source, index: int, corrupt: str) -> np.ndarray | None:
    try:
        return source.read(index)
    except UsageError:
        if corrupt == "stop":
            raise
        return None
