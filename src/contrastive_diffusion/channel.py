r"""The Gaussian channel and its algebra in log-SNR.

A clean :math:`x` reaches log-SNR :math:`\alpha` (in nats, the paper's letter; ``logsnr`` here) through the variance-preserving channel

.. math:: z_\alpha = \sqrt{\sigma(\alpha)}\,x + \sqrt{\sigma(-\alpha)}\,\epsilon,\qquad \epsilon\sim N(0, I),

with the logistic sigmoid :math:`\sigma` (Wu et al. 2024, Eq. 4). Two channels in a row are one channel (``compose``), which is
what makes a denoiser of the data a denoiser of the noised data too. Nothing here assumes anything about the data: not its scale,
not its dimension, not its shape. Scalars of the channel are computed in the dtype of the log-SNR they are given.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from contrastive_diffusion.errors import require


def per_row(value: Tensor | float, like: Tensor) -> Tensor:
    """A scalar or a (B,) tensor, in the dtype and device of ``like`` (B, *S), shaped to broadcast over its rows."""
    value = torch.as_tensor(value, device=like.device).to(like.dtype)
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim())) if value.dim() else value


def as_logsnr(value: Tensor | float, rows: int, device: torch.device | str = "cpu", name: str = "logsnr") -> Tensor:
    """``value`` (a number or (B,) tensor, nats) as a float64 tensor (rows,). Raises ``UsageError`` if it is NaN or has another length."""
    value = torch.as_tensor(value, device=device, dtype=torch.float64)
    require(value.numel() in (1, rows), f"{name} of shape {tuple(value.shape)}", f"a number or shape ({rows},)")
    require(not value.isnan().any(), f"{name} that is NaN", "log-SNR in nats")
    return value.reshape(-1).expand(rows)


def signal(logsnr: Tensor | float) -> Tensor:
    r"""Scale of the data, :math:`\sqrt{\sigma(\alpha)}`, any shape."""
    return torch.exp(0.5 * torch.nn.functional.logsigmoid(_tensor(logsnr)))


def noise(logsnr: Tensor | float) -> Tensor:
    r"""Scale of the noise, :math:`\sqrt{\sigma(-\alpha)}`, any shape."""
    return torch.exp(0.5 * torch.nn.functional.logsigmoid(-_tensor(logsnr)))


def _tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def corrupt(x: Tensor, logsnr: Tensor | float, eps: Tensor) -> Tensor:
    r""":math:`z = \sqrt{\sigma(\alpha)} x + \sqrt{\sigma(-\alpha)} \epsilon` for x, eps (B, *S) and logsnr a number or (B,) (Eq. 4)."""
    return per_row(signal(logsnr), x) * x + per_row(noise(logsnr), x) * eps


def compose(logsnr: Tensor | float, zeta: Tensor | float) -> tuple[Tensor, Tensor]:
    r"""The channel at ``logsnr`` after the channel at ``zeta``: its log-SNR ``beta`` and the share ``b`` of the second noise (Eq. 5).

    :math:`\beta=\sigma^{-1}(\sigma(\alpha)\sigma(\zeta))` and :math:`b^2=\sigma(-\alpha)/\sigma(-\beta)`, written so that nothing cancels:
    :math:`e^{-\beta}=e^{-\zeta}+e^{-\alpha}(1+e^{-\zeta})` and :math:`b^2=\sigma(\mathrm{softplus}(\zeta)-\alpha)`. The printed form is
    off by 0.16 in float32 at 15/15 and infinite at 17/17. Shapes broadcast; either argument may be infinite.
    """
    alpha, level = _tensor(logsnr), _tensor(zeta)
    beta = -torch.logaddexp(-level, softplus(-level) - alpha)
    return beta, torch.sigmoid(softplus(level) - alpha).sqrt()


def x_from_eps(z: Tensor, logsnr: Tensor | float, eps: Tensor) -> Tensor:
    """The x for which z (B, *S) at ``logsnr`` contains exactly the noise ``eps``."""
    return (z - per_row(noise(logsnr), z) * eps) / per_row(signal(logsnr), z)


def eps_from_x(z: Tensor, logsnr: Tensor | float, x: Tensor) -> Tensor:
    """The noise in z (B, *S) at ``logsnr`` if the clean value is ``x``."""
    return (z - per_row(signal(logsnr), z) * x) / per_row(noise(logsnr), z)


def v_from_eps(z: Tensor, logsnr: Tensor | float, eps: Tensor) -> Tensor:
    """``v = signal * eps - noise * x`` (Salimans & Ho 2022) from z (B, *S) and its noise."""
    return (eps - per_row(noise(logsnr), z) * z) / per_row(signal(logsnr), z)


def eps_from_v(z: Tensor, logsnr: Tensor | float, v: Tensor) -> Tensor:
    """``eps = noise * z + signal * v``, the inverse of ``v_from_eps``."""
    return per_row(noise(logsnr), z) * z + per_row(signal(logsnr), z) * v


def score_from_eps(logsnr: Tensor | float, eps: Tensor) -> Tensor:
    r"""Score :math:`\nabla_z\log p_\alpha(z)=-\hat\epsilon/\sqrt{\sigma(-\alpha)}` (Eq. 9) from eps_hat (B, *S)."""
    return -eps / per_row(noise(logsnr), eps)


def logsnr_of_sigma(sigma: Tensor | float) -> Tensor:
    r""":math:`\alpha=-2\ln\sigma` for the noise std ``sigma`` of the variance-exploding channel :math:`x+\sigma\epsilon` (EDM)."""
    return -2 * _tensor(sigma).log()


def sigma_of_logsnr(logsnr: Tensor | float) -> Tensor:
    r"""The inverse, :math:`\sigma=e^{-\alpha/2}`."""
    return torch.exp(-0.5 * _tensor(logsnr))
