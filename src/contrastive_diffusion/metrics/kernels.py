r"""The unbiased squared maximum mean discrepancy (Gretton et al. 2012) with any kernel, computed in chunks.

``mmd`` has the Gaussian kernel of the paper's App. B.1, :math:`k(x,y)=\exp(-\|x-y\|^2/2\sigma^2)`, ``bandwidth`` = :math:`\sigma`. The paper's
code uses :math:`\sigma^2=0.03` where its text says :math:`\sigma=0.03`, and multiplies every value by :math:`1/\sqrt{2\pi\cdot0.03}=2.303`.
``kid`` has the kernel :math:`(x\cdot y/d+1)^3` of Binkowski et al. 2018.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.metrics.scores import Replicates, Rows, Score

CHUNK = 2**22
Kernel = Callable[[Tensor, Tensor], Tensor]


def gaussian(bandwidth: float) -> Kernel:
    """Rows (n, d), (m, d) -> exp(-|x - y|^2 / 2 bandwidth^2), (n, m)."""
    if not (bandwidth > 0 and math.isfinite(bandwidth)):
        raise ValueError(f"given bandwidth = {bandwidth}, expected a positive number")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        # Distances by differences where that fits, else by the matrix form; both in the input's dtype.
        mode = "donot_use_mm_for_euclid_dist" if x.shape[1] <= 16 else "use_mm_for_euclid_dist"
        return torch.cdist(x, y, compute_mode=mode).square_().mul_(-0.5 / bandwidth**2).exp_()

    return kernel


def polynomial(degree: int = 3) -> Kernel:
    """Rows (n, d), (m, d) -> (x . y / d + 1)^degree, (n, m)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        product = x @ y.T
        return product.mul_(1 / x.shape[1]).add_(1).pow_(degree)

    return kernel


@dataclass(frozen=True)
class _Sums:
    """Sums of a kernel matrix without its diagonal where ``same``: rows (n,), columns (m,), squares; ``pairs`` per row and per column."""

    rows: Tensor
    columns: Tensor
    squares: float
    per_row: int
    per_column: int

    def mean(self) -> float:
        return float(self.rows.sum()) / (len(self.rows) * self.per_row)

    def residual(self) -> float:
        """Variance of the doubly centred kernel: what is left of k(x, y) after its row and column means."""
        mean = self.mean()
        total = self.squares / (len(self.rows) * self.per_row) - mean**2
        rows = float(((self.rows / self.per_row) - mean).square().mean())
        columns = float(((self.columns / self.per_column) - mean).square().mean())
        return max(total - rows - columns, 0.0)


def _sums(x: Tensor, y: Tensor, kernel: Kernel, same: bool = False) -> _Sums:
    rows, columns, squares = [], torch.zeros(len(y), dtype=torch.float64, device=y.device), 0.0
    size = max(1, CHUNK // max(len(y), 1))
    for start in range(0, len(x), size):
        part = x[start : start + size]
        values = kernel(part, y)
        if same:
            values[torch.arange(len(part)), torch.arange(start, start + len(part))] = 0.0
        rows.append(values.sum(1, dtype=torch.float64))
        columns += values.sum(0, dtype=torch.float64)
        squares += float(values.square_().sum(dtype=torch.float64))
    return _Sums(torch.cat(rows), columns, squares, len(y) - same, len(x) - same)


class MMD:
    """Squared MMD of samples x (n, *S) to a fixed reference y (m, *S), whose own part is computed once; a number as ``kernel`` is a bandwidth."""

    def __init__(self, y: Tensor, kernel: float | Kernel):
        self.kernel = kernel if callable(kernel) else gaussian(kernel)
        if len(y) < 2:
            raise ValueError(f"given {len(y)} reference samples, expected at least 2")
        self.y = y.flatten(1)
        self.yy = _sums(self.y, self.y, self.kernel, same=True)

    def __call__(self, x: Tensor) -> Score:
        """Unbiased estimate (it may be negative) and its standard error, from the first- and second-order terms of the U-statistic."""
        x = self._like_reference(x)
        n, m, yy = len(x), len(self.y), self.yy
        xx, xy = _sums(x, x, self.kernel, same=True), _sums(x, self.y, self.kernel)
        residuals = xx.residual(), yy.residual(), xy.residual()
        linear_x = (xx.rows / (n - 1) - xy.rows / m).var() - residuals[0] / (n - 1) - residuals[2] / m
        linear_y = (yy.rows / (m - 1) - xy.columns / n).var() - residuals[1] / (m - 1) - residuals[2] / n
        variance = 4 * (max(float(linear_x), 0.0) / n + max(float(linear_y), 0.0) / m)
        variance += 2 * residuals[0] / (n * (n - 1)) + 2 * residuals[1] / (m * (m - 1)) + 4 * residuals[2] / (n * m)
        return Score(xx.mean() + yy.mean() - 2 * xy.mean(), math.sqrt(variance))

    def replicates(self, x: Tensor, blocks: Sequence[tuple[int, int]]) -> Replicates:
        """The estimate from all of x and without each of ``blocks``."""
        x = self._like_reference(x)
        xx, xy = _sums(x, x, self.kernel, same=True).rows, _sums(x, self.y, self.kernel).rows

        def value(inner: float, outer: float, n: int) -> float:
            return inner / (n * (n - 1)) + self.yy.mean() - 2 * outer / (n * len(self.y))

        def without(begin: int, end: int) -> float:
            within = float(_sums(x[begin:end], x[begin:end], self.kernel, same=True).rows.sum())
            inner, outer = (float(v.sum() - w * v[begin:end].sum()) for v, w in ((xx, 2), (xy, 1)))
            return value(inner + within, outer, len(x) - (end - begin))

        rest = torch.tensor([without(*block) for block in blocks], dtype=torch.float64)
        return Replicates(value(float(xx.sum()), float(xy.sum()), len(x)), rest)

    def _like_reference(self, x: Tensor) -> Tensor:
        x = x.flatten(1).to(self.y.dtype)
        if len(x) < 2 or x.shape[1] != self.y.shape[1]:
            raise ValueError(f"given samples of shape {tuple(x.shape)}, expected (n >= 2, {self.y.shape[1]})")
        return x


def mmd(x: Tensor, y: Tensor, bandwidth: float) -> Score:
    """Unbiased squared MMD between samples x (n, *S) and y (m, *S), independent of one another."""
    return MMD(y, bandwidth)(x)


def kid(x: Rows, y: Rows, block: int = 1000) -> Score:
    """Kernel distance of features x (n, d) and y (m, d) of any n and m, linear in their number and unbiased.

    Both are cut into as many blocks as the smaller has ``block`` rows; the mean over pairs of blocks (Zaremba et al. 2013) uses every row
    once, and its standard error comes from the variance of each. In memory are two blocks.
    """
    count, kernel = max(1, min(len(x), len(y)) // block), polynomial()
    scores = [MMD(_block(y, i, count), kernel)(_block(x, i, count)) for i in range(count)]
    return Score(sum(s.mean for s in scores) / count, math.sqrt(sum(s.stderr**2 for s in scores)) / count)


def _block(rows: Rows, i: int, count: int) -> Tensor:
    return rows[len(rows) * i // count : len(rows) * (i + 1) // count]


def median_distance(x: Tensor, most: int = 1000) -> float:
    """Median Euclidean distance between the first ``most`` rows of x (n, d): the usual bandwidth where none is known."""
    return float(torch.pdist(x[:most].double()).median())


def bandwidth_scan(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> list[Score]:
    """Squared MMD at each bandwidth; the paper's rule (Fig. 8) keeps the one where data against N(0, I) is largest."""
    return [mmd(x, y, bandwidth) for bandwidth in bandwidths]
