"""Noise posteriors: how much noise a denoiser sees in a point."""

from collections.abc import Iterator

import torch
from torch import Tensor

from contrastive_diffusion.channel import compose
from contrastive_diffusion.denoisers import Denoiser, check_data, finest_of, take
from contrastive_diffusion.errors import require
from contrastive_diffusion.likelihood.points import MARGIN, chunks, draw, finite, level_of, own_scale, points_for, read
from contrastive_diffusion.schedules import Plateau

PILOT = 16  # points at which the plausible levels are found
PLAUSIBLE = 6.0  # nats below the best level within which a level is looked at again


def noise_posterior(
    denoiser: Denoiser,
    x: Tensor,
    logsnrs: Tensor,
    evals: int = 1024,
    generator: torch.Generator | None = None,
    *,
    finest: float | None = None,
    max_rows: int = 16384,
) -> Tensor:
    r"""Log-probabilities (B, L) that x was drawn from :math:`p_\zeta` for each of L increasing ``logsnrs``, under equal priors.

    One set of (alpha, eps) serves all levels and only differences between levels enter, so the data itself need not have a density.
    ``evals`` per row, at least 4 L; from 64 L on a quarter of them finds the plausible levels, and the rest goes to those.
    """
    logsnrs = torch.as_tensor(logsnrs, dtype=torch.float64, device=check_data(x).device)
    require(logsnrs.dim() == 1 and len(logsnrs) >= 1, f"logsnrs of shape {tuple(logsnrs.shape)}", "(L,) with L >= 1")
    require(bool((logsnrs.diff() > 0).all()), "logsnrs that do not increase", "increasing levels", "sort them")
    levels, count = level_of(logsnrs, logsnrs[:, None]), len(logsnrs)
    finest = finest_of(denoiser) if finest is None else finest
    points_for(evals, count, 1)
    first = evals // 4 if evals // 4 >= PILOT * count else evals  # too few points would miss levels
    posterior = _ladder(denoiser, x, levels.expand(len(x), -1), points_for(first, count, 1), generator, finest, max_rows).log_softmax(1)
    if first == evals:
        return posterior
    for rows, begin, width in _plausible(posterior):
        chosen = begin[:, None] + torch.arange(width, device=x.device)
        before = posterior[rows].gather(1, chosen)
        points = points_for(evals - first, width, 1)
        after = _ladder(take(denoiser, rows), x[rows], levels[chosen], points, generator, finest, max_rows).log_softmax(1)
        refined = (after + before.logsumexp(1, keepdim=True)).to(posterior.dtype)
        posterior[rows] = posterior[rows].scatter(1, chosen, refined)
    return posterior.log_softmax(1)


def _ladder(denoiser: Denoiser, x: Tensor, levels: Tensor, points: int, generator: torch.Generator | None, finest: float, max_rows: int) -> Tensor:
    """log p at each of the increasing levels (b, L) less that at the first: (b, L)."""
    count, parts = levels.shape[1], []
    top = levels[:, -1].clamp(max=finest)
    low, high = torch.minimum(torch.maximum(levels[:, 0], own_scale(x)), top) - MARGIN, top + MARGIN
    for rows in chunks(len(x), max_rows // (count * points)):
        law = Plateau(low[rows, None], high[rows, None])
        logsnr, weight, eps, z = draw(x[rows], law, points, generator, spread=True)
        beta, b = compose(logsnr, levels[rows].T[..., None])  # (L, b, n)
        seen = read(denoiser, z, beta, max_rows, rows.start) * b.reshape(*b.shape, *[1] * (z.dim() - 2)).to(z.dtype)
        gain = (seen[1:] - seen[:-1]) * (2 * eps - seen[1:] - seen[:-1])  # of each level over the one before
        steps = (0.5 * weight.to(x.dtype) * gain.flatten(3).sum(3)).mean(2).T
        parts.append(torch.nn.functional.pad(steps.cumsum(1), (1, 0)))
    return finite(torch.cat(parts))


def _plausible(posterior: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Rows (k,), the first plausible level of each (k,), and how many to look at."""
    count = posterior.shape[1]
    index = torch.arange(count, device=posterior.device)
    kept = posterior > posterior.max(1, keepdim=True).values - PLAUSIBLE
    begin, end = torch.where(kept, index, count).min(1).values, torch.where(kept, index, -1).max(1).values + 1
    width = (end - begin).clamp(min=min(2, count))
    begin = torch.minimum(begin, count - width)
    for size in width.unique().tolist():
        rows = (width == size).nonzero().squeeze(1)
        yield rows, begin[rows], size


def credible_interval(posterior: Tensor, logsnrs: Tensor, mass: float = 0.9) -> tuple[Tensor, Tensor]:
    """The equal-tailed interval (B,), (B,) of log-SNR that holds ``mass`` of a ``noise_posterior`` (B, L) at ``logsnrs`` (L,).

    Each level stands for its cell of the grid (half-way to its neighbours), so the ends are continuous.
    """
    require(0 < mass < 1, f"mass = {mass}", "0 < mass < 1")
    logsnrs = torch.as_tensor(logsnrs, dtype=torch.float64, device=posterior.device)
    require(posterior.dim() == 2 and logsnrs.shape == posterior.shape[1:], f"a posterior of shape {tuple(posterior.shape)}", f"(B, {len(logsnrs)})")
    require(len(logsnrs) >= 2, "one level", "at least two")
    middle = 0.5 * (logsnrs[1:] + logsnrs[:-1])
    edges = torch.cat([2 * logsnrs[:1] - middle[:1], middle, 2 * logsnrs[-1:] - middle[-1:]])
    below = torch.nn.functional.pad(posterior.double().softmax(1).cumsum(1), (1, 0)).clamp(max=1.0)

    def quantile(q: float) -> Tensor:
        cell = ((below < q).sum(1) - 1).clamp(0, len(logsnrs) - 1)
        left, right = below.gather(1, cell[:, None])[:, 0], below.gather(1, cell[:, None] + 1)[:, 0]
        return edges[cell] + ((q - left) / (right - left).clamp_min(1e-300)).clamp(0, 1) * (edges[cell + 1] - edges[cell])

    return quantile(0.5 - mass / 2), quantile(0.5 + mass / 2)
