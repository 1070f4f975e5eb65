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
from contrastive_diffusion.likelihood import GROUP, group_means, llr_points
from contrastive_diffusion.schedules import Schedule, ddpm, draw, logistic, uniform

ONE_CALL = 2**30  # rows; training wants the graph of one call, memory is bounded by the batch


class Objective(Protocol):
    """Named scalars with "loss", which alone carries the gradient. ``evals(batch)``: denoiser evaluations it spends on a batch."""

    def __call__(self, denoiser: Denoiser, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]: ...

    def evals(self, batch: int) -> int: ...


def _eps_errors(denoiser: Denoiser, x: Tensor, logsnr: Tensor, generator: torch.Generator | None, perturbation: float = 0.0) -> Tensor:
    """|eps - eps_hat|^2 of each row (B,), summed over S; the input's noise with an extra ``perturbation``."""
    eps = unit_noise(x.shape, x, generator)
    seen = eps + perturbation * unit_noise(x.shape, x, generator) if perturbation else eps
    eps_hat = evaluate(denoiser, corrupt(x, logsnr, seen), logsnr, ONE_CALL)
    return (eps - eps_hat).square().flatten(1).sum(1)


@dataclass(frozen=True)
class Denoising:
    r"""Mean over rows and dimensions of :math:`w(\alpha)(\epsilon-\hat\epsilon)^2` at levels of ``law``, stratified over the batch.

    ``Denoising()`` is DDPM's uniform-t eps loss (Ho et al. 2020); ``Denoising(lognormal(), "edm")`` is EDM's (Karras et al. 2022).
    ``weighting``: "eps" (1), "x" and "v" (the MSE of x or v), "edm" (:math:`1+\sigma^2/\sigma_{data}^2`, unit initial loss).
    ``perturbation``: std :math:`\gamma` of extra noise on the input, none on the target (DDPM-IP, Ning et al. 2023). The optimum is then no
    longer :math:`E[\epsilon|z]` but, with :math:`g=1+\gamma^2`, :math:`\hat\epsilon(z/c,\alpha-\log g)/\sqrt g`, :math:`c^2=\sigma(\alpha)+g\sigma(-\alpha)`.
    """

    law: Schedule = field(default_factory=ddpm)
    weighting: str = "eps"
    sigma_data: float = 1.0
    perturbation: float = 0.0

    def __post_init__(self):
        require(self.perturbation >= 0, f"perturbation = {self.perturbation}", "a std >= 0")
        choose(self.weighting, WEIGHTINGS, "weighting")
        require(self.sigma_data > 0, f"sigma_data = {self.sigma_data}", "sigma_data > 0")

    def __call__(self, denoiser: Denoiser, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        logsnr, _ = draw(self.law, len(check_data(x)), generator)
        logsnr = logsnr.to(x.device)
        weight = WEIGHTINGS[self.weighting](logsnr, self.sigma_data).to(x.dtype)
        errors = _eps_errors(denoiser, x, logsnr, generator, self.perturbation)
        return {"loss": (weight * errors).mean() / x[0].numel()}

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

    A mean over rows, so its weight does not depend on the batch; a ratio is in nats whatever the dimension. Where the numbers below
    come from: benchmarks/contrastive_step.py and docs/findings.md.

    Args:
        zeta: law of the contrasted level. It should cover the sampler's own range: [6, 15] as in the paper trains levels that no sampler visits.
        points: (alpha, eps) points per row and ratio, a multiple of four; each costs two evaluations. Fewer where a batch is too small for them.
        share: share of the batch's rows that are contrasted, at least two. The loss spends at most 2 points share evaluations for each row of the
            batch: at the defaults one, as much as the plain loss (more only in batches under 16, where two rows of four points are left).
        clean: share of the contrasted rows with label +1, in (0, 1). Balanced labels make the ratio the logit of the classifier; others shift it
            by log(clean / (1 - clean)), which is accounted for.
        through: which readings of a ratio carry gradient: "both", or only that of the data ("clean") or of its noised law ("noised"). The optimum
            is the same, because at it either label's gradient is that of one and the same reading with opposite signs.
        curvature: "kept", softplus of the noisy ratio, which is too large by half its variance times softplus''; or "removed" to first order, by
            the variance of the row's own points, without gradient. Removing it takes away a penalty on noisy ratios.
        finest: log-SNR up to which the ratio's integral is resolved; ``finest_of(denoiser)`` by default.
    """

    zeta: Schedule = field(default_factory=lambda: uniform(-4.0, 10.0))
    points: int = 16
    share: float = 1 / 32
    clean: float = 0.5
    through: str = "both"
    curvature: str = "kept"
    finest: float | None = None

    def __post_init__(self):
        require(self.points >= GROUP and self.points % GROUP == 0, f"points = {self.points}", "a multiple of four")
        require(0 < self.share <= 1, f"share = {self.share}", "0 < share <= 1")
        require(0 < self.clean < 1, f"clean = {self.clean}", "0 < clean < 1")
        choose(self.through, ("both", "clean", "noised"), "through")
        choose(self.curvature, ("kept", "removed"), "curvature")
        require(
            self.curvature == "kept" or self.points >= 2 * GROUP,
            f"points = {self.points} with curvature removed",
            "points >= 8, two groups for a variance",
        )

    def __call__(self, denoiser: Denoiser, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        rows, points = self._plan(len(check_data(x)))
        require(len(x) >= 2, f"a batch of {len(x)}", "at least 2 rows, one of each label")
        zeta, _ = draw(self.zeta, rows, generator)
        label = self._labels(rows).to(x)  # the draw of zeta is in random order: levels and labels are independent
        zeta = zeta.to(x.device)
        chosen = torch.where((label > 0).reshape(-1, *[1] * (x.dim() - 1)), x[:rows], noised(x[:rows], zeta, generator))
        values = llr_points(denoiser, chosen, zeta, points, generator, finest=self.finest, through=self.through)
        logit = label * (values.mean(1) - math.log(self.clean / (1 - self.clean)))
        loss = softplus(logit) - self._curvature(values, logit)
        return {"loss": loss.mean(), "accuracy": (logit < 0).to(x.dtype).mean().detach()}

    def _plan(self, batch: int) -> tuple[int, int]:
        """Rows and points of a batch, within its budget of 2 points share evaluations a row."""
        rows = min(batch, max(2, 2 * round(batch * self.share / 2)))
        paid = int(batch * self.share * self.points / max(rows, 1) / GROUP + 1e-9) * GROUP
        least = GROUP if self.curvature == "kept" else 2 * GROUP
        return rows, max(least, min(self.points, paid))

    def _labels(self, rows: int) -> Tensor:
        """+1 or -1 in turn, in the shares asked for, at least one of each."""
        counts = (torch.arange(rows + 1, dtype=torch.float64) * self.clean - 1e-9).ceil()
        wanted = counts.diff() > 0
        wanted[-1] &= not bool(wanted.all())
        return 2.0 * wanted - 1.0

    def _curvature(self, values: Tensor, logit: Tensor) -> Tensor | float:
        """Half the variance of each row's ratio times the second derivative of softplus, without gradient through the variance."""
        if self.curvature == "kept":
            return 0.0
        groups = group_means(values.detach())
        variance = groups.diff(dim=1).square().mean(1) / (2 * groups.shape[1])
        return 0.5 * variance * torch.sigmoid(logit) * torch.sigmoid(-logit)

    def evals(self, batch: int) -> int:
        rows, points = self._plan(batch)
        return rows * 2 * points


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
