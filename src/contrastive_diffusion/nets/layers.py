"""Layers of the image networks: resampling convolutions, attention and embeddings.

Names of parameters and buffers are those of the published checkpoints, so weights load by name.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fir(taps: Sequence[float]) -> Tensor:
    """The separable low-pass filter of ``taps`` as (1, 1, k, k), of sum one."""
    f = torch.as_tensor(taps, dtype=torch.float32)
    return (torch.outer(f, f) / f.sum().square())[None, None]


class Resample(nn.Module):
    """Halves or doubles the resolution of x (N, C, H, W) with the FIR filter ``taps``; the base of ``Conv``.

    Args:
        up, down: which one, if any; the filter is a buffer, and is loaded from a checkpoint.
        taps: (1, 1) is 2 x 2 averaging and nearest-neighbour doubling.
    """

    resample_filter: Tensor

    def __init__(self, up: bool = False, down: bool = False, taps: Sequence[float] = (1, 1)):
        super().__init__()
        if up and down:
            raise ValueError("given up and down at once, expected at most one of them")
        self.up, self.down = up, down
        self.box = len(taps) == 2 and taps[0] == taps[1]
        if up or down:
            self.register_buffer("resample_filter", fir(taps))

    def resample(self, x: Tensor, padding: int | None = None) -> Tensor:
        """x at the other resolution; ``padding`` zeros around it, half the filter by default."""
        if not (self.up or self.down):
            return x
        if self.box and padding is None:
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        kernel = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        padding = (kernel.shape[-1] - 1) // 2 if padding is None else padding
        if self.up:
            return F.conv_transpose2d(x, kernel * 4, groups=x.shape[1], stride=2, padding=padding)
        return F.conv2d(x, kernel, groups=x.shape[1], stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


class Conv(Resample):
    """Resampling, then a k x k convolution with bias. ``fused``: the convolution first and the down-sampling after it, with zeros padded once.

    ``gain`` scales the initial weights, which are Xavier-uniform with fans of channels times k^2; biases start at zero.
    """

    def __init__(
        self, cin: int, cout: int, kernel: int = 3, up: bool = False, down: bool = False, taps: Sequence[float] = (1, 1), fused: bool = False, gain: float = 1.0
    ):  # fmt: skip
        super().__init__(up, down, taps)
        if fused and not down:
            raise ValueError("given fused without down, expected a fused down-sampling convolution")
        self.fused = fused
        self.weight = nn.Parameter(xavier((cout, cin, kernel, kernel), gain))
        self.bias = nn.Parameter(torch.zeros(cout))

    def forward(self, x: Tensor) -> Tensor:
        half = self.weight.shape[-1] // 2
        if not self.fused:
            return F.conv2d(self.resample(x), self.weight, self.bias, padding=half)
        border = (self.resample_filter.shape[-1] - 1) // 2
        x = self.resample(F.conv2d(x, self.weight, padding=half + border), padding=0)
        return x + self.bias.to(x.dtype)[:, None, None]


class Linear(nn.Linear):
    """A linear layer with Xavier-uniform weights and zero bias."""

    def __init__(self, features_in: int, features_out: int, bias: bool = True):
        super().__init__(features_in, features_out, bias=bias)
        with torch.no_grad():
            self.weight.copy_(xavier((features_out, features_in), 1.0))
            if bias:
                self.bias.zero_()


def xavier(shape: tuple[int, ...], gain: float) -> Tensor:
    """U(-1, 1) * gain * sqrt(6 / (fan_in + fan_out)), fan = channels times kernel size."""
    size = math.prod(shape[2:])
    return (torch.rand(shape) * 2 - 1) * (gain * math.sqrt(6 / (size * (shape[0] + shape[1]))))


class Positional(nn.Module):
    """[sin, cos] of c (N,) at ``channels / 2`` frequencies 10000^(-i / (n - 1)): (N, channels)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, c: Tensor) -> Tensor:
        n = self.channels // 2
        powers = torch.arange(n, dtype=c.dtype, device=c.device) / (n - 1)
        angle = c[:, None] * (1 / 10000) ** powers
        return torch.cat([angle.sin(), angle.cos()], 1)


class Fourier(nn.Module):
    """[sin, cos] of 2 pi c times random frequencies of std ``scale``, which are part of the weights: (N, channels)."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, c: Tensor) -> Tensor:
        angle = c[:, None] * (2 * math.pi * self.freqs.to(c.dtype))
        return torch.cat([angle.sin(), angle.cos()], 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single-head attention over pixels of q, k, v (N, C, H, W), weights softmax(q.k / sqrt(C)); accumulated in float32 by the kernel."""
    shape = q.shape
    q, k, v = (t.flatten(2).transpose(1, 2)[:, None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(shape)
