r"""A denoiser whose mean is what it must be (Pang et al. 2023).

The score has mean zero under its own law: :math:`E_{p_\alpha}[\hat\epsilon]=0`. A network's mean is not, and taking it out lowers the mean
squared error at every level by exactly its square, and the mean negative log-likelihood by half the integral of that.
"""

import torch
from torch import Tensor

from contrastive_diffusion.channel import corrupt
from contrastive_diffusion.combinators.levels import interpolate
from contrastive_diffusion.denoisers import Denoiser, check_data, evaluate, like, take, unit_noise
from contrastive_diffusion.errors import require


def mean_outputs(denoiser: Denoiser, x: Tensor, levels: Tensor, evals: int = 2, generator: torch.Generator | None = None) -> Tensor:
    """Mean of eps_hat over data x (B, *S) at each of L log-SNRs: (L, *S). ``evals`` per row and level, an even number: noises come in pairs
    of opposite sign, which takes out most of the variance."""
    check_data(x)
    require(evals >= 2 and evals % 2 == 0, f"evals = {evals}", "an even number >= 2")
    means = []
    for level in levels.tolist():
        at, total = torch.full((len(x),), level, dtype=torch.float64, device=x.device), torch.zeros_like(x[0])
        for _ in range(evals // 2):
            eps = unit_noise(x.shape, x, generator)
            total += sum(evaluate(denoiser, corrupt(x, at, sign * eps), at).mean(0) for sign in (1, -1))
        means.append(total / evals)
    return torch.stack(means)


def calibrated(denoiser: Denoiser, levels: Tensor, means: Tensor) -> Denoiser:
    """The denoiser less its mean: ``means`` (L, *S) of ``mean_outputs`` at increasing ``levels`` (L,), linear between and constant beyond."""
    levels = levels.double()
    require(
        len(levels) == len(means) and bool((levels.diff() > 0).all()),
        f"{len(levels)} levels and means {tuple(means.shape)}",
        "increasing levels (L,), means (L, *S)",
    )
    flat = means.flatten(1)

    def centred(z: Tensor, logsnr: Tensor) -> Tensor:
        return denoiser(z, logsnr) - interpolate(levels, flat, logsnr).to(z.dtype).reshape(z.shape)

    return like(denoiser, centred, lambda index: calibrated(take(denoiser, index), levels, means))
