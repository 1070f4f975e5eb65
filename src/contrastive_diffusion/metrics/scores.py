r"""Numbers with their errors: means, Student's intervals, and the delete-block jackknife.

A statistic :math:`\theta` of n samples, computed again without each of G blocks, gives pseudo-values
:math:`G\theta-(G-1)\theta_{(-g)}`: their spread is the standard error of :math:`\theta`, and their mean is free of a bias that falls as 1/n
(Quenouille 1956; Efron 1982). Blocks are runs of consecutive sample ids, so two sets drawn with the same seeds have blocks that pair.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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
    score = average(values)
    half = _quantile(len(values) - 1) * score.stderr
    return Interval(score.mean, score.mean - half, score.mean + half)


def _quantile(dof: int) -> float:
    # beyond the table: Cornish and Fisher's expansion, right to 4e-5 there
    return STUDENT[dof - 1] if dof <= len(STUDENT) else 1.959964 + 2.37227 / dof + 2.8227 / dof**2 + 2.556 / dof**3


class Rows(Protocol):
    """Features (n, d) that need not be in memory at once: a tensor, or anything with a length and slices that are tensors."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Tensor: ...


def bounds(n: int, blocks: int) -> list[tuple[int, int]]:
    """Consecutive blocks [from, to) of n rows, whose sizes differ by one at most; ``blocks`` in 2 .. n."""
    if not 2 <= blocks <= n:
        raise ValueError(f"given {blocks} blocks of {n} samples, expected 2 .. n")
    edges = [n * g // blocks for g in range(blocks + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


@dataclass(frozen=True)
class Replicates:
    """A statistic of n samples, ``value``, and the same without each of G blocks of about n / G, ``without`` (G,) float64."""

    value: float
    without: Tensor

    @property
    def pseudo(self) -> Tensor:
        """Pseudo-values (G,), nearly independent; for a mean over samples they are the means of the blocks."""
        g = len(self.without)
        return g * self.value - (g - 1) * self.without

    @property
    def stderr(self) -> float:
        """Standard error over the samples; the reference is taken as it is. Too wide rather than too narrow where the value is near zero."""
        return average(self.pseudo).stderr

    @property
    def extrapolated(self) -> float:
        """The value at n -> infinity if its bias falls as 1/n: the straight line in 1/n through n and n (G - 1) / G."""
        return float(self.pseudo.mean())

    @property
    def bias(self) -> float:
        """What the finite number of samples adds to ``value``."""
        return self.value - self.extrapolated

    def interval(self, unbiased: bool = False) -> Interval:
        """Student's 95 % interval around ``value``, or around ``extrapolated``."""
        centre, half = self.extrapolated if unbiased else self.value, _quantile(len(self.without) - 1) * self.stderr
        return Interval(centre, centre - half, centre + half)

    def minus(self, other: "Replicates") -> "Replicates":
        """The difference of a statistic between two sets whose blocks pair."""
        if len(self.without) != len(other.without):
            raise ValueError(f"given {len(self.without)} and {len(other.without)} blocks, expected as many")
        return Replicates(self.value - other.value, self.without - other.without)


def of_blocks(values: Tensor | Sequence[float], sizes: Sequence[int]) -> Replicates:
    """Replicates of a mean, from the mean (G,) over each block and its size."""
    weight, values = torch.tensor(sizes, dtype=torch.float64), torch.as_tensor(values, dtype=torch.float64)
    total, n = float((values * weight).sum()), float(weight.sum())
    return Replicates(total / n, (total - values * weight) / (n - weight))
