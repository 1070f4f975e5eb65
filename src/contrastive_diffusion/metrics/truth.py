"""Denoisers and samples against an exact truth, which is any callable."""

from collections.abc import Callable

import torch
from torch import Tensor

from contrastive_diffusion.metrics.scores import Score, average


def denoiser_error(
    denoiser: Callable[[Tensor, Tensor], Tensor], truth: Callable[[Tensor, Tensor], Tensor], z: Tensor, logsnr: float, chunk: int = 16384
) -> Score:
    r"""Mean :math:`\|\hat\epsilon-\hat\epsilon_{truth}\|^2` at ``logsnr`` (nats) over points z (B, *S) of any other level."""
    parts = []
    with torch.no_grad():
        for zs in z.split(chunk):
            level = torch.full((len(zs),), logsnr, dtype=z.dtype, device=z.device)
            parts.append((denoiser(zs, level) - truth(zs, level)).square().flatten(1).sum(1))
    return average(torch.cat(parts))


def log_density(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Score:
    """Mean exact log-density (nats) of samples x (B, *S), ``log_prob(x) -> (B,)``."""
    return average(log_prob(x))


def off_support(log_prob: Callable[[Tensor], Tensor], x: Tensor, reference: Tensor, level: float = 0.001) -> Score:
    """Share of samples x less likely than the ``level`` quantile of true samples ``reference``; an exact sampler scores ``level``."""
    threshold = log_prob(reference).double().quantile(level)
    return average((log_prob(x).double() < threshold).double())
