r"""Data with a known range: :math:`\hat x` is brought into it, and :math:`\hat\epsilon` is what then remains of z.

So every solver clamps in the same way, on both places where it uses :math:`\hat x` and :math:`\hat\epsilon` (in diffusers:
``use_clipped_model_output``). A clamped denoiser is no denoiser of the data's law any more: use it to sample, not to read likelihoods.
"""

from collections.abc import Callable

from torch import Tensor

from contrastive_diffusion.channel import eps_from_x, per_row, x_from_eps
from contrastive_diffusion.denoisers import Denoiser, like, take
from contrastive_diffusion.errors import require


def clamped(denoiser: Denoiser, limit: float = 1.0) -> Denoiser:
    """x_hat clamped to [-limit, limit] in every coordinate (Ho et al. 2020, for data in [-1, 1])."""
    require(limit > 0, f"limit = {limit}", "limit > 0")
    return _through_x(denoiser, lambda x: x.clamp(-limit, limit))


def thresholded(denoiser: Denoiser, ratio: float = 0.995, largest: float = 1.0) -> Denoiser:
    """Dynamic thresholding (Saharia et al. 2022) of images in [-1, 1]: each row clamped at its ``ratio`` quantile of |x_hat|, then divided by it.

    The quantile is taken to be at least 1 and at most ``largest``: at 1, the default, this clamps. Rows of fewer than two axes have no
    range in this sense and are refused.
    """
    require(0 < ratio <= 1 and largest >= 1, f"ratio {ratio}, largest {largest}", "0 < ratio <= 1 <= largest")

    def shrink(x: Tensor) -> Tensor:
        require(x.dim() >= 3, f"thresholding of rows of shape {tuple(x.shape[1:])}", "images or the like, (B, C, ...)", "use clamped, or neither")
        scale = per_row(x.abs().flatten(1).quantile(ratio, dim=1).clamp(1.0, largest), x)
        return x.clamp(-scale, scale) / scale

    return _through_x(denoiser, shrink)


def _through_x(denoiser: Denoiser, change: Callable[[Tensor], Tensor]) -> Denoiser:
    """The denoiser whose x_hat is ``change`` of the given one's. Where z is the data itself (logsnr = +inf) nothing changes."""

    def changed(z: Tensor, logsnr: Tensor, eps_hat: Tensor) -> Tensor:
        return eps_from_x(z, logsnr.double(), change(x_from_eps(z, logsnr.double(), eps_hat)))

    return like(denoiser, lambda z, logsnr: changed(z, logsnr, denoiser(z, logsnr)), lambda index: _through_x(take(denoiser, index), change), changed)
