"""Noise from counters: a pure function of (seed, sample id, step).

Philox 4x32-10 (Salmon et al. 2011) turns (seed, sample id, step) into four words of 32 bits. Up to four values are made of these. For more,
where ten rounds for every four values would cost more than the rest of a step, two streams are spread from them by an integer hash of the
index, keyed by two of the words each. Then Box-Muller: one stream gives radii, the other angles.
"""

import math

import torch
from torch import Tensor

START = -1  # the step index of the initial state
MASK = 0xFFFFFFFF
CHUNK = 2**16  # words made at a time, so that temporaries stay in the cache


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four int64 tensors of 32-bit words -> four of the same shape. Products wrap in int64, as they should.

    In place on pairs of words: x holds words 0 and 2, y words 1 and 3, whose upper halves are garbage that the mask takes away later.
    """
    x, y = torch.stack(counter[::2]), torch.stack(counter[1::2])
    factors = torch.tensor([0xD2511F53, 0xCD9E8D57], device=x.device).reshape(2, *[1] * (x.dim() - 1))
    keys = [[(k + i * step) & MASK for i in range(10)] for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
    keys = torch.tensor(keys, device=x.device).reshape(2, 10, *[1] * (x.dim() - 1))
    product = torch.empty_like(x)
    for i in range(10):
        torch.mul(x, factors, out=product)
        y.bitwise_xor_(keys[:, i])
        torch.bitwise_right_shift(product[1], 32, out=x[0])
        torch.bitwise_right_shift(product[0], 32, out=x[1])
        x.bitwise_xor_(y).bitwise_and_(MASK)
        y[0], y[1] = product[1], product[0]
    y.bitwise_and_(MASK)
    return x[0], y[0], x[1], y[1]


def normal(seed: int, samples: Tensor, steps: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit Gaussian noise (B, *shape) of sample ids (B,) at step indices (B,), int64; ``START`` is the initial state.

    From 32 random bits a value: in float64 for float64, in float32 otherwise, which rounds differently in the last digits. Noises of
    more than four values have nothing in common if their shapes differ in size.
    """
    numel = math.prod(shape)
    pairs = (numel + 1) // 2
    few = pairs <= 2
    out = torch.empty(len(samples), *((pairs, 2) if few else (2, pairs)), dtype=dtype, device=samples.device)
    halves, wide = out.mT if few else out, torch.float64 if dtype == torch.float64 else torch.float32
    rows = max(1, CHUNK // (2 * pairs))
    for ids, at, block in zip(*(v.split(CHUNK // 4) for v in (samples, steps, halves)), strict=True):
        for words, into in zip(_keys(seed, ids, at).split(rows, 1), block.split(rows), strict=True):
            _box_muller(into, *(_few(words, pairs, wide) if few else _many(words, pairs, wide)))
    return out.flatten(1)[:, :numel].reshape(-1, *shape)


def _keys(seed: int, samples: Tensor, steps: Tensor) -> Tensor:
    """The four words of each row, (4, B) int64."""
    counter = torch.zeros_like(samples), (steps + 1) & MASK, samples & MASK, (samples >> 32) & MASK
    return torch.stack(philox(counter, (seed & MASK, (seed >> 32) & MASK)))


def _few(words: Tensor, pairs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers in (0, 1] and angles, (B, pairs) with pairs <= 2: the words themselves."""
    uniform = words[: 2 * pairs].to(dtype).add_(0.5).mul_(2.0**-32)
    return uniform[::2].T, uniform[1::2].mul_(2 * math.pi).T


def _many(words: Tensor, pairs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers in (0, 1] and angles, (B, pairs): two streams spread from the words. A magnitude of int32 keeps the digits of small numbers."""
    first, second = (words - 2**31).int().reshape(2, 2, -1, 1)
    uniform, angle = _spread(first, second, pairs).to(dtype)
    return uniform.add_(0.5).abs_().mul_(2.0**-31), angle.mul_(math.pi * 2.0**-31)


def _spread(first: Tensor, second: Tensor, count: int) -> Tensor:
    """``count`` words for each two key words (., 1), int32: for one key a permutation of the index, in which every key bit takes part.

    Shifts and factors: Wellons 2018, "triple32", whose last shift (of bits that float32 drops) is left out. The shift must be a logical one.
    """
    x = first + torch.arange(count, dtype=torch.int32, device=first.device)
    other = torch.empty_like(x)
    _round(x, other, 17, 0xED5AD4BB).bitwise_xor_(second)
    _round(x, other, 11, 0xAC4C1B51)
    return _round(x, other, 15, 0x31848BAB)


def _round(x: Tensor, other: Tensor, shift: int, factor: int) -> Tensor:
    """x ^= x >> shift, x *= factor on int32 words, in place; ``other``: room for as many."""
    torch.bitwise_right_shift(x, shift, out=other).bitwise_and_(2 ** (32 - shift) - 1)
    return x.bitwise_xor_(other).mul_((factor + 2**31) % 2**32 - 2**31)


def _box_muller(out: Tensor, uniform: Tensor, angle: Tensor) -> None:
    """Two normal values of each pair into ``out`` (B, 2, pairs); the arguments are used up."""
    radius = uniform.log_().mul_(-2).sqrt_()
    out[:, 0] = angle.cos().mul_(radius)
    out[:, 1] = angle.sin_().mul_(radius)
