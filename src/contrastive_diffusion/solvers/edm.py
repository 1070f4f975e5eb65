"""Euler and Heun in sigma (Karras et al. 2022)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.channel import per_row, sigma_of_logsnr, signal
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.solvers.ancestral import ddim_coefficients
from contrastive_diffusion.solvers.contract import Affine, Coefficients


@dataclass(frozen=True)
class Heun:
    """EDM's second-order solver (Karras et al. 2022, Alg. 1): trapezoid rule in sigma, Euler on the step to +inf."""

    name: str = "heun"
    order: int = 2
    evals: int = 2
    noisy: bool = False
    draws: int = 1
    alone: str = ""

    def on(self, grid: Tensor) -> "Heun":
        return self

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        a, b, _ = (per_row(v, z) for v in ddim_coefficients(logsnr, logsnr_next, 0.0))
        eps_hat = denoiser(z, logsnr.to(z.dtype))
        euler = a * z + b * eps_hat
        rows = logsnr_next.isfinite().nonzero().squeeze(1)
        if not len(rows):
            return euler
        corrector = denoiser(euler[rows], logsnr_next[rows].to(z.dtype))
        trapezoid = a[rows] * z[rows] + b[rows] * (0.5 * (eps_hat[rows] + corrector))
        return euler.index_copy(0, rows, trapezoid)


def euler() -> Affine:
    """EDM's first-order solver: Euler in sigma for y = z / signal. In z it has the coefficients of ``ddim(0)``, written in sigma."""

    def coefficients(logsnr: Tensor, logsnr_next: Tensor) -> Coefficients:
        after = signal(logsnr_next)
        slope = sigma_of_logsnr(logsnr_next) - sigma_of_logsnr(logsnr)
        return after / signal(logsnr), after * slope, torch.zeros_like(logsnr)

    return Affine("euler", coefficients, noisy=False)


def heun() -> Heun:
    """EDM's deterministic sampler: two evaluations a step, one at the last (2N - 1 in all)."""
    return Heun()
