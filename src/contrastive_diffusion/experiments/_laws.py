"""The laws with exact denoisers that the parallel samplers are compared on, on the DDPM channel."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.denoisers import Denoiser


def ring() -> GaussianMixture:
    """Eight modes of std 0.05 on a circle of radius 1.4."""
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    return GaussianMixture(1.4 * torch.stack([angle.cos(), angle.sin()], 1), 0.05)


def blobs64() -> GaussianMixture:
    """Ten components of std 0.3 with N(0, I) means in 64 dimensions."""
    generator = torch.Generator().manual_seed(64)
    return GaussianMixture(torch.randn(10, 64, generator=generator, dtype=torch.float64), 0.3)


class Manifold(torch.nn.Module):
    """Six modes on a space of rank 4 in 64 dimensions: std 0.3 along it, 0.02 across, the exact denoiser in a rotated frame."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
        means = torch.zeros(6, 64, dtype=torch.float64)
        means[:, :4] = 2 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
        stds = torch.full((6, 64), 0.02, dtype=torch.float64)
        stds[:, :4] = 0.3
        self.law = GaussianMixture(means, stds)

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        return (self.law(z.double() @ self.basis, logsnr.double()) @ self.basis.T).to(z.dtype)


def curve() -> GaussianMixture:
    """200 components of std 0.02 along a wavy line in two dimensions."""
    t = torch.linspace(-1.5, 1.5, 200, dtype=torch.float64)
    return GaussianMixture(torch.stack([t, 0.8 * (4 * t).sin()], 1), 0.02)


def wrong_ring(size: float = 0.1) -> Denoiser:
    """The ring's denoiser with an error of random features, ``size`` per coordinate: what a network might do."""
    generator, law = torch.Generator().manual_seed(9), ring()
    weight, phase = (
        torch.randn(2, 64, generator=generator, dtype=torch.float64) * 3,
        torch.rand(64, generator=generator, dtype=torch.float64) * 2 * math.pi,
    )
    out = torch.randn(64, 2, generator=generator, dtype=torch.float64) / 64**0.5 * 2**0.5

    def denoiser(z: Tensor, logsnr: Tensor) -> Tensor:
        # Sums of two terms and rows of 64 in a fixed order: as batch-invariant as the law itself.
        features = (z.double()[:, :1] * weight[0] + z.double()[:, 1:] * weight[1] + phase + 0.3 * logsnr.double()[:, None]).cos()
        wrong = torch.stack([(features * out[:, d]).sum(1) for d in range(2)], 1)
        return law(z, logsnr) + (size * wrong).to(z.dtype)

    return denoiser


LAWS: dict[str, tuple[Callable[[], Denoiser], tuple[int, ...], int]] = {
    # name: denoiser, item shape, samples
    "ring": (ring, (2,), 16),
    "blobs64": (blobs64, (64,), 6),
    "manifold64": (Manifold, (64,), 6),
    "curve": (curve, (2,), 8),
    "ring+error": (wrong_ring, (2,), 16),
}
