"""The U-Net of Ho et al. 2020 with the names of its published PyTorch weights; defaults are the CIFAR-10 network.

``net(x, t)`` for x (N, C, R, R) and timesteps t (N,), integer or fractional, predicts eps. ``denoisers.from_timesteps(net, ddpm())`` is its
denoiser. Wiring: every output of the way down, after attention, is concatenated to a block of the way up; nothing is rescaled.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, interpolate, pad, silu
from torch.utils.checkpoint import checkpoint

from .layers import Positional, attend


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm over 32 groups."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    """norm, swish, convolution, + time, norm, swish, dropout, convolution, + shortcut."""

    def __init__(self, cin: int, cout: int, emb: int, rate: float):
        super().__init__()
        self.rate = rate
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.temb_proj = nn.Linear(emb, cout)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = h + self.temb_proj(silu(temb))[:, :, None, None]
        h = self.conv2(dropout(silu(self.norm2(h)), self.rate, self.training))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class Attention(nn.Module):
    """Single-head self-attention over pixels, added to x."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.proj_out(attend(self.q(h), self.k(h), self.v(h)))


class Resize(nn.Module):
    """Half the resolution by a stride of two (zeros right and below only), or twice by repetition; then, or in it, a 3 x 3 convolution."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest") if self.up else pad(x, (0, 1, 0, 1)))


class DDPMUNet(nn.Module):
    """Ho et al.'s U-Net; see the module.

    Args:
        resolution: R, divisible by 2^(levels - 1). channels: of image and output. width: of the finest level, a multiple of 32.
        mult: widths of the levels, from the finest. num_blocks: residual blocks per level (one more on the way up).
        attention: resolutions with attention after every block. dropout: in residual blocks. checkpointing: recompute blocks in the backward pass.
    """

    convention = "timesteps"

    def __init__(
        self,
        resolution: int = 32,
        channels: int = 3,
        width: int = 128,
        mult: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
        checkpointing: bool = False,
    ):
        super().__init__()
        if width % 32:
            raise ValueError(f"given a width of {width}, expected a multiple of 32")
        if resolution % 2 ** (len(mult) - 1):
            raise ValueError(f"given resolution {resolution} for {len(mult)} levels, expected a multiple of {2 ** (len(mult) - 1)}; use fewer levels")
        self.resolution, self.channels, self.checkpointing = resolution, channels, checkpointing
        emb, widths = 4 * width, [width * m for m in mult]
        res = [resolution >> level for level in range(len(mult))]
        self.features = Positional(width)
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(width, emb), nn.Linear(emb, emb)])
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down, skips, cin = nn.ModuleList(), [width], width
        for level, cout in enumerate(widths):
            last = level == len(widths) - 1
            self.down.append(_stage([cin] + [cout] * (num_blocks - 1), cout, emb, dropout, res[level] in attention, None if last else "downsample"))
            skips += [cout] * (num_blocks + (not last))
            cin = cout
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = Residual(cin, cin, emb, dropout), Attention(cin), Residual(cin, cin, emb, dropout)
        stages = []
        for level, cout in reversed(list(enumerate(widths))):
            inner = [width + skips.pop() for width in [cin] + [cout] * num_blocks]
            stages.append(_stage(inner, cout, emb, dropout, res[level] in attention, "upsample" if level else None))
            cin = cout
        self.up = nn.ModuleList(reversed(stages))
        self.norm_out, self.conv_out = norm(cin), nn.Conv2d(cin, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """eps_hat (N, C, R, R) of x (N, C, R, R) at timesteps t (N,)."""
        first, second = self.temb.dense  # pyright: ignore
        temb = second(silu(first(self.features(t.to(x.dtype)))))  # pyright: ignore
        h = self.conv_in(x)
        skips = [h]
        for stage in self.down:
            for block, attention in _pairs(stage):
                h = self._run(block, h, temb)
                h = h if attention is None else attention(h)
                skips.append(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)  # pyright: ignore
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)  # pyright: ignore
        for stage in reversed(list(self.up)):
            for block, attention in _pairs(stage):
                h = self._run(block, torch.cat([h, skips.pop()], 1), temb)
                h = h if attention is None else attention(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)  # pyright: ignore
        return self.conv_out(silu(self.norm_out(h)))

    def _run(self, block: nn.Module, h: Tensor, temb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled() and h.requires_grad:
            result = checkpoint(block, h, temb, use_reentrant=False)
            assert isinstance(result, Tensor)
            return result
        return block(h, temb)


def _stage(inner: list[int], cout: int, emb: int, rate: float, attention: bool, resize: str | None) -> nn.Module:
    """One resolution: ``block``, ``attn`` (empty without attention) and ``downsample`` or ``upsample``."""
    stage = nn.Module()
    stage.block = nn.ModuleList(Residual(cin, cout, emb, rate) for cin in inner)
    stage.attn = nn.ModuleList(Attention(cout) for _ in inner) if attention else nn.ModuleList()
    if resize:
        setattr(stage, resize, Resize(cout, up=resize == "upsample"))
    return stage


def _pairs(stage: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    blocks, attentions = list(stage.block), list(stage.attn)  # pyright: ignore
    return zip(blocks, attentions or [None] * len(blocks), strict=True)
