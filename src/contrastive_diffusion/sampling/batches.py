"""What every sampler is, and any of them in batches."""

from typing import Protocol

import torch
from torch import Tensor

from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import require
from contrastive_diffusion.sampling.task import Samples, Watch


class Drawn(Protocol):
    """What every sampler returns: the fields of ``Samples``, with others if it has more to say."""

    @property
    def x(self) -> Tensor: ...
    @property
    def evals(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def seconds(self) -> float: ...


class Sampler(Protocol):
    """``Sequential``, ``Parallel`` and their like."""

    def __call__(
        self, denoiser: Denoiser, grid: Tensor, shape: tuple[int, ...], seed: int = 0, /, *, first: int = 0, device: torch.device | str = "cpu", watch: Watch | None = None
    ) -> Drawn: ...  # fmt: skip


def in_batches(
    sampler: Sampler,
    denoiser: Denoiser,
    grid: Tensor,
    shape: tuple[int, ...],
    seed: int = 0,
    *,
    batch: int = 1000,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
) -> Samples:
    """``shape[0]`` samples, at most ``batch`` at a time: the same ones as all at once. Ctrl-C gives back the batches that are finished, if any:
    then x has fewer rows than were asked for."""
    require(batch >= 1, f"batch = {batch}", "batch >= 1")
    require(shape and shape[0] >= 1, f"shape {tuple(shape)}", "(B, *S) with every size >= 1")
    done: list[Drawn] = []
    try:
        for first in range(0, shape[0], batch):
            size = min(batch, shape[0] - first)
            done.append(sampler(denoiser, grid, (size, *shape[1:]), seed, first=first, device=device, watch=watch))
    except KeyboardInterrupt:
        if not done:
            raise
    return Samples(torch.cat([d.x for d in done]), sum(d.evals for d in done), sum(d.rounds for d in done), sum(d.seconds for d in done))
