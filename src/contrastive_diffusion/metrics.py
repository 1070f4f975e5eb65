r"""Measures of samples and of denoisers, each with its standard error, computed in chunks.

``mmd`` is the unbiased squared maximum mean discrepancy with the Gaussian kernel of the paper's App. B.1,
:math:`k(x,y)=\exp(-\|x-y\|^2/2\sigma^2)`, ``bandwidth`` = :math:`\sigma`. The paper's code uses :math:`\sigma^2=0.03` where its text says
:math:`\sigma=0.03`, and multiplies every value by :math:`1/\sqrt{2\pi\cdot0.03}=2.303`. Functions that compare with a truth take it as any
callable: nothing here imports the rest of the package.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**22


@dataclass(frozen=True)
class Score:
    """A number with its standard error."""

    mean: float
    stderr: float


def average(values: Tensor | Sequence[float]) -> Score:
    """Mean of independent values (n,) with its standard error (NaN for n = 1)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return Score(float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


# The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314)


def interval(values: Tensor | Sequence[float]) -> Interval:
    """Mean of independent values (n >= 2,) with Student's 95 % interval; pass differences for a paired comparison."""
    if len(values) < 2:
        raise ValueError(f"given {len(values)} values, expected at least 2 for an interval")
    score, dof = average(values), len(values) - 1
    # beyond the table: Cornish and Fisher's expansion, right to 4e-5 there
    quantile = STUDENT[dof - 1] if dof <= len(STUDENT) else 1.959964 + 2.37227 / dof + 2.8227 / dof**2 + 2.556 / dof**3
    return Interval(score.mean, score.mean - quantile * score.stderr, score.mean + quantile * score.stderr)


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


def _sums(x: Tensor, y: Tensor, bandwidth: float, same: bool = False) -> _Sums:
    rows, columns, squares = [], torch.zeros(len(y), dtype=torch.float64, device=y.device), 0.0
    size = max(1, CHUNK // max(len(y), 1))
    for start in range(0, len(x), size):
        part = x[start : start + size]
        # Distances by differences where that fits, else by the matrix form: cdist decides; both in the input's dtype.
        kernel = torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist" if x.shape[1] <= 16 else "use_mm_for_euclid_dist")
        kernel = kernel.square_().mul_(-0.5 / bandwidth**2).exp_()
        if same:
            kernel[torch.arange(len(part)), torch.arange(start, start + len(part))] = 0.0
        rows.append(kernel.sum(1, dtype=torch.float64))
        columns += kernel.sum(0, dtype=torch.float64)
        squares += float(kernel.square().sum(dtype=torch.float64))
    return _Sums(torch.cat(rows), columns, squares, len(y) - same, len(x) - same)


class MMD:
    """Squared MMD of samples x (n, *S) to a fixed reference y (m, *S), whose own part is computed once."""

    def __init__(self, y: Tensor, bandwidth: float):
        if not (bandwidth > 0 and math.isfinite(bandwidth)):
            raise ValueError(f"given bandwidth = {bandwidth}, expected a positive number")
        if len(y) < 2:
            raise ValueError(f"given {len(y)} reference samples, expected at least 2")
        self.y, self.bandwidth = y.flatten(1), bandwidth
        self.yy = _sums(self.y, self.y, bandwidth, same=True)

    def __call__(self, x: Tensor) -> Score:
        """Unbiased estimate (it may be negative) and its standard error, from the first- and second-order terms of the U-statistic."""
        x = x.flatten(1).to(self.y.dtype)
        if len(x) < 2 or x.shape[1] != self.y.shape[1]:
            raise ValueError(f"given samples of shape {tuple(x.shape)}, expected (n >= 2, {self.y.shape[1]})")
        n, m, yy = len(x), len(self.y), self.yy
        xx, xy = _sums(x, x, self.bandwidth, same=True), _sums(x, self.y, self.bandwidth)
        residuals = xx.residual(), yy.residual(), xy.residual()
        linear_x = (xx.rows / (n - 1) - xy.rows / m).var() - residuals[0] / (n - 1) - residuals[2] / m
        linear_y = (yy.rows / (m - 1) - xy.columns / n).var() - residuals[1] / (m - 1) - residuals[2] / n
        variance = 4 * (max(float(linear_x), 0.0) / n + max(float(linear_y), 0.0) / m)
        variance += 2 * residuals[0] / (n * (n - 1)) + 2 * residuals[1] / (m * (m - 1)) + 4 * residuals[2] / (n * m)
        return Score(xx.mean() + yy.mean() - 2 * xy.mean(), math.sqrt(variance))


def mmd(x: Tensor, y: Tensor, bandwidth: float) -> Score:
    """Unbiased squared MMD between samples x (n, *S) and y (m, *S), independent of one another."""
    return MMD(y, bandwidth)(x)


def bandwidth_scan(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> list[Score]:
    """Squared MMD at each bandwidth; the paper's rule (Fig. 8) keeps the one where data against N(0, I) is largest."""
    return [mmd(x, y, bandwidth) for bandwidth in bandwidths]


def frechet(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    r"""Frechet distance :math:`\|\mu_1-\mu_2\|^2+\mathrm{tr}(C_1+C_2-2(C_1C_2)^{1/2})` of two Gaussians, means (d,), covariances (d, d)."""
    mu1, cov1, mu2, cov2 = (v.double() for v in (mu1, cov1, mu2, cov2))
    root = torch.linalg.eigvals(cov1 @ cov2).real.clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * root)


def auroc(positive: Tensor, negative: Tensor) -> Score:
    """Probability that a score of ``positive`` (n,) exceeds one of ``negative`` (m,), ties half, with DeLong's standard error."""
    positive, negative = positive.double().flatten(), negative.double().flatten()
    if min(len(positive), len(negative)) < 2:
        raise ValueError(f"given {len(positive)} and {len(negative)} scores, expected at least 2 of each")
    above = _share_below(positive, negative)  # of each positive, the share of negatives below it
    below = 1 - _share_below(negative, positive)
    return Score(float(above.mean()), math.sqrt(float(above.var()) / len(positive) + float(below.var()) / len(negative)))


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    ranked = others.sort().values
    left, right = (torch.searchsorted(ranked, values, right=side) for side in (False, True))
    return 0.5 * (left + right).double() / len(others)


@dataclass(frozen=True)
class Calibration:
    """``error``: expected calibration error; ``chance``: what perfectly calibrated answers of this size would show; per bin ``said`` and ``found``
    (k,) with the ``stderr`` of found and the ``count``."""

    error: Score
    chance: float
    said: Tensor
    found: Tensor
    stderr: Tensor
    count: Tensor


def calibration(probability: Tensor, hit: Tensor, bins: int = 15) -> Calibration:
    """How far stated probabilities (n,) are from the shares of ``hit`` (n,) bool, in ``bins`` of equal count.

    The error is positive even for perfect answers: compare it with ``chance``, its mean for hits drawn at the stated probabilities (normal
    approximation in each bin). Its standard error is its deviation for such hits.
    """
    if probability.shape != hit.shape or probability.dim() != 1 or len(hit) < 2 * bins:
        raise ValueError(f"given {tuple(probability.shape)} probabilities and {tuple(hit.shape)} hits, expected (n,) with n >= {2 * bins}")
    order = probability.double().argsort()
    said, found = (torch.stack([v.mean() for v in values[order].tensor_split(bins)]) for values in (probability.double(), hit.double()))
    count = torch.tensor([len(v) for v in order.tensor_split(bins)], dtype=torch.float64)
    share, spread = count / count.sum(), (said * (1 - said) / count).sqrt()
    chance = float((share * spread).sum()) * math.sqrt(2 / math.pi)  # mean absolute deviation of a normal share
    stderr = float(((share * spread).square() * (1 - 2 / math.pi)).sum().sqrt())
    error = Score(float((share * (said - found).abs()).sum()), stderr)
    return Calibration(error, chance, said, found, (found * (1 - found) / count).sqrt(), count)


def denoiser_error(
    denoiser: Callable[[Tensor, Tensor], Tensor], truth: Callable[[Tensor, Tensor], Tensor], z: Tensor, logsnr: float, chunk: int = 16384
) -> Score:
    r"""Mean :math:`\|\hat\epsilon-\hat\epsilon_{truth}\|^2` at ``logsnr`` (nats) over points z (B, *S) of any other level."""
    parts = []
    with torch.no_grad():
        for zs in z.split(chunk):
            level = torch.full((len(zs),), logsnr, dtype=z.dtype, device=z.device)
            parts.append((denoiser(zs, level) - truth(zs, level)).square().flatten(1).sum(1))
    return average(torch.cat(parts))


def log_density(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Score:
    """Mean exact log-density (nats) of samples x (B, *S), ``log_prob(x) -> (B,)``."""
    return average(log_prob(x))


def off_support(log_prob: Callable[[Tensor], Tensor], x: Tensor, reference: Tensor, level: float = 0.001) -> Score:
    """Share of samples x less likely than the ``level`` quantile of true samples ``reference``; an exact sampler scores ``level``."""
    threshold = log_prob(reference).double().quantile(level)
    return average((log_prob(x).double() < threshold).double())
