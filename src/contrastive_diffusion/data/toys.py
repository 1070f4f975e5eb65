"""Toy laws: exact mixtures where the law is one, samplers otherwise.

``dino()`` is the law behind the paper's Dino set, not a sample of it: the 142 published points (A. Cairo; Matejka & Fitzmaurice 2017),
each jittered by N(0, 0.15^2) in the original coordinates, mapped by (x/54 - 1) * 4 and (y/48 - 1) * 4 and standardised per axis by the
mixture's own mean and variance. So density, denoiser and likelihood ratios are known exactly at every noise level.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor

from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.errors import choose


def dino() -> GaussianMixture:
    """The 142-component Dino law in 2-D, mean 0, variance 1 per axis, component stds (0.00896, 0.00557)."""
    text = (files("contrastive_diffusion.data") / "dino.csv").read_text().split()[1:]
    points = torch.tensor([[float(v) for v in line.split(",")] for line in text], dtype=torch.float64)
    half = torch.tensor([54.0, 48.0], dtype=torch.float64)
    return _standardised((points / half - 1) * 4, 0.15 * 4 / half)


def two_modes() -> GaussianMixture:
    """N(-5, 1) and N(5, 1) in one dimension, equal weights (the paper's App. A.3, Fig. 1); x has shape (B, 1)."""
    return GaussianMixture(torch.tensor([[-5.0], [5.0]]), 1.0)


def eight_gaussians() -> GaussianMixture:
    """Eight components on a circle of radius sqrt(2) - so variance 1 per axis up to the component std, 0.1."""
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    return GaussianMixture(math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1), 0.1)


def circles() -> GaussianMixture:
    """Two concentric circles (radii 0.75 and 1.5 before standardising) as 2 x 64 components of std 0.05."""
    angle = torch.arange(64, dtype=torch.float64) * (2 * math.pi / 64)
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    return _standardised(torch.cat([0.75 * ring, 1.5 * ring]), torch.tensor(0.05, dtype=torch.float64))


def _standardised(means: Tensor, stds: Tensor) -> GaussianMixture:
    variance = means.var(0, correction=0) + stds.expand(means.shape[1:]).square()
    stds = stds.expand(means.shape) / variance.sqrt()
    return GaussianMixture((means - means.mean(0)) / variance.sqrt(), stds)


@dataclass(frozen=True)
class Sampler:
    """A law known by its draws only: ``sample(n, generator) -> (n, 2)``, about unit variance."""

    points: Callable[[Tensor, Tensor], Tensor]  # two uniforms (n,) -> (n, 2)
    jitter: float

    def sample(self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        u, v = torch.rand(2, n, generator=generator, dtype=torch.float64)
        return (self.points(u, v) + self.jitter * torch.randn(n, 2, generator=generator, dtype=torch.float64)).to(dtype)


def moons() -> Sampler:
    """Two interleaved half circles with Gaussian jitter of 0.05."""

    def points(u: Tensor, v: Tensor) -> Tensor:
        angle, lower = math.pi * u, (v < 0.5).double()
        x = angle.cos() * (1 - 2 * lower) + lower - 0.5
        y = angle.sin() * (1 - 2 * lower) + 0.5 * lower - 0.25
        return torch.stack([x / 0.87, y / 0.50], 1)

    return Sampler(points, 0.05)


def spirals() -> Sampler:
    """Two arms of an Archimedean spiral with Gaussian jitter of 0.03."""

    def points(u: Tensor, v: Tensor) -> Tensor:
        turn = 3 * math.pi * u.sqrt()
        arm = torch.where(v < 0.5, 1.0, -1.0) * turn / (3 * math.pi) * 2.0
        return torch.stack([arm * turn.cos(), arm * turn.sin()], 1)

    return Sampler(points, 0.03)


def checkerboard() -> Sampler:
    """Uniform on the dark squares of a 4 x 4 board on [-sqrt(3), sqrt(3)]^2 (variance 1 per axis)."""

    def points(u: Tensor, v: Tensor) -> Tensor:
        column = (u * 4).floor()
        row = 2 * (v * 2).floor() + column % 2
        return (torch.stack([u * 4, row + (v * 2) % 1], 1) / 2 - 1) * math.sqrt(3)

    return Sampler(points, 0.0)


TOYS: dict[str, Callable[[], GaussianMixture | Sampler]] = {
    "checkerboard": checkerboard,
    "circles": circles,
    "dino": dino,
    "eight-gaussians": eight_gaussians,
    "moons": moons,
    "spirals": spirals,
    "two-modes": two_modes,
}


def toy(name: str) -> GaussianMixture | Sampler:
    """The toy law called ``name``; an unknown name is answered with the nearest ones."""
    return TOYS[choose(name, TOYS, "toy")]()
