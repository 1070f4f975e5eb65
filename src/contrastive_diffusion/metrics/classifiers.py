"""How well scores tell two classes apart, and how honest stated probabilities are, each with its standard error."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.metrics.scores import Score


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
