"""EDM's samplers: Euler and Heun in sigma, with or without churn (Karras et al. 2022)."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from contrastive_diffusion.channel import per_row, sigma_of_logsnr, signal
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import require
from contrastive_diffusion.solvers.ancestral import ddim_coefficients
from contrastive_diffusion.solvers.contract import Affine, Coefficients, of_rows

LARGEST = math.sqrt(2) - 1  # EDM's bound on the relative increase of sigma in one step


def euler() -> Affine:
    """EDM's first-order solver: Euler in sigma for y = z / signal. In z it has the coefficients of ``ddim(0)``, written in sigma."""

    def coefficients(logsnr: Tensor, logsnr_next: Tensor) -> Coefficients:
        after = signal(logsnr_next)
        slope = sigma_of_logsnr(logsnr_next) - sigma_of_logsnr(logsnr)
        return after / signal(logsnr), after * slope, torch.zeros_like(logsnr)

    return Affine("euler", coefficients, noisy=False)


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
        corrector = of_rows(denoiser, rows, z)(euler[rows], logsnr_next[rows].to(z.dtype))
        trapezoid = a[rows] * z[rows] + b[rows] * (0.5 * (eps_hat[rows] + corrector))
        return euler.index_copy(0, rows, trapezoid)


def heun() -> Heun:
    """EDM's deterministic sampler: two evaluations a step, one at the last (2N - 1 in all)."""
    return Heun()


@dataclass(frozen=True)
class Churned:
    """Fresh noise, then a deterministic ``inner`` step from the higher level: Alg. 2 of Karras et al. 2022. See ``edm``."""

    inner: Affine | Heun
    churn: float
    s_min: float
    s_max: float
    s_noise: float
    grid: Tensor | None = field(default=None, compare=False, repr=False)
    table: Tensor | None = field(default=None, compare=False, repr=False)
    draws: int = 1
    alone: str = ""
    between: bool = True

    @property
    def name(self) -> str:
        return "edm" if isinstance(self.inner, Heun) else "edm-euler"

    @property
    def order(self) -> int:
        return self.inner.order

    @property
    def evals(self) -> int:
        return self.inner.evals

    @property
    def noisy(self) -> bool:
        return self.churn > 0

    def on(self, grid: Tensor) -> "Churned":
        logsnr = grid[:-1].double()
        gamma = self.gamma(logsnr, len(logsnr))
        raised = logsnr - 2 * torch.log1p(gamma)
        spread = self.s_noise * signal(raised) * sigma_of_logsnr(logsnr) * (gamma * (2 + gamma)).sqrt()
        return replace(self, grid=grid, table=torch.stack([raised, signal(raised) / signal(logsnr), spread]))

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        if not self.noisy:
            return self.inner.step(denoiser, z, logsnr, logsnr_next, noise)
        require(self.grid is not None, "one step of a churned solver", "a whole grid: churn is spread over its steps", "use StepMap or a sampler")
        assert self.grid is not None
        assert self.table is not None
        raised, scale, spread = self.table[:, torch.searchsorted(self.grid, logsnr.contiguous())]
        return self.inner.step(denoiser, per_row(scale, z) * z + per_row(spread, z) * noise, raised, logsnr_next, noise)

    def gamma(self, logsnr: Tensor, steps: int) -> Tensor:
        """Relative increase of sigma before each of ``steps`` steps, from logsnr (T,), float64."""
        sigma = sigma_of_logsnr(logsnr)
        return ((sigma >= self.s_min) & (sigma <= self.s_max)).double() * min(self.churn / steps, LARGEST)


def edm(churn: float = 0.0, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0, second: bool = True) -> Churned:
    r"""EDM's stochastic sampler (Karras et al. 2022, Alg. 2). At churn 0 it is ``heun`` (``euler``), and draws nothing.

    Before each of N steps with sigma in [s_min, s_max] it adds noise until sigma has grown by the factor
    :math:`1+\gamma,\ \gamma=\min(\mathrm{churn}/N,\sqrt2-1)`. Second order in law for s_noise = 1; another s_noise leaves a bias.

    Args:
        churn: EDM's S_churn >= 0; above :math:`N(\sqrt2-1)` it has no further effect.
        s_min, s_max: EDM's S_tmin and S_tmax, in sigma.
        s_noise: EDM's S_noise > 0, factor of the std of the added noise.
        second: Heun's corrector; without it the inner step is Euler's.
    """
    require(churn >= 0 and math.isfinite(churn), f"churn = {churn}", "a finite churn >= 0", "EDM's settings are 0 to 100")
    require(0 <= s_min <= s_max, f"churn between sigma {s_min} and {s_max}", "0 <= s_min <= s_max")
    require(s_noise > 0 and math.isfinite(s_noise), f"s_noise = {s_noise}", "a finite s_noise > 0", "EDM's settings are 1.000 to 1.010")
    return Churned(heun() if second else euler(), churn, s_min, s_max, s_noise)
