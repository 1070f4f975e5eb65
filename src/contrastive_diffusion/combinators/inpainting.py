r"""Sampling with part of the data given.

With :math:`C=\mathrm{Cov}[x|z]=\frac{\nu^2}{s}\frac{\partial\hat x}{\partial z}` (Tweedie's second identity), conditioning on the known part
:math:`x_o=y` moves the posterior mean to :math:`\hat x+C_{\cdot o}C_{oo}^{-1}(y-\hat x_o)`. That is the exact denoiser of the conditional law where
:math:`p(x|z)` is Gaussian, so for Gaussian data, and the best Gaussian approximation of it otherwise (Rozet et al. 2024). The linear system is
solved by conjugate gradients, one vector-Jacobian product each. Replacing z's known part by the noised y instead, a common recipe,
is wrong in law even for two correlated Gaussians.
"""

import torch
from torch import Tensor

from contrastive_diffusion.channel import eps_from_x, noise, per_row, signal, x_from_eps
from contrastive_diffusion.denoisers import Denoiser, like, take
from contrastive_diffusion.errors import require


def inpaint(denoiser: Denoiser, known: Tensor, mask: Tensor, iterations: int = 5) -> Denoiser:
    """The denoiser of the law given that x = ``known`` where ``mask``.

    Args:
        known: values (*S), or (B, *S) for the rows of a batch of just that size; read where ``mask`` is True only.
        mask: (*S) bool, True where x is known.
        iterations: of conjugate gradients; as many as known coordinates solve the system. 0 only sets x_hat to ``known`` there, and
            lets the rest follow from the denoiser in later steps. Each costs a backward pass of the denoiser.
    """
    require(mask.dtype == torch.bool and bool(mask.any()), f"a mask of {mask.dtype} with {int(mask.sum())} known", "a bool mask with some True")
    require(
        known.shape[-mask.dim() :] == mask.shape,
        f"known values {tuple(known.shape)} and mask {tuple(mask.shape)}",
        "known (*S) or (B, *S), mask (*S)",
    )
    require(iterations >= 0, f"iterations = {iterations}", "iterations >= 0")
    require(bool(known[..., mask].isfinite().all()), "known values that are not finite", "finite values where the mask is True")

    def given(z: Tensor, logsnr: Tensor) -> Tensor:
        require(
            z.shape[1:] == mask.shape and known.dim() <= z.dim(),
            f"a mask of shape {tuple(mask.shape)}",
            f"the shape of z's rows, {tuple(z.shape[1:])}",
        )
        target, there = known.to(z).expand_as(z), mask.to(z.device).expand_as(z)
        if iterations == 0:
            x_hat = x_from_eps(z, logsnr, denoiser(z, logsnr))
        else:
            x_hat = _conditioned(denoiser, z, logsnr, target, there, iterations)
        return eps_from_x(z, logsnr, torch.where(there, target, x_hat))

    return like(denoiser, given, lambda index: inpaint(take(denoiser, index), known[index] if known.dim() > mask.dim() else known, mask, iterations))


def _conditioned(denoiser: Denoiser, z: Tensor, logsnr: Tensor, target: Tensor, there: Tensor, iterations: int) -> Tensor:
    """x_hat moved to where the known part puts it, (B, *S)."""
    scale = per_row(noise(logsnr).square() / signal(logsnr), z)
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        x_hat = x_from_eps(leaf, logsnr, denoiser(leaf, logsnr))

    def covariance(v: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(x_hat, leaf, v, retain_graph=True)
        return scale * product

    residual = torch.where(there, target - x_hat.detach(), 0.0)
    solution = _conjugate_gradients(lambda v: torch.where(there, covariance(v), 0.0), residual, iterations)
    return x_hat.detach() + covariance(solution)


def _conjugate_gradients(matrix, b: Tensor, iterations: int) -> Tensor:
    """x with matrix(x) = b, every row (B, *S) on its own; rows that have converged stay."""
    x, residual, direction = torch.zeros_like(b), b, b
    square = _dot(b, b)
    tiny = 1e-12 * square if b.dtype == torch.float64 else 1e-10 * square
    for _ in range(iterations):
        product = matrix(direction)
        curvature = _dot(direction, product)
        going = (square > tiny) & (curvature > 0)
        if not bool(going.any()):
            break
        step = torch.where(going, square / torch.where(going, curvature, 1.0), 0.0)
        x, residual = x + step * direction, residual - step * product
        new = _dot(residual, residual)
        direction = residual + torch.where(going, new / torch.where(going, square, 1.0), 0.0) * direction
        square = torch.where(going, new, square)
    return x


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return per_row((u * v).flatten(1).sum(1), u)
