"""DDPM and DDIM: one-step solvers on the variance-preserving channel, and their accelerations of second order."""

from dataclasses import dataclass, field
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from contrastive_diffusion.channel import noise, per_row, signal
from contrastive_diffusion.denoisers import Denoiser, ranged
from contrastive_diffusion.errors import choose, require
from contrastive_diffusion.solvers.contract import Affine, Coefficients, Solver, of_rows


@overload
def ddpm(variance: Literal["posterior", "beta"] = "posterior") -> Affine: ...
@overload
def ddpm(variance: str = "posterior") -> Solver: ...
def ddpm(variance: str = "posterior") -> Solver:
    r"""Ancestral sampling (Ho et al. 2020).

    With :math:`\bar\alpha=\sigma(\alpha)` and :math:`1-\beta=\bar\alpha/\bar\alpha'`: :math:`a=(1-\beta)^{-1/2}`,
    :math:`b=-\beta a/\sqrt{1-\bar\alpha}`. The last step, to +inf, draws no noise whatever the variance.

    Args:
        variance: "posterior" (fixed-small, :math:`\tilde\beta`), "beta" (fixed-large), or "learned": between the two, as a denoiser
            that carries ``ranged`` says (Nichol & Dhariwal 2021, Eq. 15). The learned one is no table.
    """
    choose(variance, ("beta", "learned", "posterior"), "variance")

    def coefficients(logsnr: Tensor, logsnr_next: Tensor) -> Coefficients:
        a, b, posterior, large = _ancestral(logsnr, logsnr_next)
        return a, b, (posterior if variance == "posterior" else large).sqrt()

    return LearnedDDPM() if variance == "learned" else Affine(f"ddpm-{variance}", coefficients, noisy=True)


def _ancestral(logsnr: Tensor, logsnr_next: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b and the two variances of the DDPM step, posterior and beta; both are 0 on the step to +inf."""
    beta = step_beta(logsnr, logsnr_next)
    a = (1 - beta).rsqrt()
    posterior = beta * (noise(logsnr_next) / noise(logsnr)).square()
    return a, -beta * a / noise(logsnr), posterior, torch.where(logsnr_next.isinf(), 0.0, beta)


@dataclass(frozen=True)
class LearnedDDPM:
    """DDPM whose log-variance lies between log posterior (v = -1) and log beta (v = 1), v from ``denoiser.ranged``."""

    name: str = "ddpm-learned"
    order: int = 1
    evals: int = 1
    noisy: bool = True
    draws: int = 1
    alone: str = ""

    def on(self, grid: Tensor) -> "LearnedDDPM":
        return self

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        a, b, posterior, large = (per_row(v, z) for v in _ancestral(logsnr, logsnr_next))
        eps_hat, v = ranged(denoiser, z, logsnr.to(z.dtype))
        # x^(1 - share) y^share, which is 0 on the last step, where both variances are.
        spread = posterior.pow(0.25 * (1 - v)) * large.pow(0.25 * (1 + v))
        return a * z + b * eps_hat + torch.where(per_row(logsnr_next.isinf(), z) > 0, 0.0, spread) * noise


def ddim(eta: float = 0.0) -> Affine:
    """Song et al. 2021: deterministic at eta = 0, ancestral with the posterior variance at eta = 1."""
    require(0 <= eta <= 1, f"eta = {eta}", "0 <= eta <= 1")
    return Affine(f"ddim-{eta:g}", lambda logsnr, logsnr_next: ddim_coefficients(logsnr, logsnr_next, eta), noisy=eta > 0)


def step_beta(logsnr: Tensor, logsnr_next: Tensor) -> Tensor:
    r"""The :math:`\beta` of a step, :math:`1-\bar\alpha/\bar\alpha'`, any shape."""
    return -torch.expm1(logsigmoid(logsnr) - logsigmoid(logsnr_next))


def ddim_coefficients(logsnr: Tensor, logsnr_next: Tensor, eta: float) -> Coefficients:
    """(a, b, c) of DDIM, any shape."""
    c = eta * step_beta(logsnr, logsnr_next).sqrt() * noise(logsnr_next) / noise(logsnr)
    a = signal(logsnr_next) / signal(logsnr)
    kept = (noise(logsnr_next).square() - c.square()).clamp(min=0).sqrt()
    return a, kept - a * noise(logsnr), c


@dataclass(frozen=True)
class DDIM2:
    r"""The accelerated DDIM of Li et al. 2024, second order by a second reading one step *back* along the flow.

    With :math:`a=\bar\alpha/\bar\alpha'`, :math:`a^-=\bar\alpha^-/\bar\alpha` of the level before, and the score S at either level:
    :math:`y=\sqrt{a^-}(z-\frac{1-a^-}2S(z))` and
    :math:`z'=a^{-1/2}[z+\frac{1-a}2S(z)+\frac{(1-a)^2}{4(1-a^-)}(S(z)-\sqrt{a^-}S^-(y))]`. The first step, which has no level before it, and
    the one to +inf are DDIM's.
    """

    grid: Tensor | None = field(default=None, compare=False, repr=False)
    name: str = "ddim2"
    order: int = 2
    evals: int = 2
    noisy: bool = False
    draws: int = 1
    alone: str = ""

    def on(self, grid: Tensor) -> "DDIM2":
        return DDIM2(grid)

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        require(self.grid is not None, "one step of ddim2, which needs the level before it", "a whole grid", "use StepMap or a sampler")
        assert self.grid is not None
        a, b, _ = (per_row(v, z) for v in ddim_coefficients(logsnr, logsnr_next, 0.0))
        eps_hat = denoiser(z, logsnr.to(z.dtype))
        out = a * z + b * eps_hat
        index = torch.searchsorted(self.grid, logsnr.contiguous())
        rows = ((index > 0) & logsnr_next.isfinite()).nonzero().squeeze(1)
        if not len(rows):
            return out
        levels = self.grid[index[rows] - 1], logsnr[rows], logsnr_next[rows]
        return out.index_copy(0, rows, _corrected(of_rows(denoiser, rows, z), z[rows], eps_hat[rows], *levels))


def _corrected(denoiser: Denoiser, z: Tensor, eps_hat: Tensor, before: Tensor, logsnr: Tensor, logsnr_next: Tensor) -> Tensor:
    """The inner steps of ``DDIM2``, from the level ``before`` and the reading at z."""
    beta, beta_before = step_beta(logsnr, logsnr_next), step_beta(before, logsnr)
    back, gain = per_row((1 - beta_before).sqrt(), z), per_row(beta.square() / (4 * beta_before), z)
    score = -eps_hat / per_row(noise(logsnr), z)
    y = back * (z - 0.5 * per_row(beta_before, z) * score)
    score_before = -denoiser(y, before.to(z.dtype)) / per_row(noise(before), z)
    inner = z + 0.5 * per_row(beta, z) * score + gain * (score - back * score_before)
    return inner * per_row((1 - beta).rsqrt(), z)


def ddim2() -> DDIM2:
    """The deterministic acceleration of Li et al. 2024."""
    return DDIM2()


@dataclass(frozen=True)
class DDPM2:
    r"""The accelerated DDPM of Li et al. 2024: half of the noise before the reading, half after it; second order in law, one evaluation.

    :math:`y=z+\sqrt{\beta/2}\,n_1`, :math:`z'=(1-\beta)^{-1/2}[y+\beta S(y)+\sqrt{\beta/2}\,n_2]`; :math:`\hat x(z)` on the step to +inf.
    """

    name: str = "ddpm2"
    order: int = 2
    evals: int = 1
    noisy: bool = True
    draws: int = 2
    alone: str = ""

    def on(self, grid: Tensor) -> "DDPM2":
        return self

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        a, b, _, large = (per_row(v, z) for v in _ancestral(logsnr, logsnr_next))
        spread = (0.5 * large).sqrt()
        y = z + spread * noise[:, 0]
        return a * y + b * denoiser(y, logsnr.to(z.dtype)) + a * spread * noise[:, 1]


def ddpm2() -> DDPM2:
    """The stochastic acceleration of Li et al. 2024."""
    return DDPM2()
