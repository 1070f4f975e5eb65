r"""Solvers as step maps between two log-SNRs, with no loop, no state and no grid of their own.

``solver.step(denoiser, z, logsnr, logsnr_next, noise)`` takes each row of z (B, *S) from its logsnr (B,) to its logsnr_next (B,) with
its own unit noise, so one step map serves one step of many samples and many steps of one sample. A first-order solver is three
coefficients, :math:`z' = a z + b\hat\epsilon + c n`, and ``logsnr_next = +inf`` returns :math:`\hat x` with no special case.
Coefficients are computed in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from contrastive_diffusion.channel import noise, per_row, sigma_of_logsnr, signal
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import choose, require

Coefficients = tuple[Tensor, Tensor, Tensor]


class Solver(Protocol):
    """``order``: of the global error in the step of log-SNR. ``evals``: per step (one less where the last step needs no corrector)."""

    @property
    def order(self) -> int: ...
    @property
    def evals(self) -> int: ...
    @property
    def noisy(self) -> bool: ...
    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Affine:
    """A first-order solver given by ``coefficients(logsnr, logsnr_next) -> (a, b, c)``, float64, elementwise."""

    name: str
    coefficients: Callable[[Tensor, Tensor], Coefficients]
    noisy: bool
    order: int = 1
    evals: int = 1

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        return self.apply(denoiser, z, logsnr, self.coefficients(logsnr, logsnr_next), noise)

    def apply(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, coefficients: Coefficients, noise: Tensor) -> Tensor:
        """The step with given coefficients (B,); without noise where the solver draws none."""
        a, b, c = (per_row(v, z) for v in coefficients)
        mean = a * z + b * denoiser(z, logsnr.to(z.dtype))
        return mean + c * noise if self.noisy else mean


@dataclass(frozen=True)
class Heun:
    """EDM's second-order solver (Karras et al. 2022, Alg. 1): trapezoid rule in sigma, Euler on the step to +inf."""

    name: str = "heun"
    order: int = 2
    evals: int = 2
    noisy: bool = False

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        a, b, _ = (per_row(v, z) for v in _ddim_coefficients(logsnr, logsnr_next, 0.0))
        eps_hat = denoiser(z, logsnr.to(z.dtype))
        euler = a * z + b * eps_hat
        rows = logsnr_next.isfinite().nonzero().squeeze(1)
        if not len(rows):
            return euler
        corrector = denoiser(euler[rows], logsnr_next[rows].to(z.dtype))
        trapezoid = a[rows] * z[rows] + b[rows] * (0.5 * (eps_hat[rows] + corrector))
        return euler.index_copy(0, rows, trapezoid)


def ddpm(variance: str = "posterior") -> Affine:
    r"""Ancestral sampling (Ho et al. 2020). ``variance``: "posterior" (fixed-small, :math:`\tilde\beta`) or "beta" (fixed-large).

    With :math:`\bar\alpha=\sigma(\alpha)` and :math:`1-\beta=\bar\alpha/\bar\alpha'`: :math:`a=(1-\beta)^{-1/2}`,
    :math:`b=-\beta a/\sqrt{1-\bar\alpha}`. The last step, to +inf, draws no noise in either.
    """
    choose(variance, ("beta", "posterior"), "variance")

    def coefficients(logsnr: Tensor, logsnr_next: Tensor) -> Coefficients:
        beta = -torch.expm1(logsigmoid(logsnr) - logsigmoid(logsnr_next))
        a = (1 - beta).rsqrt()
        posterior = beta.sqrt() * noise(logsnr_next) / noise(logsnr)
        spread = posterior if variance == "posterior" else torch.where(logsnr_next.isinf(), 0.0, beta.sqrt())
        return a, -beta * a / noise(logsnr), spread

    return Affine(f"ddpm-{variance}", coefficients, noisy=True)


def ddim(eta: float = 0.0) -> Affine:
    """Song et al. 2021: deterministic at eta = 0, ancestral with the posterior variance at eta = 1."""
    require(0 <= eta <= 1, f"eta = {eta}", "0 <= eta <= 1")
    return Affine(f"ddim-{eta:g}", lambda logsnr, logsnr_next: _ddim_coefficients(logsnr, logsnr_next, eta), noisy=eta > 0)


def _ddim_coefficients(logsnr: Tensor, logsnr_next: Tensor, eta: float) -> Coefficients:
    beta = -torch.expm1(logsigmoid(logsnr) - logsigmoid(logsnr_next))
    c = eta * beta.sqrt() * noise(logsnr_next) / noise(logsnr)
    a = signal(logsnr_next) / signal(logsnr)
    kept = (noise(logsnr_next).square() - c.square()).clamp(min=0).sqrt()
    return a, kept - a * noise(logsnr), c


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


class StepMap:
    """A solver on a grid: rows of z (B, *S) at step indices i (B,) go one step on. Tables are made once, so every sampler takes the same bits."""

    def __init__(self, solver: Solver, denoiser: Denoiser, grid: Tensor, device: torch.device | str = "cpu"):
        require(grid.dim() == 1 and len(grid) >= 2 and bool((grid.diff() > 0).all()), "a grid that does not increase", "increasing log-SNRs (T + 1,)")
        self.solver, self.denoiser = solver, denoiser
        self.logsnr, self.logsnr_next = grid[:-1].double().to(device), grid[1:].double().to(device)
        self.table = solver.coefficients(self.logsnr, self.logsnr_next) if isinstance(solver, Affine) else None

    def __len__(self) -> int:
        return len(self.logsnr)

    def __call__(self, z: Tensor, i: Tensor, noise: Tensor) -> Tensor:
        if self.table is not None and isinstance(self.solver, Affine):
            return self.solver.apply(self.denoiser, z, self.logsnr[i], (self.table[0][i], self.table[1][i], self.table[2][i]), noise)
        return self.solver.step(self.denoiser, z, self.logsnr[i], self.logsnr_next[i], noise)


SOLVERS: dict[str, Callable[..., Solver]] = {"ddim": ddim, "ddpm": ddpm, "euler": euler, "heun": heun}
