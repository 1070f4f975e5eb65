"""Likelihoods, of continuous and of 8-bit data, what they say about foreign data, and the error curve over log-SNR that they integrate."""

import math

import torch
from torch import Tensor

from contrastive_diffusion.channel import corrupt, per_row, x_from_eps
from contrastive_diffusion.denoisers import Denoiser, check_data, finest_of
from contrastive_diffusion.errors import choose, require
from contrastive_diffusion.likelihood.control import controlled
from contrastive_diffusion.likelihood.points import (
    GROUP,
    MARGIN,
    Estimate,
    chunks,
    draw,
    estimate_of,
    group_means,
    grouped_noise,
    own_scale,
    points_for,
    read,
    uniform,
)  # fmt: skip
from contrastive_diffusion.likelihood.ratios import llr
from contrastive_diffusion.schedules import Plateau


def nll(
    denoiser: Denoiser,
    x: Tensor,
    evals: int = 128,
    generator: torch.Generator | None = None,
    *,
    spectrum: Tensor | None = None,
    finest: float | None = None,
    max_rows: int = 16384,
) -> Estimate:
    r""":math:`-\log p(x)` in nats, as a correction to a Gaussian with the covariance eigenvalues :math:`e^{\lambda_i}` (Kong et al. 2023).

    :math:`h_g+\frac12\int[E\|\epsilon-\hat\epsilon\|^2-\sum_i\sigma(\alpha+\lambda_i)]d\alpha`, exact for any baseline;
    :math:`h_g=\frac d2\log 2\pi e+\frac12\sum\lambda_i`. Past the finest detail the noise energy :math:`\|\epsilon\|^2` is replaced by its mean d.

    Args:
        spectrum: :math:`\lambda`, log-eigenvalues of the data's covariance, (d,); zeros (unit variance) by default.
        evals: denoiser evaluations per row, at least 8, spent in fours. Others as for ``llr``.
    """
    points, dim = points_for(evals, 1, 2), check_data(x)[0].numel()
    spectrum = torch.zeros(dim) if spectrum is None else torch.as_tensor(spectrum)
    require(spectrum.shape == (dim,), f"a spectrum of shape {tuple(spectrum.shape)}", f"({dim},), one log-eigenvalue per dimension of x")
    spectrum = spectrum.to(x.device, torch.float64)
    finest = finest_of(denoiser) if finest is None else finest
    entropy = 0.5 * (dim * torch.log(torch.tensor(2 * torch.pi * torch.e, dtype=torch.float64)) + spectrum.sum()).to(x.device)
    coarsest = torch.minimum(own_scale(x), -spectrum.exp().mean().log()).clamp(max=finest)
    high = max(float((-spectrum).max()), finest) + MARGIN
    parts = []
    for rows in chunks(len(x), max_rows // points):
        law = Plateau(coarsest[rows, None] - MARGIN, high)
        logsnr, weight, eps, z = draw(x[rows], law, points, generator)
        (eps_hat,) = read(denoiser, z, logsnr[None], max_rows, rows.start)
        error = (eps - eps_hat).square().flatten(2).sum(2)
        excess = torch.sigmoid(logsnr - finest).square() * (dim - eps.square().flatten(2).sum(2))
        baseline = torch.sigmoid(logsnr[..., None] + spectrum).sum(-1)
        parts.append(controlled(0.5 * (weight * (error + excess - baseline)).to(x.dtype), law, logsnr, weight, eps))
    estimate = estimate_of(parts, points)
    return Estimate(estimate.mean + entropy.to(x.dtype), estimate.stderr, estimate.evals)


def discrete_nll(
    denoiser: Denoiser,
    x: Tensor,
    evals: int = 128,
    generator: torch.Generator | None = None,
    *,
    levels: int = 256,
    span: tuple[float, float] = (-1.0, 1.0),
    method: str = "discrete",
    finest: float | None = None,
    max_rows: int = 16384,
) -> Estimate:
    r""":math:`-\log P(x)` in nats of x on a grid of ``levels`` equally spaced values over ``span``, as 8-bit images are: an upper bound.

    ``method``: "discrete", :math:`\frac12\int e^\alpha E\|x-\hat x_D\|^2d\alpha` with :math:`\hat x` pulled to the grid where the channel resolves it (soft
    rounding; Kong et al. 2023); needs no density. "dequantised", ``nll`` of x with uniform noise of one grid step, less d log step.
    "continuous", ``nll`` of x itself less d log step: no bound, for comparison only. Divide by d log 2 for bits per dimension.

    Raises:
        UsageError: for x off the grid or outside ``span``, besides those of ``nll``.
    """
    choose(method, ("continuous", "dequantised", "discrete"), "method")
    low, high = span
    require(levels >= 2 and low < high, f"{levels} levels over {span}", "at least 2 levels over a rising span")
    step, dim = (high - low) / (levels - 1), check_data(x)[0].numel()
    place = (x - low) / step
    outside = bool((place < -0.01).any() or (place > levels - 0.99).any())
    require(
        not outside, f"values from {float(x.min()):.3g} to {float(x.max()):.3g}", f"values in [{low:g}, {high:g}]", "scale bytes by v / 127.5 - 1"
    )
    require(
        float((place - place.round()).abs().max()) < 0.02,
        f"values off the grid of {levels} levels",
        f"multiples of {step:.4g} from {low:g}",
        "noised data has no discrete likelihood",
    )
    if method != "discrete":
        noise = uniform(tuple(x.shape), x, generator).to(x.dtype) - 0.5 if method == "dequantised" else 0.0
        found = nll(denoiser, x + step * noise, evals, generator, finest=finest, max_rows=max_rows)
        return Estimate(found.mean - dim * math.log(step), found.stderr, found.evals)
    points, parts = points_for(evals, 1, 2), []
    resolved = math.log(160 / step**2)  # log-SNR at which neighbouring levels are 9 standard deviations apart from half-way
    for rows in chunks(len(x), max_rows // points):
        law = Plateau((own_scale(x[rows]).clamp(max=resolved - 1) - MARGIN)[:, None], resolved)
        logsnr, weight, _, z = draw(x[rows], law, points, generator)
        (eps_hat,) = read(denoiser, z, logsnr[None], max_rows, rows.start)
        level = logsnr.flatten()
        x_hat = x_from_eps(z.flatten(0, 1).double(), level, eps_hat.flatten(0, 1).double()).unflatten(0, logsnr.shape)
        decoded = _soft_round(x_hat, per_row(logsnr.exp() + 1, x_hat), low, step, levels)
        error = logsnr.exp() * (x[rows, None].double() - decoded).square().flatten(2).sum(2)
        parts.append(group_means((0.5 * weight * error).to(x.dtype)))
    return estimate_of(parts, points)


def _soft_round(x: Tensor, precision: Tensor, low: float, step: float, levels: int) -> Tensor:
    """The mean of the grid's values weighted by exp(-precision (x - value)^2 / 2); where that is wider than two steps, x kept inside the grid."""
    inside = x.clamp(low, low + step * (levels - 1))
    nearest = ((inside - low) / step).round()
    top, total, moment = torch.full_like(x, -torch.inf), torch.zeros_like(x), torch.zeros_like(x)
    for offset in range(-min(12, levels - 1), min(12, levels - 1) + 1):
        place = nearest + offset
        value = low + step * place
        score = torch.where((place >= 0) & (place < levels), -0.5 * precision * (x - value).square(), -torch.inf)
        new = torch.maximum(top, score)
        shrink, gain = torch.exp(torch.where(top.isinf(), -torch.inf, top - new)), torch.exp(torch.where(score.isinf(), -torch.inf, score - new))
        top, total, moment = new, total * shrink + gain, moment * shrink + gain * value
    return torch.where(precision * step**2 < 0.25, inside, moment / total)


def ood_score(
    denoiser: Denoiser,
    x: Tensor,
    kind: str = "nll",
    evals: int = 128,
    generator: torch.Generator | None = None,
    *,
    zeta: float = 0.0,
    finest: float | None = None,
) -> Estimate:
    r"""How foreign x (B, *S) is to the law of ``denoiser``, in nats: higher is more foreign.

    ``kind``: "nll", :math:`-\log p(x)`; or "llr", :math:`\log p_\zeta(x)-\log p(x)`, how much better the law noised to ``zeta`` explains x: what
    both share, such as smoothness or brightness, cancels. Needs no threshold for ranking; see ``metrics.auroc``.
    """
    choose(kind, ("llr", "nll"), "kind")
    if kind == "llr":
        return llr(denoiser, x, zeta, evals, generator, finest=finest)
    return nll(denoiser, x, evals, generator, finest=finest)


def mse_curve(denoiser: Denoiser, x: Tensor, logsnrs: Tensor, evals: int = 128, generator: torch.Generator | None = None) -> Estimate:
    r""":math:`E_\epsilon\|\epsilon-\hat\epsilon(z_\alpha,\alpha)\|^2` of each row at each of L ``logsnrs``: mean and stderr (B, L).

    ``evals`` per row in all, at least 8 L; every level reads the same noise, in groups of four radii at quantiles that balance.
    """
    levels = torch.as_tensor(logsnrs, dtype=torch.float64, device=check_data(x).device)
    n = points_for(evals, len(levels), 2)
    eps = grouped_noise(x, n, generator, even=True)
    out = []
    for level in levels:
        wide = level.expand(len(x), n)
        z = corrupt(x[:, None].expand_as(eps).flatten(0, 1), wide.flatten(), eps.flatten(0, 1)).reshape(eps.shape)
        out.append((eps - read(denoiser, z, wide[None], 16384)[0]).square().flatten(2).sum(2))
    groups = torch.stack(out, 1).unflatten(2, (-1, GROUP)).mean(3)  # (B, L, n / GROUP)
    return Estimate(groups.mean(2), groups.detach().std(2) / groups.shape[2] ** 0.5, n * len(levels))
