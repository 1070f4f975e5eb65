r"""Training objectives: ``objective(denoiser, x, generator=None) -> {"loss": scalar, ...}``, pure, one batched denoiser call each.

``Denoising`` is consistent for the denoiser at the levels of its law, whatever its weighting. ``Likelihood`` weights it so that the loss
is the nll of the data (Kong et al. 2023). ``Contrastive`` is the paper's contribution: the logistic loss of the noise classifier that the
denoiser implies (Wu et al. 2024, Eq. 7; Algorithm 1 prints softmax where Eq. 7 has softplus), which reads the denoiser at level
:math:`\beta` on points of other levels, where plain training never looks. None assumes anything of the network.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from contrastive_diffusion.channel import corrupt
from contrastive_diffusion.denoisers import Denoiser, check_data, evaluate, noised, unit_noise
from contrastive_diffusion.errors import choose, require
from contrastive_diffusion.likelihood import llr_points
from contrastive_diffusion.schedules import Schedule, ddpm, draw, logistic, uniform

ONE_CALL = 2**30  # rows; training wants the graph of one call, memory is bounded by the batch


class Objective(Protocol):
    """Named scalars with "loss", which alone carries the gradient. ``evals(batch)``: denoiser evaluations it spends on a batch."""

    def __call__(self, denoiser: Denoiser, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]: ...

    def evals(self, batch: int) -> int: ...


def _eps_errors(denoiser: Denoiser, x: Tensor, logsnr: Tensor, generator: torch.Generator | None) -> Tensor:
    """|eps - eps_hat|^2 of each row (B,), summed over S."""
    eps = unit_noise(x.shape, x, generator)
    eps_hat = evaluate(denoiser, corrupt(x, logsnr, eps), logsnr, ONE_CALL)
    return (eps - eps_hat).square().flatten(1).sum(1)


@dataclass(frozen=True)
class Denoising:
    r"""Mean over rows and dimensions of :math:`w(\alpha)(\epsilon-\hat\epsilon)^2` at levels of ``law``, stratified over the batch.

    ``Denoising()`` is DDPM's uniform-t eps loss (Ho et al. 2020); ``Denoising(lognormal(), "edm")`` is EDM's (Karras et al. 2022).
    ``weighting``: "eps" (1), "x" and "v" (the MSE of x or v), "edm" (:math:`1+\sigma^2/\sigma_{data}^2`, unit initial loss).
    """

    law: Schedule = field(default_factory=ddpm)
    weighting: str = "eps"
    sigma_data: float = 1.0

    def __post_init__(self):
        choose(self.weighting, WEIGHTINGS, "weighting")
        require(self.sigma_data > 0, f"sigma_data = {self.sigma_data}", "sigma_data > 0")

    def __call__(self, denoiser: Denoiser, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        logsnr, _ = draw(self.law, len(check_data(x)), generator)
        logsnr = logsnr.to(x.device)
        weight = WEIGHTINGS[self.weighting](logsnr, self.sigma_data).to(x.dtype)
        return {"loss": (weight * _eps_errors(denoiser, x, logsnr, generator)).mean() / x[0].numel()}

    def evals(self, batch: int) -> int:
        return batch


@dataclass(frozen=True)
class Likelihood:
    r"""The nll of the data in nats per dimension, one level per row: :math:`\frac1d\{h_g+\frac12E[w(\|\epsilon-\hat\epsilon\|^2-\sum_i\sigma(\alpha+\lambda_i))]\}`.

    ``law`` is the integration law, with weight = slope; the default is ITD's for unit-variance data. ``spectrum``: the
    log-eigenvalues :math:`\lambda` (d,) of the data covariance, zeros by default; it moves the value, never the gradient.
    """

    law: Schedule = field(default_factory=logistic)
    spectrum: Tensor | None = None

    def __call__(self, denoiser: Denoiser, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        logsnr, weight = (v.to(x.device) for v in draw(self.law, len(check_data(x)), generator))
        dim = x[0].numel()
        spectrum = torch.zeros(dim) if self.spectrum is None else torch.as_tensor(self.spectrum)
        require(spectrum.shape == (dim,), f"a spectrum of shape {tuple(spectrum.shape)}", f"({dim},)")
        spectrum = spectrum.to(x.device, torch.float64)
        baseline = torch.sigmoid(logsnr[:, None] + spectrum).sum(1)
        gap = weight.to(x.dtype) * (_eps_errors(denoiser, x, logsnr, generator) - baseline.to(x.dtype))
        entropy = 0.5 * (dim * math.log(2 * math.pi * math.e) + float(spectrum.sum()))
        return {"loss": (entropy + 0.5 * gap.mean()) / dim}

    def evals(self, batch: int) -> int:
        return batch


@dataclass(frozen=True)
class Contrastive:
    r"""CDL: mean of :math:`\mathrm{softplus}(y\,\widehat{LLR}_\zeta(x))`, in nats; y = +1 for data, -1 for draws of :math:`p_\zeta` (Eq. 7).

    Args:
        zeta: law of the contrasted level. It should cover the sampler's own range: [6, 15] as in the paper trains levels that no sampler visits.
        points: (alpha, eps) points per row and ratio; each costs two evaluations.
        share: share of the batch's rows that are contrasted (at least two: one of each label), labels balanced.
        finest: log-SNR up to which the ratio's integral is resolved; ``finest_of(denoiser)`` by default.
    """

    zeta: Schedule = field(default_factory=lambda: uniform(-4.0, 10.0))
    points: int = 8
    share: float = 1 / 16
    finest: float | None = None

    def __post_init__(self):
        require(self.points >= 4 and self.points % 4 == 0, f"points = {self.points}", "a multiple of four")
        require(0 < self.share <= 1, f"share = {self.share}", "0 < share <= 1")

    def __call__(self, denoiser: Denoiser, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        rows = self._rows(len(check_data(x)))
        require(len(x) >= 2, f"a batch of {len(x)}", "at least 2 rows, one of each label")
        zeta, _ = draw(self.zeta, rows, generator)
        label = 1.0 - 2.0 * (torch.arange(rows) % 2).to(x.dtype)  # the draw is in random order: levels and labels are independent
        zeta, label = zeta.to(x.device), label.to(x.device)
        chosen = torch.where((label > 0).reshape(-1, *[1] * (x.dim() - 1)), x[:rows], noised(x[:rows], zeta, generator))
        ratio = llr_points(denoiser, chosen, zeta, self.points, generator, finest=self.finest).mean(1)
        loss = softplus(label * ratio).mean()
        return {"loss": loss, "accuracy": (label * ratio < 0).to(x.dtype).mean().detach()}

    def _rows(self, batch: int) -> int:
        return min(batch, max(2, 2 * round(batch * self.share / 2)))

    def evals(self, batch: int) -> int:
        return self._rows(batch) * 2 * self.points


@dataclass(frozen=True)
class Weighted:
    """The weighted sum of named objectives; every term's scalars are reported as ``name.key``."""

    terms: Mapping[str, tuple[float, Objective]]

    def __post_init__(self):
        require(len(self.terms), "no terms", "a mapping name -> (weight, objective)")

    def __call__(self, denoiser: Denoiser, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        results = {name: objective(denoiser, x, generator) for name, (_, objective) in self.terms.items()}
        total = torch.stack([weight * results[name]["loss"] for name, (weight, _) in self.terms.items()]).sum()
        return {"loss": total} | {f"{name}.{key}": v.detach() for name, scalars in results.items() for key, v in scalars.items()}

    def evals(self, batch: int) -> int:
        return sum(objective.evals(batch) for _, objective in self.terms.values())


# Weight on |eps - eps_hat|^2, given log-SNR and sigma_data: |x - x_hat|^2 = e^-logsnr |..|^2, |v - v_hat|^2 = |..|^2 / sigmoid(logsnr).
WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "edm": lambda logsnr, sigma_data: 1 + torch.exp(-logsnr) / sigma_data**2,
    "eps": lambda logsnr, _: torch.ones_like(logsnr),
    "v": lambda logsnr, _: torch.exp(-logsigmoid(logsnr)),
    "x": lambda logsnr, _: torch.exp(-logsnr),
}

OBJECTIVES: dict[str, Callable[..., Objective]] = {"contrastive": Contrastive, "denoising": Denoising, "likelihood": Likelihood}
