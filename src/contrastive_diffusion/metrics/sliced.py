r"""The sliced Wasserstein distance: the mean over directions of the squared one-dimensional distance :math:`\int(F_x^{-1}-F_y^{-1})^2`.

Exact for samples of any two sizes. For isotropic Gaussians it is :math:`\|\mu_x-\mu_y\|^2/d+(\sigma_x-\sigma_y)^2`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive_diffusion.metrics.scores import Replicates

CHUNK = 2**22


def directions(d: int, count: int = 256, seed: int = 0) -> Tensor:
    """Unit vectors (d, count) float64: orthonormal bases in random rotations, so that a shift is measured exactly where count is a multiple of d."""
    generator = torch.Generator().manual_seed(seed)
    bases = [torch.linalg.qr(torch.randn(d, min(d, count), generator=generator, dtype=torch.float64))[0] for _ in range(-(-count // d))]
    return torch.cat(bases, 1)[:, :count]


def sliced_wasserstein(x: Tensor, y: Tensor, along: Tensor, blocks: Sequence[tuple[int, int]]) -> Replicates:
    """Squared distance between samples x (n, d) and y (m, d) ``along`` directions (d, k), whole and without each of ``blocks`` of x."""
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"given samples of shapes {tuple(x.shape)} and {tuple(y.shape)}, expected the same dimension")
    found = torch.zeros(len(blocks) + 1, dtype=torch.float64)
    block = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor([end - begin for begin, end in blocks]))
    for part in along.split(max(1, CHUNK // max(len(x), len(y))), 1):
        ordered, order = (x.double() @ part).sort(0)
        reference, owner = (y.double() @ part).sort(0).values, block[order]
        found[0] += _squared(ordered, reference)
        for g, (begin, end) in enumerate(blocks):
            kept = ordered.T[(owner != g).T].reshape(part.shape[1], len(x) - (end - begin)).T
            found[g + 1] += _squared(kept, reference)
    found /= along.shape[1]
    return Replicates(float(found[0]), found[1:])


def _squared(x: Tensor, y: Tensor) -> float:
    """Sum over columns of the squared distance between the step quantile functions of sorted x (n, k) and y (m, k)."""
    n, m = len(x), len(y)
    if n == m:
        return float((x - y).square().mean(0).sum())
    # steps at multiples of 1/n and of 1/m, in exact integers of 1/(n m)
    steps = torch.cat([torch.arange(n) * m, torch.arange(m) * n]).unique()
    width = torch.cat([steps, steps.new_tensor([n * m])]).diff().double() / (n * m)
    return float(width @ (x[steps // m] - y[steps // n]).square().sum(1))
