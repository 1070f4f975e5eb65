"""MLPs for vectors, z (B, D) and logsnr (B,) -> eps_hat (B, D).

``MLP`` sees z through Fourier features: an MLP on raw coordinates cannot resolve details of a hundredth of the data's scale, whatever
its budget. ``PlainMLP`` is the shape of the paper's toy network, on raw coordinates, for comparison.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

LEVELS = 32  # features of the level


class LogSNREmbedding(nn.Module):
    """sin and cos of logsnr (B,) at ``features / 2`` frequencies, geometric from 1/16 to 2 radians per nat: (B, features)."""

    frequencies: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-4, 1, features // 2, base=2.0), persistent=False)

    def forward(self, logsnr: Tensor) -> Tensor:
        angle = logsnr[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], 1)


class MLP(nn.Module):
    r"""Residual MLP on Fourier features.

    The hidden layers predict v and :math:`\hat\epsilon=\sqrt{\sigma(-\alpha)}z+\sqrt{\sigma(\alpha)}v`, exact at pure noise and unit-scaled at every
    level. Features of z: itself and sin, cos of :math:`\pi 2^k z`, k = -2 .. ``octaves`` - 3. The level enters every block.

    Args:
        dim: D. width: hidden units. blocks: residual blocks of two layers. octaves: Fourier octaves per coordinate.
    """

    octaves: Tensor

    def __init__(self, dim: int = 2, width: int = 128, blocks: int = 3, octaves: int = 6):
        super().__init__()
        self.register_buffer("octaves", math.pi * 2.0 ** torch.arange(-2, octaves - 2), persistent=False)
        self.level = LogSNREmbedding(LEVELS)
        self.inner = nn.Linear(dim * (2 * octaves + 1), width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.outer = nn.Linear(width, dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        angle = (z[:, :, None] * self.octaves).flatten(1)
        level = self.level(logsnr)
        h = self.inner(torch.cat([z, angle.sin(), angle.cos()], 1))
        for block in self.blocks:
            h = block(h, level)
        v = self.outer(silu(h))
        return torch.sigmoid(-logsnr).sqrt()[:, None] * z + torch.sigmoid(logsnr).sqrt()[:, None] * v


class Block(nn.Module):
    """h + two layers, the first of which also sees the level's embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(width + LEVELS, width), nn.Linear(width, width)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        return h + self.second(silu(self.first(torch.cat([silu(h), level], 1))))


class PlainMLP(nn.Module):
    """The paper's toy network: raw coordinates, a sinusoidal level embedding, ``blocks`` residual blocks of LayerNorm and GELU, eps output."""

    def __init__(self, dim: int = 2, width: int = 128, blocks: int = 2):
        super().__init__()
        self.level, self.inner, self.outer = LogSNREmbedding(width), nn.Linear(dim, width), nn.Linear(width, dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(blocks)
        )

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        level = self.level(logsnr)
        h = self.inner(z) + level
        for block in self.blocks:
            h = h + block(h + level)
        return self.outer(gelu(h))
