"""Features of a set, taken once and kept by the hash of the set and the id of the extractor, and the statistics of a reference.

Features are kept in parts, each written whole, so that taking them can be interrupted and goes on, and so that a set larger than memory
is read in slices. A reference may also be EDM's .npz with ``mu`` and ``sigma``, of which only the Frechet distance can be had.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contrastive_diffusion import checkpoints, metrics
from contrastive_diffusion.errors import UsageError, require
from contrastive_diffusion.evaluation.extractors import Extractor
from contrastive_diffusion.evaluation.samples import Samples
from contrastive_diffusion.evaluation.torchscript import file_hash

PART = 2048  # rows
MOST = 8192  # dimensions of a covariance: 512 MB


def cache_folder() -> Path:
    """Where features are kept unless told otherwise: $CDL_CACHE, or ~/.cache/contrastive-diffusion."""
    return Path(os.environ.get("CDL_CACHE") or Path.home() / ".cache" / "contrastive-diffusion")


class Features:
    """Rows (n, d) float32 in part files, read when they are sliced."""

    def __init__(self, folder: Path, n: int):
        self.folder, self.n, self._held = folder, n, (-1, torch.empty(0))
        self.d = self._part(0).shape[1]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, part: slice) -> Tensor:
        begin, end, _ = part.indices(self.n)
        pieces = []
        for number in range(begin // PART, -(-end // PART)):
            start = number * PART
            pieces.append(self._part(number)[max(begin - start, 0) : end - start])
        return torch.cat(pieces) if pieces else torch.empty(0, self.d)

    def _part(self, number: int) -> Tensor:
        if self._held[0] != number:
            self._held = number, checkpoints.load(self.folder / f"part-{number:05}.safetensors")[0]["features"]
        return self._held[1]


def features(
    samples: Samples, extractor: Extractor, folder: Path, batch: int = 250, watch: Callable[[int], None] | None = None
) -> Features:  # fmt: skip
    """Features of all samples in order, from ``folder`` where they were taken before. ``watch`` is called with the number done."""
    key = hashlib.sha256(f"{samples.hash} {samples.n} {extractor.id}".encode()).hexdigest()[:20]
    folder = folder / f"features-{key}"
    for number, start in enumerate(range(0, samples.n, PART)):
        path, end = folder / f"part-{number:05}.safetensors", min(start + PART, samples.n)
        if not path.exists():
            rows = [extractor(samples.read(at, min(at + batch, end))) for at in range(start, end, batch)]
            checkpoints.save(path, {"features": torch.cat(rows)}, {"extractor": extractor.id, "samples": samples.hash, "n": samples.n})
        if watch:
            watch(end)
    return Features(folder, samples.n)


@dataclass(frozen=True)
class Reference:
    """What sets are compared with: a name, a hash, n (None where it is not known), and features or the two moments or both."""

    name: str
    hash: str
    n: int | None
    d: int
    features: Features | None
    mean: Tensor | None
    cov: Tensor | None
    samples: Samples | None = None

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "hash": self.hash, "n": self.n}


def reference(
    samples: Samples | Path, extractor: Extractor, folder: Path, batch: int = 250, watch: Callable[[int], None] | None = None
) -> Reference:  # fmt: skip
    """The reference of a set of real samples, or of an .npz with moments."""
    if isinstance(samples, Path):
        return _moments_file(samples)
    found = features(samples, extractor, folder, batch, watch)
    path = found.folder / "moments.safetensors"
    if found.d > MOST or found.n < 2:
        return Reference(samples.name, samples.hash, samples.n, found.d, found, None, None, samples)
    if not path.exists():
        whole = metrics.moments(found)
        checkpoints.save(path, {"mean": whole.mean, "cov": whole.cov}, {"n": whole.n})
    stored = checkpoints.load(path)[0]
    return Reference(samples.name, samples.hash, samples.n, found.d, found, stored["mean"], stored["cov"], samples)


def is_moments(name: str) -> bool:
    """Whether the file called ``name`` holds ``mu`` and ``sigma``, the reference files of EDM."""
    if not name.endswith(".npz") or not Path(name).is_file():
        return False
    try:
        with np.load(name, allow_pickle=False) as stored:
            return {"mu", "sigma"} <= set(stored.files)
    except (ValueError, OSError, zipfile.BadZipFile):
        return False


def _moments_file(path: Path) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as stored:
            mean, cov = (torch.from_numpy(np.asarray(stored[key], np.float64)) for key in ("mu", "sigma"))
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"given reference {path}, expected arrays mu (d,) and sigma (d, d): {error}") from error
    shapes = f"reference {path} with mu {tuple(mean.shape)} and sigma {tuple(cov.shape)}"
    require(mean.dim() == 1 and cov.shape == (len(mean), len(mean)), shapes, "mu (d,) and sigma (d, d)")
    finite = bool(mean.isfinite().all() and cov.isfinite().all())
    symmetric = finite and bool((cov - cov.T).abs().max() <= 1e-6 * cov.abs().max())
    require(symmetric, f"reference {path} with a sigma that is not finite and symmetric", "a covariance")
    return Reference(str(path), file_hash(path), None, len(mean), None, mean, (cov + cov.T) / 2)
