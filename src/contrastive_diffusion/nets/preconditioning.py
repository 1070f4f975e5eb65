r"""Preconditioning (Karras et al. 2022, Table 1): :math:`D(y;\sigma)=c_{skip}y+c_{out}F(c_{in}y;c_{noise})` for y = x + sigma eps.

``denoisers.from_edm`` makes a denoiser of any of these. The network is stored as ``model``, as in the published checkpoints.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

BETA_D, BETA_MIN, STEPS, EPS_T = 19.9, 0.1, 1000, 1e-5  # the VP process
C1, C2 = 0.001, 0.008  # iDDPM's schedule


class Coefficients(NamedTuple):
    """Each (N,), in the dtype of sigma."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


class Preconditioned(nn.Module):
    """D(y; sigma) of a network F.

    Args:
        model: F(x, c_noise, class_labels, augment_labels). kind: "edm", "vp", "ve" or "iddpm".
        sigma_data: std of the data ("edm" only). Attributes ``sigma_min``, ``sigma_max``: the range the network is trusted on.
    """

    convention = "edm"

    def __init__(self, model: nn.Module, kind: str = "edm", sigma_data: float = 0.5):
        super().__init__()
        if kind not in PRECONDITIONING:
            raise ValueError(f"given preconditioning {kind!r}, expected one of {', '.join(PRECONDITIONING)}")
        self.model, self.kind, self.sigma_data = model, kind, sigma_data
        if kind == "iddpm":
            self.register_buffer("u", iddpm_sigmas())
        self.sigma_min, self.sigma_max = self._range()

    @property
    def label_dim(self) -> int:
        return int(getattr(self.model, "label_dim", 0))

    def forward(self, y: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None, augment_labels: Tensor | None = None) -> Tensor:
        """D (N, C, H, W) of y (N, C, H, W) and sigma (N,) or a number; coefficients and result in float32 or better."""
        y = y if y.dtype == torch.float64 else y.float()
        sigma = torch.as_tensor(sigma, device=y.device).to(y.dtype).reshape(-1).expand(len(y))
        c = PRECONDITIONING[self.kind](self, sigma)
        skip, out, into = (v.reshape(-1, *[1] * (y.dim() - 1)) for v in c[:3])
        f = self.model(into * y, c.noise, class_labels, augment_labels)[:, : y.shape[1]].to(y.dtype)
        return skip * y + out * f

    def _range(self) -> tuple[float, float]:
        if self.kind == "vp":
            return vp_sigma(EPS_T), vp_sigma(1.0)
        if self.kind == "ve":
            return 0.02, 100.0
        if self.kind == "iddpm":
            return float(self.u[-2]), float(self.u[0])  # pyright: ignore[reportIndexIssue]
        return 0.0, math.inf


def vp_sigma(t: float) -> float:
    """Noise std of the VP process at time t in (0, 1]."""
    return math.sqrt(math.expm1(0.5 * BETA_D * t**2 + BETA_MIN * t))


def iddpm_sigmas() -> Tensor:
    """The 1001 noise stds of improved DDPM, falling to zero; float32."""
    bar = torch.sin(0.5 * math.pi * torch.arange(STEPS + 1, dtype=torch.float64) / (STEPS * (C2 + 1))).square()
    u = torch.zeros(STEPS + 1, dtype=torch.float64)
    for j in range(STEPS, 0, -1):
        u[j - 1] = ((u[j].square() + 1) / torch.clamp(bar[j - 1] / bar[j], min=C1) - 1).sqrt()
    return u.float()


def _edm(net: Preconditioned, sigma: Tensor) -> Coefficients:
    data, total = net.sigma_data, sigma.square() + net.sigma_data**2
    return Coefficients(data**2 / total, sigma * data / total.sqrt(), total.rsqrt(), sigma.log() / 4)


def _vp(net: Preconditioned, sigma: Tensor) -> Coefficients:
    t = ((BETA_MIN**2 + 2 * BETA_D * sigma.square().log1p()).sqrt() - BETA_MIN) / BETA_D
    return Coefficients(torch.ones_like(sigma), -sigma, (sigma.square() + 1).rsqrt(), (STEPS - 1) * t)


def _ve(net: Preconditioned, sigma: Tensor) -> Coefficients:
    one = torch.ones_like(sigma)
    return Coefficients(one, sigma, one, (0.5 * sigma).log())


def _iddpm(net: Preconditioned, sigma: Tensor) -> Coefficients:
    u: Tensor = net.u  # pyright: ignore[reportAssignmentType]
    index = (sigma[:, None] - u.to(sigma.dtype)).abs().argmin(1)
    return Coefficients(torch.ones_like(sigma), -sigma, (sigma.square() + 1).rsqrt(), (STEPS - 1 - index).to(sigma.dtype))


PRECONDITIONING: dict[str, Callable[[Preconditioned, Tensor], Coefficients]] = {"edm": _edm, "iddpm": _iddpm, "ve": _ve, "vp": _vp}
