"""What each pass of a step sees: rows of data, their labels, and its random stream, all functions of (seed, number of the pass).

Passes are numbered through the whole training, and dealt to processes; so data order and noise are the same for one process and for many,
and a resumed run sees what an uninterrupted one would have seen. A finite set is gone through in epochs, each in its own order.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from contrastive_diffusion.data.augment import augment
from contrastive_diffusion.denoisers import check_data
from contrastive_diffusion.training.config import Training


def stream(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """The random stream of (seed, purpose, index): the same in every process, independent of all others."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, index))


def seed_of(seed: int, purpose: str, index: int = 0) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Data(Protocol):
    """A law to train on: ``sample(n, generator) -> x`` (n, *S). One with ``__len__`` and ``rows(index) -> (x, labels)`` is gone through in epochs."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor: ...


class Rows:
    """A finite data set x (N, *S) as a law: rows drawn uniformly with replacement."""

    def __init__(self, x: Tensor):
        self.x = check_data(x, "data")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.x[torch.randint(len(self.x), (n,), generator=generator)]


@dataclass(frozen=True)
class Batch:
    """Rows x (n, *S), their class labels (n, L) and augmentation labels (n, 9), where there are any."""

    x: Tensor
    class_labels: Tensor | None = None
    augment_labels: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        labels = (v if v is None else v.to(device, non_blocking=True) for v in (self.class_labels, self.augment_labels))
        return Batch(self.x.to(device, non_blocking=True), *labels)


@lru_cache(maxsize=4)
def _epoch(seed: int, size: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=stream(seed, "epoch", epoch))


def order(seed: int, size: int, start: int, count: int) -> Tensor:
    """Which of ``size`` items come at positions ``start`` .. ``start + count`` of an endless sequence of shuffled epochs."""
    positions = range(start, start + count)
    parts, at = [], start
    while at < positions.stop:
        epoch, begin = divmod(at, size)
        end = min(size, begin + positions.stop - at)
        parts.append(_epoch(seed, size, epoch)[begin:end])
        at += end - begin
    return torch.cat(parts)


@dataclass(frozen=True)
class Feed(Dataset):
    """Pass number -> its batch, and the stream that goes on from it.

    Args:
        flip: x-flip every image of a finite set with a fair coin. augment: probability of EDM's pipeline, which has its own flip; 0 for none.
    """

    data: Data
    config: Training
    flip: bool = False
    augment: float = 0.0

    def __getitem__(self, number: int) -> Batch:
        return self.read(number)[0]

    def read(self, number: int) -> tuple[Batch, torch.Generator]:
        seed, rows = self.config.seed, self.config.rows
        generator = stream(seed, "train", number)
        if not hasattr(self.data, "rows"):
            return Batch(self.data.sample(rows, generator)), generator
        data: Any = self.data
        x, labels = data.rows(order(seed, len(data), number * rows, rows))
        changes = stream(seed, "augment", number)
        augment_labels = None
        if self.augment:
            x, augment_labels = augment(x, self.augment, changes)
        elif self.flip:
            x = torch.where(torch.rand(rows, generator=changes).reshape(-1, 1, 1, 1) < 0.5, x.flip(3), x)
        if labels is not None and self.config.label_dropout:
            labels = labels * (torch.rand(rows, 1, generator=changes) >= self.config.label_dropout)
        return Batch(x, labels, augment_labels), generator

    def passes(self, numbers: Sequence[int]) -> Iterator[tuple[Batch, torch.Generator]]:
        """The batches of ``numbers`` in order, read ahead by worker processes where the recipe asks for them."""
        if not self.config.workers or not hasattr(self.data, "rows"):
            yield from (self.read(number) for number in numbers)
            return
        # The loader draws a seed from a generator of its own, so the global stream stays where it is.
        loader = DataLoader(self, batch_size=None, sampler=numbers, num_workers=self.config.workers, prefetch_factor=4, generator=torch.Generator())
        yield from ((batch, stream(self.config.seed, "train", number)) for number, batch in zip(numbers, loader, strict=True))
