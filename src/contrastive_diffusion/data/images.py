"""Images that come with other packages, so that everything runs without a download: 8 x 8 digits and 32 x 32 patches of photographs.

Images are float tensors (N, C, H, W) in [-1, 1], bytes b as b / 127.5 - 1. Both need the ``images`` extra.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contrastive_diffusion.errors import UsageError, require

PHOTOS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket", "stereo_motorcycle")  # of scikit-image


def digits() -> Tensor:
    """The 1,797 handwritten digits of scikit-learn (UCI, Alpaydin & Kaynak 1998), (1797, 1, 8, 8) float32 in [-1, 1], grey levels in eighths."""
    return torch.from_numpy(_digits().images[:, None] / 8 - 1).float()


def digit_labels() -> Tensor:
    """What the digits show, (1797,) int64 in 0 .. 9."""
    return torch.from_numpy(_digits().target).long()


def patches(size: int = 32, stride: int = 24) -> Tensor:
    """Square patches of the ten photographs of scikit-learn and scikit-image, on a grid of ``stride`` pixels: (N, 3, size, size) uint8."""
    require(size >= 1 and stride >= 1, f"size {size}, stride {stride}", "both >= 1")
    found = []
    for photo in _photos():
        image = torch.from_numpy(np.array(photo[..., :3])).permute(2, 0, 1)
        tiles = image.unfold(1, size, stride).unfold(2, size, stride)  # (3, rows, columns, size, size)
        found.append(tiles.permute(1, 2, 0, 3, 4).flatten(0, 1))
    return torch.cat(found).contiguous()


def _digits() -> Any:
    return _extra(lambda: __import__("sklearn.datasets", fromlist=["load_digits"]), "scikit-learn").load_digits()


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
