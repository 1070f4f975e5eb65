r"""The reverse SDE, discretised as it stands.

On the clock :math:`u=\ln\sigma(\alpha)`, the VP SDE's own :math:`-\int\beta dt`, it is :math:`dz=(\frac12z+S)du+dw` with the score
:math:`S=-\hat\epsilon/\nu`; in :math:`y=z/s` on the clock :math:`-\sigma^2` it is the VE SDE :math:`dy=S_y\,d(-\sigma^2)+dw`.
The step to +inf is :math:`\hat x`, without noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from contrastive_diffusion.channel import noise as noise_scale
from contrastive_diffusion.channel import per_row, sigma_of_logsnr, signal
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import choose, require
from contrastive_diffusion.solvers.contract import Affine, Coefficients, of_rows


def euler_maruyama(sde: str = "vp") -> Affine:
    """Euler-Maruyama for the reverse "vp" or "ve" SDE (Song et al. 2021)."""
    choose(sde, ("ve", "vp"), "sde")
    return Affine(f"euler-maruyama-{sde}", _vp if sde == "vp" else _ve, noisy=True)


def _vp(logsnr: Tensor, logsnr_next: Tensor) -> Coefficients:
    step, last = logsigmoid(logsnr_next) - logsigmoid(logsnr), logsnr_next.isinf()
    scale = noise_scale(logsnr)
    a = torch.where(last, 1 / signal(logsnr), 1 + 0.5 * step)
    return a, torch.where(last, -scale / signal(logsnr), -step / scale), torch.where(last, 0.0, step).sqrt()


def _ve(logsnr: Tensor, logsnr_next: Tensor) -> Coefficients:
    sigma, after = sigma_of_logsnr(logsnr), signal(logsnr_next)
    step = sigma.square() - sigma_of_logsnr(logsnr_next).square()
    return after / signal(logsnr), -after * step / sigma, torch.where(logsnr_next.isinf(), 0.0, after * step.sqrt())


@dataclass(frozen=True)
class PredictorCorrector:
    """An Euler-Maruyama step, then Langevin steps at the level it reached. See ``predictor_corrector``."""

    predictor: Affine
    snr: float
    corrections: int
    order: int = 1
    noisy: bool = True
    alone: str = ""

    @property
    def name(self) -> str:
        return "pc-" + self.predictor.name.removeprefix("euler-maruyama-")

    @property
    def evals(self) -> int:
        return 1 + self.corrections

    @property
    def draws(self) -> int:
        return 1 + self.corrections

    def on(self, grid: Tensor) -> "PredictorCorrector":
        return self

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        noise = noise.reshape(len(z), self.draws, *z.shape[1:])
        out = self.predictor.step(denoiser, z, logsnr, logsnr_next, noise[:, 0])
        rows = logsnr_next.isfinite().nonzero().squeeze(1)
        if not len(rows):
            return out
        level, at, corrector = logsnr_next[rows].to(z.dtype), out[rows], of_rows(denoiser, rows, z)
        scale = per_row(2 * self.snr * noise_scale(logsnr_next[rows]), z)
        for k in range(1, self.draws):
            at = at - self.snr * scale * corrector(at, level) + scale * noise[rows, k]
        return out.index_copy(0, rows, at)


def predictor_corrector(sde: str = "vp", snr: float = 0.16, corrections: int = 1) -> PredictorCorrector:
    r"""Song et al. 2021: each step followed by ``corrections`` Langevin steps :math:`z+\delta S(z)+\sqrt{2\delta}n`, :math:`\delta=2(r\nu)^2`, r = ``snr``.

    Their :math:`\delta` has the norms of noise and score averaged over the batch, :math:`2(r\|n\|/\|S\|)^2`; here these are replaced by what they
    are for an exact score, so rows stay independent. Langevin steps of fixed size leave a bias of order :math:`r^2\nu^2` at the last level.
    """
    require(0 < snr < 1, f"snr = {snr}", "0 < snr < 1")
    require(corrections >= 0, f"corrections = {corrections}", "corrections >= 0")
    return PredictorCorrector(euler_maruyama(sde), snr, corrections)


@dataclass(frozen=True)
class SdeHeun:
    """Heun's rule for the reverse VP SDE with one noise for both readings (second order in law: the noise is additive)."""

    name: str = "sde-heun"
    order: int = 2
    evals: int = 2
    noisy: bool = True
    draws: int = 1
    alone: str = ""

    def on(self, grid: Tensor) -> "SdeHeun":
        return self

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        increment = (logsigmoid(logsnr_next) - logsigmoid(logsnr)).sqrt()
        return self.both(denoiser, z, logsnr, logsnr_next, per_row(increment, z) * noise)[1]

    def both(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
        """The Euler-Maruyama step and Heun's, for the same Brownian ``increment`` (B, *S) on the clock u. Both are x_hat for +inf."""
        a, b, _ = (per_row(v, z) for v in _vp(logsnr, logsnr_next))
        rows = logsnr_next.isfinite().nonzero().squeeze(1)
        euler = a * z + b * denoiser(z, logsnr.to(z.dtype))
        if not len(rows):
            return euler, euler
        euler = euler.index_copy(0, rows, euler[rows] + increment[rows])
        at, level = euler[rows], logsnr_next[rows]
        step = per_row((logsigmoid(level) - logsigmoid(logsnr[rows])), z)
        drift = 0.5 * at - of_rows(denoiser, rows, z)(at, level.to(z.dtype)) / per_row(noise_scale(level), z)
        again = z[rows] + step * drift + increment[rows]
        return euler, euler.index_copy(0, rows, 0.5 * (at + again))


def sde_heun() -> SdeHeun:
    """Heun's rule for the reverse VP SDE: two evaluations a step, one at the last."""
    return SdeHeun()
