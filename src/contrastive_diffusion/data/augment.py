"""EDM's augmentation pipeline (Karras et al. 2022, App. F.2): geometric, with the parameters as labels, so that it does not leak into samples.

Nine labels, in this order: x-flip, y-flip, log scale, rotation (cos w - 1, sin w), anisotropic scale (w cos r, w sin r), translation (x, y).
All are zero for an untouched image, which is what a sampler asks for. Flips are exact; the rest is one affine resampling of the reflected
image, between a doubling and a halving with the orthogonal sym6 wavelet: the identity comes out as it went in.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

LABELS = 9
SCALE, SHIFT = 0.2, 0.125  # log2 of one std of scaling; translation of one std, in widths
TAPS = 6  # pixels of border that the filters need
# Low-pass decomposition filter of the sym6 wavelet.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466, 0.787641141030194,
    0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip


def augment(x: Tensor, p: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Images x (N, C, H, W) transformed, each transform with probability ``p`` (x-flip: always a fair coin), and their labels (N, 9).

    Draws come from the generator on its own device. Nothing is clamped. A batch of one padding: the same batch gives the same images.
    """
    draws = _draw(len(x), p, generator).to(x.device)
    flip_x, flip_y = draws[:, 0] > 0, draws[:, 1] > 0
    x = torch.where(flip_x[:, None, None, None], x.flip(3), x)
    x = torch.where(flip_y[:, None, None, None], x.flip(2), x)
    log_scale, turn, log_ratio, axis, right, down = draws[:, 2:].unbind(1)
    labels = [
        draws[:, 0], draws[:, 1], log_scale, turn.cos() - 1, turn.sin(), log_ratio * axis.cos(), log_ratio * axis.sin(), right, down,
    ]  # fmt: skip
    if bool((draws[:, 2:] != 0).any()):
        x = resample(x, _inverse(log_scale, turn, log_ratio, axis, right * SHIFT * x.shape[3], down * SHIFT * x.shape[2]))
    return x, torch.stack(labels, 1).to(x.dtype)


def _draw(n: int, p: float, generator: torch.Generator | None) -> Tensor:
    """Parameters (n, 8), float64: x-flip, y-flip, log scale, rotation, log ratio, its axis, translation x, y; zero where inactive."""
    device = generator.device if generator is not None else "cpu"
    u = torch.rand(n, 10, generator=generator, dtype=torch.float64, device=device)
    normal = torch.randn(n, 4, generator=generator, dtype=torch.float64, device=device)
    on = (u[:, :5] < p).double()
    flip_x, flip_y = (u[:, 5] < 0.5).double(), (u[:, 6] < 0.5).double() * on[:, 0]
    turn = (2 * u[:, 7] - 1) * math.pi * on[:, 2]
    axis = (2 * u[:, 8] - 1) * math.pi * (u[:, 9] < 0.5)
    scale, ratio, shift = normal[:, 0] * on[:, 1], normal[:, 1] * on[:, 3], normal[:, 2:] * on[:, 4:5]
    return torch.stack([flip_x, flip_y, scale, turn, ratio, axis * on[:, 3], shift[:, 0], shift[:, 1]], 1)


def _inverse(log_scale: Tensor, turn: Tensor, log_ratio: Tensor, axis: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """From a pixel of the result to its source, pixels from the centre, (N, 3, 3)."""
    scale, ratio = 2 ** (SCALE * log_scale), 2 ** (SCALE * log_ratio)
    return (
        _scaling(1 / scale, 1 / scale)
        @ _rotation(turn)
        @ _rotation(-axis)
        @ _scaling(1 / ratio, ratio)
        @ _rotation(axis)
        @ _translation(-right, -down)
    )


def _matrix(rows: list[list[Tensor | float]], like: Tensor) -> Tensor:
    return torch.stack([torch.stack([torch.as_tensor(v, dtype=like.dtype, device=like.device).expand(len(like)) for v in row], 1) for row in rows], 1)


def _scaling(a: Tensor, b: Tensor) -> Tensor:
    return _matrix([[a, 0.0, 0.0], [0.0, b, 0.0], [0.0, 0.0, 1.0]], a)


def _rotation(w: Tensor) -> Tensor:
    return _matrix([[w.cos(), -w.sin(), 0.0], [w.sin(), w.cos(), 0.0], [0.0, 0.0, 1.0]], w)


def _translation(a: Tensor, b: Tensor) -> Tensor:
    return _matrix([[1.0, 0.0, a], [0.0, 1.0, b], [0.0, 0.0, 1.0]], a)


def resample(x: Tensor, inverse: Tensor) -> Tensor:
    """x (N, C, H, W) under the affine maps whose ``inverse`` (N, 3, 3) takes result to source, in pixels from the centre."""
    height, width = x.shape[2:]
    left, top, right, bottom = _margins(inverse, height, width)
    x = pad(x, (left, right, top, bottom), mode="reflect")
    shift = inverse.new_tensor([(left - right) / 2, (top - bottom) / 2]).expand(len(x), 2)
    inverse = _translation(shift[:, 0], shift[:, 1]) @ inverse
    x = _double(_double(x, 3), 2)
    # Pixel k now lies at 2k: the centre moved by half a pixel of the doubled grid.
    two, half = inverse.new_full((len(x),), 2.0), inverse.new_full((len(x),), 0.5)
    inverse = _translation(-half, -half) @ _scaling(two, two) @ inverse @ _scaling(1 / two, 1 / two) @ _translation(half, half)
    size = (len(x), x.shape[1], 2 * (height + TAPS), 2 * (width + TAPS))
    to_unit, from_unit = (_scaling(two / v.shape[3], two / v.shape[2]) for v in (x, torch.empty(size, device="meta")))
    grid = affine_grid((to_unit @ inverse @ torch.linalg.inv(from_unit))[:, :2].to(x.dtype), list(size), align_corners=False)
    x = grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    crop = slice(TAPS // 2, -(TAPS // 2))
    return _halve(_halve(x, 3), 2)[:, :, crop, crop]


def _margins(inverse: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """Pixels to reflect at the left, top, right and bottom, so that every corner of every image finds its source; capped by the image."""
    cx, cy = (width - 1) / 2, (height - 1) / 2
    corners = inverse.new_tensor([[-cx, -cy, 1], [cx, -cy, 1], [cx, cy, 1], [-cx, cy, 1]])
    reach = (inverse @ corners.T)[:, :2].transpose(0, 1).flatten(1)  # (2, 4 N)
    low, high = -reach.min(1).values, reach.max(1).values
    sides = [float(low[0]) - cx, float(low[1]) - cy, float(high[0]) - cx, float(high[1]) - cy]
    left, top, right, bottom = (math.ceil(min(max(v + TAPS, 0.0), limit)) for v, limit in zip(sides, (width - 1, height - 1) * 2, strict=True))
    return left, top, right, bottom


def _kernel(x: Tensor, axis: int, flipped: bool) -> Tensor:
    taps = torch.tensor(SYM6[::-1] if flipped else SYM6, dtype=x.dtype, device=x.device)
    return taps.reshape(1, 1, 1, -1).transpose(3, axis).expand(x.shape[1], -1, -1, -1)


def _double(x: Tensor, axis: int) -> Tensor:
    """Zeros between the pixels along ``axis`` and the filter: pixel k at 2k, of the double length."""
    stuffed = torch.stack([x, torch.zeros_like(x)], axis + 1).flatten(axis, axis + 1).narrow(axis, 0, 2 * x.shape[axis] - 1)
    padding = (0, TAPS) if axis == 3 else (TAPS, 0)
    return conv2d(stuffed, _kernel(x, axis, True), groups=x.shape[1], padding=padding)


def _halve(x: Tensor, axis: int) -> Tensor:
    """The adjoint of ``_double``."""
    padding, stride = ((0, TAPS - 1), (1, 2)) if axis == 3 else ((TAPS - 1, 0), (2, 1))
    return conv2d(x, _kernel(x, axis, False), groups=x.shape[1], padding=padding, stride=stride)
