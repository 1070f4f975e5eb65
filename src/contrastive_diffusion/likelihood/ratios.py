"""Log-likelihood ratios of a law and its noised version."""

import torch
from torch import Tensor

from contrastive_diffusion.channel import compose, per_row
from contrastive_diffusion.denoisers import Denoiser, check_data, finest_of
from contrastive_diffusion.likelihood.control import controlled
from contrastive_diffusion.likelihood.points import MARGIN, Estimate, chunks, draw, estimate_of, group_means, level_of, own_scale, points_for, read
from contrastive_diffusion.schedules import Plateau


def llr(
    denoiser: Denoiser,
    x: Tensor,
    zeta: Tensor | float,
    evals: int = 64,
    generator: torch.Generator | None = None,
    *,
    finest: float | None = None,
    max_rows: int = 16384,
) -> Estimate:
    r""":math:`\log p_\zeta(x)-\log p(x)` in nats, differentiable through ``mean``.

    Args:
        denoiser: of the data p.
        x: (B, *S) clean or noised points; any x, not only likely ones.
        zeta: log-SNR of the noised law, a number or (B,), within +-30 nats.
        evals: denoiser evaluations per row, at least 16 (two groups of four points of two evaluations each); spent in eights.
        finest: log-SNR of the data's finest detail; ``finest_of(denoiser)`` by default. Affects the variance only.
        max_rows: rows per denoiser call; bounds memory.

    Raises:
        UsageError: for empty, non-finite or non-floating x, zeta out of range, evals too small.
    """
    points, zeta = points_for(evals, 2, 2), level_of(zeta, check_data(x))
    alike = bool((zeta == zeta[0]).all())  # rows of different zeta have no coefficients in common
    parts = []
    for rows in chunks(len(x), max_rows // (2 * points)):
        value, law, logsnr, weight, eps = _ratio(denoiser, x[rows], zeta[rows], points, generator, finest, max_rows, rows.start)
        parts.append(controlled(value, law, logsnr, weight, eps) if alike else group_means(value))
    return estimate_of(parts, 2 * points)


def llr_points(
    denoiser: Denoiser,
    x: Tensor,
    zeta: Tensor,
    points: int,
    generator: torch.Generator | None = None,
    *,
    finest: float | None = None,
    through: str = "both",
) -> Tensor:
    """The weighted integrands (B, points) whose mean over a row is its ``llr``, for zeta (B,), from one denoiser call; points in fours.

    ``through``: the reading that carries gradient, "clean" (p's), "noised" (p_zeta's) or "both".
    """
    return _ratio(denoiser, x, level_of(zeta, x), points, generator, finest, 2 * points * len(x), through=through)[0]


def _ratio(
    denoiser: Denoiser,
    x: Tensor,
    zeta: Tensor,
    points: int,
    generator: torch.Generator | None,
    finest: float | None,
    max_rows: int,
    first: int = 0,
    through: str = "both",
) -> tuple[Tensor, Plateau, Tensor, Tensor, Tensor]:
    """The weighted integrands of a ratio (b, points), and the law, levels, weights and noise that they were read at."""
    finest = finest_of(denoiser) if finest is None else finest
    law = Plateau((torch.maximum(zeta, own_scale(x)).clamp(max=finest) - MARGIN)[:, None], finest + MARGIN)
    logsnr, weight, eps, z = draw(x, law, points, generator)
    beta, b = compose(logsnr, zeta[:, None])
    clean, noised = read(denoiser, z, torch.stack([logsnr, beta]), max_rows, first)
    noised = noised * per_row(b, z)
    clean, noised = clean.detach() if through == "noised" else clean, noised.detach() if through == "clean" else noised
    # |eps - clean|^2 - |eps - noised|^2 as a product: no cancellation of squares where the two levels meet.
    value = 0.5 * weight.to(x.dtype) * ((noised - clean) * (2 * eps - clean - noised)).flatten(2).sum(2)
    return value, law, logsnr, weight, eps
