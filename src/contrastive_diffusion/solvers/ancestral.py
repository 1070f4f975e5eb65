"""DDPM and DDIM: one-step solvers on the variance-preserving channel."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from contrastive_diffusion.channel import noise, signal
from contrastive_diffusion.errors import choose, require
from contrastive_diffusion.solvers.contract import Affine, Coefficients


def ddpm(variance: str = "posterior") -> Affine:
    r"""Ancestral sampling (Ho et al. 2020). ``variance``: "posterior" (fixed-small, :math:`\tilde\beta`) or "beta" (fixed-large).

    With :math:`\bar\alpha=\sigma(\alpha)` and :math:`1-\beta=\bar\alpha/\bar\alpha'`: :math:`a=(1-\beta)^{-1/2}`,
    :math:`b=-\beta a/\sqrt{1-\bar\alpha}`. The last step, to +inf, draws no noise in either.
    """
    choose(variance, ("beta", "posterior"), "variance")

    def coefficients(logsnr: Tensor, logsnr_next: Tensor) -> Coefficients:
        beta = step_beta(logsnr, logsnr_next)
        a = (1 - beta).rsqrt()
        posterior = beta.sqrt() * noise(logsnr_next) / noise(logsnr)
        spread = posterior if variance == "posterior" else torch.where(logsnr_next.isinf(), 0.0, beta.sqrt())
        return a, -beta * a / noise(logsnr), spread

    return Affine(f"ddpm-{variance}", coefficients, noisy=True)


def ddim(eta: float = 0.0) -> Affine:
    """Song et al. 2021: deterministic at eta = 0, ancestral with the posterior variance at eta = 1."""
    require(0 <= eta <= 1, f"eta = {eta}", "0 <= eta <= 1")
    return Affine(f"ddim-{eta:g}", lambda logsnr, logsnr_next: ddim_coefficients(logsnr, logsnr_next, eta), noisy=eta > 0)


def step_beta(logsnr: Tensor, logsnr_next: Tensor) -> Tensor:
    r"""The :math:`\beta` of a step, :math:`1-\bar\alpha/\bar\alpha'`, any shape."""
    return -torch.expm1(logsigmoid(logsnr) - logsigmoid(logsnr_next))


def ddim_coefficients(logsnr: Tensor, logsnr_next: Tensor, eta: float) -> Coefficients:
    c = eta * step_beta(logsnr, logsnr_next).sqrt() * noise(logsnr_next) / noise(logsnr)
    a = signal(logsnr_next) / signal(logsnr)
    kept = (noise(logsnr_next).square() - c.square()).clamp(min=0).sqrt()
    return a, kept - a * noise(logsnr), c
