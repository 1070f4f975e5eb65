"""Classifier-free guidance (Ho & Salimans 2022), on an interval of noise levels if wanted (Kynkaanniemi et al. 2024)."""

import math

import torch
from torch import Tensor

from contrastive_diffusion.denoisers import Denoiser, like, take
from contrastive_diffusion.errors import require


def guided(conditional: Denoiser, unconditional: Denoiser, weight: float, interval: tuple[float, float] = (-math.inf, math.inf)) -> Denoiser:
    """``unconditional + weight * (conditional - unconditional)`` where logsnr lies in ``interval`` (nats), ``conditional`` elsewhere.

    ``weight`` 1 is the conditional denoiser, 0 the unconditional one. Each row inside the interval costs two evaluations, one where one of
    the two is not needed. (A sampler counts one: wrap the parts in ``Counted`` to count both.)
    """
    low, high = interval
    require(math.isfinite(weight) and weight >= 0, f"weight = {weight}", "a finite weight >= 0", "1 is no guidance")
    require(low < high, f"interval {interval}", "(low, high) in nats of log-SNR, low < high")

    def denoiser(z: Tensor, logsnr: Tensor) -> Tensor:
        rows = ((logsnr >= low) & (logsnr <= high)).nonzero().squeeze(1)
        if weight == 1 or not len(rows):
            return conditional(z, logsnr)
        if len(rows) == len(z):
            return _mix(conditional, unconditional, weight, z, logsnr)
        return conditional(z, logsnr).index_copy(0, rows, _mix(take(conditional, rows), take(unconditional, rows), weight, z[rows], logsnr[rows]))

    return like(conditional, denoiser, lambda index: guided(take(conditional, index), take(unconditional, index), weight, interval))


def _mix(conditional: Denoiser, unconditional: Denoiser, weight: float, z: Tensor, logsnr: Tensor) -> Tensor:
    free = unconditional(z, logsnr)
    return free if weight == 0 else torch.lerp(free, conditional(z, logsnr), weight)
