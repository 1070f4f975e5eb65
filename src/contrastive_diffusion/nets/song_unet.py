r"""The U-Nets of Song et al. 2021 as Karras et al. 2022 train them: DDPM++ and NCSN++, compatible with their checkpoints to the last tensor.

``SongUNet`` is the raw network F(x, c_noise, class labels, augmentation labels) for x (N, C, R, R). It knows nothing of noise levels:
``preconditioning`` makes D(y; sigma) of it, ``denoisers.from_edm`` a denoiser of that. Wiring: an encoder whose every output is kept, a
decoder whose blocks each take one of them back; residual blocks are scaled by :math:`\sqrt{1/2}`, so activations keep their size.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, silu
from torch.utils.checkpoint import checkpoint

from .layers import Conv, Fourier, Linear, Positional, Resample, attend

EPS = 1e-6  # of every GroupNorm
HALF = math.sqrt(0.5)


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm over groups of at least four channels, at most 32 groups."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=EPS)


class Block(nn.Module):
    """A residual block with the embedding added between its two convolutions, with resampling before the first, and attention after them."""

    def __init__(
        self, cin: int, cout: int, emb: int, up: bool = False, down: bool = False, attention: bool = False, rate: float = 0.0, taps: Sequence[float] = (1, 1)
    ):  # fmt: skip
        super().__init__()
        self.cout, self.rate = cout, rate
        self.norm0 = norm(cin)
        self.conv0 = Conv(cin, cout, 3, up, down, taps)
        self.affine = Linear(emb, cout)
        self.norm1 = norm(cout)
        self.conv1 = Conv(cout, cout, 3, gain=1e-5)
        self.skip = Conv(cin, cout, 1, up, down, taps) if cin != cout or up or down else None
        self.norm2 = norm(cout) if attention else None
        self.qkv = Conv(cout, 3 * cout, 1, gain=math.sqrt(0.2)) if attention else None
        self.proj = Conv(cout, cout, 1, gain=1e-5) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(silu(self.norm0(x)))
        h = silu(self.norm1(h + self.affine(emb)[:, :, None, None].to(h.dtype)))
        h = self.conv1(dropout(h, self.rate, self.training))
        h = (h + (self.skip(x) if self.skip is not None else x)) * HALF
        return self._attention(h) if self.qkv is not None else h

    def _attention(self, h: Tensor) -> Tensor:
        assert self.norm2 is not None
        assert self.qkv is not None
        assert self.proj is not None
        # Output channels are ordered (channel, q | k | v).
        q, k, v = self.qkv(self.norm2(h)).unflatten(1, (self.cout, 3)).unbind(2)
        return (self.proj(attend(q, k, v)) + h) * HALF


class SongUNet(nn.Module):
    """DDPM++ (the defaults) and NCSN++ (``embedding="fourier", channel_mult_noise=2, encoder="residual", taps=(1, 3, 3, 1)``).

    Args:
        resolution: R, divisible by 2^(levels - 1). channels: of the image. out_channels: of the output, ``channels`` by default.
        label_dim: number of classes, 0 for an unconditional network. augment_dim: augmentation labels, 9 in EDM, 0 for none.
        model_channels: base width, a multiple of 4. channel_mult: widths of the levels, from the finest.
        channel_mult_emb, channel_mult_noise: widths of the embedding and of the noise features. num_blocks: residual blocks per level.
        attention: resolutions with self-attention in the encoder (the decoder has it in the last block there, and at its entry).
        dropout: in residual blocks. embedding: "positional" or "fourier". encoder: "standard", "skip" or "residual".
        decoder: "standard" or "skip". taps: of the resampling filter. checkpointing: recompute blocks in the backward pass to save memory.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        out_channels: int | None = None,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.10,
        embedding: str = "positional",
        channel_mult_noise: int = 1,
        encoder: str = "standard",
        decoder: str = "standard",
        taps: Sequence[float] = (1, 1),
        checkpointing: bool = False,
    ):
        super().__init__()
        _check(resolution, model_channels, channel_mult, embedding, encoder, decoder)
        self.resolution, self.channels, self.label_dim, self.augment_dim = resolution, channels, label_dim, augment_dim
        self.checkpointing, self._aux_encoder, self._aux_decoder = checkpointing, encoder, decoder
        noise, emb = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        self.map_noise = Positional(noise) if embedding == "positional" else Fourier(noise)
        self.map_label = Linear(label_dim, noise) if label_dim else None
        self.map_augment = Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(noise, emb), Linear(emb, emb)
        levels = [(resolution >> i, model_channels * mult) for i, mult in enumerate(channel_mult)]

        def block(cin: int, cout: int, attend: bool = False, up: bool = False, down: bool = False) -> Block:
            return Block(cin, cout, emb, up, down, attend, dropout, taps)

        self.enc, skips = _encoder(channels, model_channels, levels, num_blocks, attention, encoder, taps, block)
        self.dec = _decoder(out_channels or channels, skips, levels, num_blocks, attention, decoder, taps, block)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None) -> Tensor:
        """F (N, out, R, R) of x (N, C, R, R), c_noise (N,), one-hot ``class_labels`` (N, label_dim), ``augment_labels`` (N, augment_dim); None is zeros."""
        emb = self._embed(c_noise, class_labels, augment_labels)
        return self._decode(self._encode(x, emb), emb)

    def _embed(self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self.map_noise(c_noise)
        if self.map_label is not None:
            labels = emb.new_zeros(1, self.label_dim) if class_labels is None else class_labels.to(emb.dtype)
            emb = emb + self.map_label(labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        return silu(self.map_layer1(silu(self.map_layer0(emb))))

    def _run(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled() and x.requires_grad:
            result = checkpoint(block, x, emb, use_reentrant=False)
            assert isinstance(result, Tensor)
            return result
        return block(x, emb)

    def _encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """All outputs of the encoder, in order."""
        skips: list[Tensor] = []
        aux = x
        for name, block in self.enc.items():
            if name.endswith("aux_down"):
                aux = block(aux)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + block(aux)
            elif name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + block(aux)) * HALF
            else:
                x = self._run(block, x, emb) if isinstance(block, Block) else block(x)
                skips.append(x)
        return skips

    def _decode(self, skips: list[Tensor], emb: Tensor) -> Tensor:
        x, aux, normed = skips[-1], None, skips[-1]
        for name, block in self.dec.items():
            if name.endswith("aux_up"):
                aux = block(aux)
            elif name.endswith("aux_norm"):
                normed = block(x)
            elif name.endswith("aux_conv"):
                image = block(silu(normed))
                aux = image if aux is None else aux + image
            else:
                x = torch.cat([x, skips.pop()], 1) if "_block" in name else x
                x = self._run(block, x, emb)
        assert aux is not None
        return aux


MakeBlock = Callable[..., Block]


def _encoder(
    cin: int, width: int, levels: list[tuple[int, int]], num_blocks: int, attention: Sequence[int], kind: str, taps: Sequence[float], block: MakeBlock
) -> tuple[nn.ModuleDict, list[int]]:  # fmt: skip
    """The encoder's blocks by name, and the channels of its outputs."""
    enc, skips, cout, aux = nn.ModuleDict(), [], width, cin
    for level, (res, channels) in enumerate(levels):
        at = f"{res}x{res}"
        if level == 0:
            enc[f"{at}_conv"] = Conv(cin, width, 3)
        else:
            enc[f"{at}_down"] = block(cout, cout, down=True)
            if kind == "skip":
                enc[f"{at}_aux_down"] = Resample(down=True, taps=taps)
                enc[f"{at}_aux_skip"] = Conv(aux, cout, 1)
            elif kind == "residual":
                enc[f"{at}_aux_residual"] = Conv(aux, cout, 3, down=True, taps=taps, fused=True)
                aux = cout
        skips.append(cout)
        for index in range(num_blocks):
            enc[f"{at}_block{index}"] = block(cout, channels, attend=res in attention)
            cout = channels
            skips.append(cout)
    return enc, skips


def _decoder(
    out: int, skips: list[int], levels: list[tuple[int, int]], num_blocks: int, attention: Sequence[int], kind: str, taps: Sequence[float], block: MakeBlock
) -> nn.ModuleDict:  # fmt: skip
    """The decoder's blocks by name, from the coarsest level; each ``block`` takes one output of the encoder."""
    dec, skips, cout = nn.ModuleDict(), list(skips), skips[-1]
    for level, (res, channels) in reversed(list(enumerate(levels))):
        at, last = f"{res}x{res}", level == len(levels) - 1
        if last:
            dec[f"{at}_in0"] = block(cout, cout, attend=True)
            dec[f"{at}_in1"] = block(cout, cout)
        else:
            dec[f"{at}_up"] = block(cout, cout, up=True)
        for index in range(num_blocks + 1):
            dec[f"{at}_block{index}"] = block(cout + skips.pop(), channels, attend=index == num_blocks and res in attention)
            cout = channels
        if kind == "skip" or level == 0:
            if kind == "skip" and not last:
                dec[f"{at}_aux_up"] = Resample(up=True, taps=taps)
            dec[f"{at}_aux_norm"] = norm(cout)
            dec[f"{at}_aux_conv"] = Conv(cout, out, 3, gain=1e-5)
    return dec


def _check(resolution: int, width: int, mult: Sequence[int], embedding: str, encoder: str, decoder: str) -> None:
    for given, known, what in (
        (embedding, ("positional", "fourier"), "embedding"),
        (encoder, ("standard", "skip", "residual"), "encoder"),
        (decoder, ("standard", "skip"), "decoder"),
    ):
        if given not in known:
            raise ValueError(f"given {what} {given!r}, expected one of {', '.join(known)}")
    if resolution % 2 ** (len(mult) - 1):
        raise ValueError(f"given resolution {resolution} for {len(mult)} levels, expected a multiple of {2 ** (len(mult) - 1)}; use fewer levels")
    for channels in {width * m for m in mult} | {width}:
        if channels % 4 or channels % min(32, channels // 4):
            raise ValueError(f"given {channels} channels in a level, expected a multiple of 4, and of 32 from 128 on")
