r"""The Frechet distance of two sets through their means and covariances, :math:`\|\mu_1-\mu_2\|^2+\mathrm{tr}(C_1+C_2-2(C_1C_2)^{1/2})`.

With :math:`C_i=L_iL_i^T` the eigenvalues of :math:`C_1C_2` are the squared singular values of :math:`L_1^TL_2`, so the trace of the root is
their sum: no matrix root, no complex number, and no square root of rounding errors where the covariances have no full rank. Statistics are float64
sums in one pass over the rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive_diffusion.metrics.scores import Replicates, Rows

CHUNK = 2**20  # numbers held in float64 at a time
STRIPE = 256  # rows of a covariance that are added to at a time


class Moments:
    """Count, mean and covariance of rows (n, d), added in any chunks; float64 about ``centre`` (d,), which makes large means harmless.

    ``scatter`` holds the upper triangle in stripes; ``cov`` is whole.
    """

    def __init__(self, centre: Tensor):
        self.n, self.centre = 0, centre.double()
        self.total = torch.zeros_like(self.centre)
        self.scatter = torch.zeros(len(centre), len(centre), dtype=torch.float64, device=centre.device)

    def add(self, x: Tensor) -> "Moments":
        """Adds rows (n, d), in place."""
        x = x - self.centre  # float64, in one allocation
        self.n += len(x)
        self.total += x.sum(0)
        for start in range(0, x.shape[1], STRIPE):  # the upper triangle in stripes, half the work of the whole
            self.scatter[start : start + STRIPE, start:].addmm_(x[:, start : start + STRIPE].T, x[:, start:])
        return self

    def minus(self, part: "Moments") -> "Moments":
        """What is left without ``part`` of the rows, which has the same centre."""
        rest = Moments.__new__(Moments)
        rest.n, rest.centre, rest.total, rest.scatter = self.n - part.n, self.centre, self.total - part.total, self.scatter - part.scatter
        return rest

    @property
    def mean(self) -> Tensor:
        return self.centre + self.total / self.n

    @property
    def cov(self) -> Tensor:
        """With n - 1."""
        if self.n < 2:
            raise ValueError(f"given {self.n} samples, expected at least 2 for a covariance")
        cov = torch.addr(self.scatter, self.total, self.total, alpha=-1 / self.n).div_(self.n - 1)
        for start in range(0, len(cov), STRIPE):
            cov[start + STRIPE :, start : start + STRIPE] = cov[start : start + STRIPE, start + STRIPE :].T
        return cov


def moments(x: Rows, centre: Tensor | None = None) -> Moments:
    """Moments of x (n, d) in one pass; ``centre`` is its first row by default."""
    found = Moments(x[0:1][0] if centre is None else centre)
    size = max(1, CHUNK // len(found.centre))
    for start in range(0, len(x), size):
        found.add(x[start : start + size])
    return found


class Frechet:
    """Distance to the Gaussian of ``mean`` (d,) and ``cov`` (d, d), whose factor is computed once."""

    def __init__(self, mean: Tensor, cov: Tensor):
        self.mean, cov = mean.double(), cov.double()
        self.trace, self.factor = float(cov.trace()), _factor(cov)

    def __call__(self, mean: Tensor, cov: Tensor) -> float:
        if mean.shape != self.mean.shape or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"given a mean {tuple(mean.shape)} and covariance {tuple(cov.shape)}, expected dimension {len(self.mean)}")
        cov = cov.double()
        trace, factor = float(cov.trace()), _factor(cov)
        del cov
        product = factor.T @ self.factor
        del factor  # a quarter of what is held
        root = torch.linalg.svdvals(product).sum()
        return float((mean.double() - self.mean).square().sum()) + trace + self.trace - 2 * float(root)


def _factor(cov: Tensor) -> Tensor:
    """L (d, r) with cov = L L^T: Cholesky's, or by eigenvectors where the covariance has no full rank."""
    factor, failed = torch.linalg.cholesky_ex(cov)
    if not int(failed):
        return factor
    values, vectors = torch.linalg.eigh(cov)
    kept = values > max(float(values[-1]), 0.0) * len(cov) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    r"""Frechet distance of two Gaussians, means (d,), covariances (d, d)."""
    return Frechet(mu2, cov2)(mu1, cov1)


def frechet_replicates(x: Rows, to: Frechet, blocks: Sequence[tuple[int, int]]) -> Replicates:
    """Frechet distance of rows x (n, d) to ``to``, whole and without each of ``blocks``.

    The mean and covariance of n samples make it too large, by b / n to first order; ``extrapolated`` is without that term. It holds three
    (d, d) matrices besides the reference's, however many blocks.
    """
    whole = moments(x)

    def without(begin: int, end: int) -> float:
        rest = whole.minus(moments(_Part(x, begin, end), whole.centre))
        return to(rest.mean, rest.cov)

    return Replicates(to(whole.mean, whole.cov), torch.tensor([without(*block) for block in blocks], dtype=torch.float64))


class _Part:
    """Rows [begin, end) of others, still not in memory."""

    def __init__(self, rows: Rows, begin: int, end: int):
        self.rows, self.begin, self.end = rows, begin, end

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, part: slice) -> Tensor:
        begin, end, _ = part.indices(len(self))
        return self.rows[self.begin + begin : self.begin + end]
