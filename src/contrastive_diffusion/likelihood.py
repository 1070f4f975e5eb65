r"""What a denoiser says about densities: denoising errors, nll, likelihood ratios, noise posteriors, each with its standard error.

An optimal denoiser fixes the density of the data and of its noised versions (Kong et al. 2023; Wu et al. 2024, Eq. 2, 3):

.. math:: -\log p_\zeta(x) = c + \tfrac12\int E_\epsilon\|\epsilon - b\,\hat\epsilon(z_\alpha,\beta)\|^2 d\alpha,
          \qquad z_\alpha=\sqrt{\sigma(\alpha)}x+\sqrt{\sigma(-\alpha)}\epsilon,

with :math:`(\beta, b)` of ``channel.compose(alpha, zeta)`` and the same c for every :math:`\zeta`. Their differences are likelihood
ratios; the paper's Eq. 8 lacks the 1/2. Both terms of a ratio are read at the SAME :math:`(\alpha,\epsilon)`, which removes most of the
variance. The integral runs over the whole line: points follow a plateau with exponential tails, so nothing is truncated and the estimate
is unbiased for any denoiser whose error settles in the tails (networks: see ``denoisers.Bounded``). Where the plateau lies decides the
variance only: from the coarsest scale at which the two laws differ at x to the finer of :math:`\zeta` and the data's finest detail.

Three more devices, all without bias. The points of a row are equally spaced along the law, with one random shift, so a smooth integrand costs
no error. Four neighbours share their noise up to rotation: two orthogonal directions, each with both signs, so what is odd in
:math:`\epsilon` cancels; and the squared radii of the two are opposite quantiles of :math:`\chi^2_d`, so most of what is even cancels too.

In up to four dimensions a control variate takes out what quadratic part is left: the best combination of :math:`\epsilon_i^2-1` (mean
zero), smooth in :math:`\alpha`, its coefficients fitted on the even groups of all rows and used on the odd ones, and the other way round.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.channel import as_logsnr, compose, corrupt, per_row, x_from_eps
from contrastive_diffusion.denoisers import Denoiser, check_data, evaluate, finest_of, take, unit_noise
from contrastive_diffusion.errors import RunError, choose, require
from contrastive_diffusion.schedules import Plateau, slope

MARGIN = 1.5  # nats by which the plateau reaches beyond the scales it must cover
GROUP = 4  # neighbouring points that share their noise
SPREAD = (0.7548776662466927, 0.5698402909980532)  # 1/g, 1/g^2 with g^3 = g + 1: the two-dimensional golden ratio (Roberts 2018)
PILOT = 16  # points at which the plausible levels are found
PLAUSIBLE = 6.0  # nats below the best level within which a level is looked at again
LIMIT = 30.0  # |zeta| (nats) beyond which float32 data cannot tell the levels apart


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo result in nats: ``mean`` and ``stderr`` (B,) or (B, L), ``evals`` denoiser evaluations spent per row of x."""

    mean: Tensor
    stderr: Tensor
    evals: int


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
    points, zeta = _points(evals, 2, 2), _level(zeta, check_data(x))
    alike = bool((zeta == zeta[0]).all())  # rows of different zeta have no coefficients in common
    parts = []
    for rows in _chunks(len(x), max_rows // (2 * points)):
        value, law, logsnr, weight, eps = _ratio(denoiser, x[rows], zeta[rows], points, generator, finest, max_rows, rows.start)
        parts.append(_controlled(value, law, logsnr, weight, eps) if alike else group_means(value))
    return _mean(parts, 2 * points)


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
    return _ratio(denoiser, x, _level(zeta, x), points, generator, finest, 2 * points * len(x), through=through)[0]


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
    law = Plateau((torch.maximum(zeta, _scale(x)).clamp(max=finest) - MARGIN)[:, None], finest + MARGIN)
    logsnr, weight, eps, z = _draw(x, law, points, generator)
    beta, b = compose(logsnr, zeta[:, None])
    clean, noised = _read(denoiser, z, torch.stack([logsnr, beta]), max_rows, first)
    noised = noised * per_row(b, z)
    clean, noised = clean.detach() if through == "noised" else clean, noised.detach() if through == "clean" else noised
    # |eps - clean|^2 - |eps - noised|^2 as a product: no cancellation of squares where the two levels meet.
    value = 0.5 * weight.to(x.dtype) * ((noised - clean) * (2 * eps - clean - noised)).flatten(2).sum(2)
    return value, law, logsnr, weight, eps


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
    points, dim = _points(evals, 1, 2), check_data(x)[0].numel()
    spectrum = torch.zeros(dim) if spectrum is None else torch.as_tensor(spectrum)
    require(spectrum.shape == (dim,), f"a spectrum of shape {tuple(spectrum.shape)}", f"({dim},), one log-eigenvalue per dimension of x")
    spectrum = spectrum.to(x.device, torch.float64)
    finest = finest_of(denoiser) if finest is None else finest
    entropy = 0.5 * (dim * torch.log(torch.tensor(2 * torch.pi * torch.e, dtype=torch.float64)) + spectrum.sum()).to(x.device)
    coarsest = torch.minimum(_scale(x), -spectrum.exp().mean().log()).clamp(max=finest)
    high = max(float((-spectrum).max()), finest) + MARGIN
    parts = []
    for rows in _chunks(len(x), max_rows // points):
        law = Plateau(coarsest[rows, None] - MARGIN, high)
        logsnr, weight, eps, z = _draw(x[rows], law, points, generator)
        (eps_hat,) = _read(denoiser, z, logsnr[None], max_rows, rows.start)
        error = (eps - eps_hat).square().flatten(2).sum(2)
        excess = torch.sigmoid(logsnr - finest).square() * (dim - eps.square().flatten(2).sum(2))
        baseline = torch.sigmoid(logsnr[..., None] + spectrum).sum(-1)
        parts.append(_controlled(0.5 * (weight * (error + excess - baseline)).to(x.dtype), law, logsnr, weight, eps))
    estimate = _mean(parts, points)
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
        noise = _uniform(tuple(x.shape), x, generator).to(x.dtype) - 0.5 if method == "dequantised" else 0.0
        found = nll(denoiser, x + step * noise, evals, generator, finest=finest, max_rows=max_rows)
        return Estimate(found.mean - dim * math.log(step), found.stderr, found.evals)
    points, parts = _points(evals, 1, 2), []
    resolved = math.log(160 / step**2)  # log-SNR at which neighbouring levels are 9 standard deviations apart from half-way
    for rows in _chunks(len(x), max_rows // points):
        law = Plateau((_scale(x[rows]).clamp(max=resolved - 1) - MARGIN)[:, None], resolved)
        logsnr, weight, _, z = _draw(x[rows], law, points, generator)
        (eps_hat,) = _read(denoiser, z, logsnr[None], max_rows, rows.start)
        level = logsnr.flatten()
        x_hat = x_from_eps(z.flatten(0, 1).double(), level, eps_hat.flatten(0, 1).double()).unflatten(0, logsnr.shape)
        decoded = _soft_round(x_hat, per_row(logsnr.exp() + 1, x_hat), low, step, levels)
        error = logsnr.exp() * (x[rows, None].double() - decoded).square().flatten(2).sum(2)
        parts.append(group_means((0.5 * weight * error).to(x.dtype)))
    return _mean(parts, points)


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
    levels, count = _level(logsnrs, logsnrs[:, None]), len(logsnrs)
    finest = finest_of(denoiser) if finest is None else finest
    _points(evals, count, 1)
    first = evals // 4 if evals // 4 >= PILOT * count else evals  # too few points would miss levels
    posterior = _ladder(denoiser, x, levels.expand(len(x), -1), _points(first, count, 1), generator, finest, max_rows).log_softmax(1)
    if first == evals:
        return posterior
    for rows, begin, width in _plausible(posterior):
        chosen = begin[:, None] + torch.arange(width, device=x.device)
        before = posterior[rows].gather(1, chosen)
        points = _points(evals - first, width, 1)
        after = _ladder(take(denoiser, rows), x[rows], levels[chosen], points, generator, finest, max_rows).log_softmax(1)
        refined = (after + before.logsumexp(1, keepdim=True)).to(posterior.dtype)
        posterior[rows] = posterior[rows].scatter(1, chosen, refined)
    return posterior.log_softmax(1)


def _ladder(denoiser: Denoiser, x: Tensor, levels: Tensor, points: int, generator: torch.Generator | None, finest: float, max_rows: int) -> Tensor:
    """log p at each of the increasing levels (b, L) less that at the first: (b, L)."""
    count, parts = levels.shape[1], []
    top = levels[:, -1].clamp(max=finest)
    low, high = torch.minimum(torch.maximum(levels[:, 0], _scale(x)), top) - MARGIN, top + MARGIN
    for rows in _chunks(len(x), max_rows // (count * points)):
        law = Plateau(low[rows, None], high[rows, None])
        logsnr, weight, eps, z = _draw(x[rows], law, points, generator, spread=True)
        beta, b = compose(logsnr, levels[rows].T[..., None])  # (L, b, n)
        read = _read(denoiser, z, beta, max_rows, rows.start) * b.reshape(*b.shape, *[1] * (z.dim() - 2)).to(z.dtype)
        gain = (read[1:] - read[:-1]) * (2 * eps - read[1:] - read[:-1])  # of each level over the one before
        steps = (0.5 * weight.to(x.dtype) * gain.flatten(3).sum(3)).mean(2).T
        parts.append(torch.nn.functional.pad(steps.cumsum(1), (1, 0)))
    return _finite(torch.cat(parts))


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
    n = _points(evals, len(levels), 2)
    eps = _noise(x, n, generator, even=True)
    out = []
    for level in levels:
        wide = level.expand(len(x), n)
        z = corrupt(x[:, None].expand_as(eps).flatten(0, 1), wide.flatten(), eps.flatten(0, 1)).reshape(eps.shape)
        out.append((eps - _read(denoiser, z, wide[None], 16384)[0]).square().flatten(2).sum(2))
    groups = torch.stack(out, 1).unflatten(2, (-1, GROUP)).mean(3)  # (B, L, n / GROUP)
    return Estimate(groups.mean(2), groups.detach().std(2) / groups.shape[2] ** 0.5, n * len(levels))


def _points(evals: int, per_point: int, groups: int) -> int:
    """The points, in whole groups, that ``evals`` pay for."""
    least = groups * GROUP * per_point
    why = f"{groups} group{'s' * (groups > 1)} of {GROUP} points with {per_point} evaluation{'s' * (per_point > 1)} each"
    require(evals >= least, f"evals = {evals}", f"evals >= {least} ({why})")
    return evals // per_point // GROUP * GROUP


def _level(zeta: Tensor | float, x: Tensor) -> Tensor:
    level = as_logsnr(zeta, len(x), x.device, "zeta")
    require(bool((level.abs() <= LIMIT).all()), f"zeta = {float(level[level.abs().argmax()]):g}", f"log-SNR within +-{LIMIT:g} nats")
    return level


def _chunks(total: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _scale(x: Tensor) -> Tensor:
    """The log-SNR (B,) at which x itself is as large as the noise: below it the integrand fades."""
    return -x.double().square().flatten(1).mean(1).clamp_min(1e-12).log()


def _draw(x: Tensor, law: Plateau, n: int, generator: torch.Generator | None, spread: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n equally spaced points of the law with one random shift a row: logsnr, weight (b, n) float64; eps, z (b, n, *S)."""
    shift = _uniform((len(x), 1), x, generator)
    logsnr, weight = slope(law, ((torch.arange(n, device=x.device) + shift) / n).clamp(1e-12, 1 - 1e-12))
    eps = _noise(x, n, generator, spread)
    z = corrupt(x[:, None].expand_as(eps).flatten(0, 1), logsnr.flatten(), eps.flatten(0, 1)).reshape(eps.shape)
    return logsnr, weight, eps, z


def _noise(x: Tensor, n: int, generator: torch.Generator | None, spread: bool = False, even: bool = False) -> Tensor:
    """Unit noise (b, n, *S) in groups u, -u, v, -v with u, v orthogonal and opposite quantiles of the radius; each point is exactly N(0, I).

    Groups are independent; or ``spread``: their radii, and in two dimensions their angles, are a shifted low-discrepancy sequence. That is
    more exact, but the differences of neighbours then say little about the error. ``even``: the radii of u and -u are at opposite quantiles
    as well. Integrals over levels are mostly odd in the noise, which equal radii cancel; the error at one fine level is mostly even.
    """
    dim, count = x[0].numel(), n // GROUP
    first, second = unit_noise((2, len(x), count, dim), x, generator)
    quantile = _uniform((len(x), count, 1), x, generator)
    if spread:
        steps = torch.arange(count, device=x.device)[:, None]
        quantile = ((quantile[:, :1] + steps * SPREAD[0]) % 1).clamp(1e-12, 1 - 1e-12)
        if dim == 2:
            angle = torch.atan2(first[:, :1, 1:], first[:, :1, :1]).double() + 0.5 * torch.pi * (steps * SPREAD[1] % 1)
            first = torch.cat([angle.cos(), angle.sin()], 2).to(x.dtype)
    first = first / first.norm(dim=2, keepdim=True)
    if dim > 1:
        second = second - (second * first).sum(2, keepdim=True) * first
    second = second / second.norm(dim=2, keepdim=True)
    quantiles = torch.stack([quantile, (quantile + 0.5) % 1] if even else [quantile])
    inner, outer = (_radius(q.clamp(1e-12, 1 - 1e-12), dim).to(x.dtype) for q in (quantiles, 1 - quantiles))
    u, v = first * inner[0], second * outer[-1]
    back = (first * outer[0], second * inner[-1]) if even else (u, v)
    return torch.stack([u, -back[0], v, -back[1]], 2).reshape(len(x), n, *x.shape[1:])


def _uniform(shape: tuple[int, ...], x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform float64 numbers inside (0, 1) on the device of x, drawn on that of the generator."""
    device = generator.device if generator is not None else x.device
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device).to(x.device).clamp(1e-12, 1 - 1e-12)


def _radius(quantile: Tensor, dim: int) -> Tensor:
    """The norm of N(0, I_dim) at ``quantile``, float64: Newton's method on the logarithm of the nearer tail of the chi-squared law."""
    if dim <= 2:
        return (2 * torch.erfinv(quantile).square() if dim == 1 else -2 * torch.log1p(-quantile)).sqrt()
    half = torch.full_like(quantile, dim / 2)
    cube = (
        1 - 2 / (9 * dim) + (2 / (9 * dim)) ** 0.5 * torch.special.ndtri(quantile)
    )  # Wilson and Hilferty's start, or the power law of the lower tail
    t = torch.where(cube > 0.3, half * cube.clamp_min(0.3) ** 3, torch.exp((quantile.log() + torch.lgamma(half + 1)) / half))
    for _ in range(6):
        below, above = torch.special.gammainc(half, t), torch.special.gammaincc(half, t)
        density = torch.exp((half - 1) * t.log() - t - torch.lgamma(half))
        lower = t * torch.exp((quantile / below).log() * below / (density * t))
        t = torch.where(quantile < 0.5, lower, t + (above / (1 - quantile)).log() * above / density)
    return (2 * t).sqrt()


def _read(denoiser: Denoiser, z: Tensor, logsnr: Tensor, max_rows: int, first: int = 0) -> Tensor:
    """eps_hat at z (b, n, *S) for each of m sets of levels (m, b, n), in one batched call: (m, b, n, *S). Row 0 of z is row ``first`` of x."""
    b, n = z.shape[:2]
    rows = z.flatten(0, 1).repeat(len(logsnr), *[1] * (z.dim() - 2))
    bound = take(denoiser, torch.arange(first, first + b, device=z.device).repeat_interleave(n).repeat(len(logsnr)))
    return evaluate(bound, rows, logsnr.flatten(), max_rows).reshape(len(logsnr), *z.shape)


def group_means(value: Tensor) -> Tensor:
    """Means of groups of neighbouring points, (b, n) -> (b, n / GROUP)."""
    return value.unflatten(1, (-1, GROUP)).mean(2)


def _controlled(value: Tensor, law: Plateau, logsnr: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Group means (b, n / GROUP) of weighted integrands (b, n), less the control variate (a constant to the gradient, which it would make noisier)."""
    groups = group_means(value)
    features = _features(law, logsnr, weight, eps)
    if features is None:
        return groups
    even = torch.arange(groups.shape[1], device=groups.device) % 2 == 0
    out = torch.empty_like(groups)
    for fitted, used in ((even, ~even), (~even, even)):
        coefficients = _fit(features[:, fitted], groups[:, fitted].detach().double())
        out[:, used] = groups[:, used] - (features[:, used] @ coefficients[..., None]).squeeze(2).to(groups.dtype)
    return out


def _features(law: Plateau, logsnr: Tensor, weight: Tensor, eps: Tensor) -> Tensor | None:
    """weight * bump_j(logsnr) * (eps_i^2 - 1), averaged over groups: (b, n / GROUP, P) float64, mean zero; None where they would do harm.

    The bumps are smooth, cover the plateau and vanish beyond it, where weights grow. In more dimensions the groups cancel enough.
    """
    squares = eps.double().square().flatten(2) - 1
    rows, n, axes = squares.shape
    bumps = min(5, rows * (n // (2 * GROUP) - 2) // (24 * axes))  # 24 differences for each coefficient: fewer do harm
    if bumps < 1 or axes > 4:
        return None
    position = (logsnr - law.low) / (law.high - law.low)
    inside = position.clamp(0, 1)
    distance = (inside[..., None] * max(bumps - 1, 1) - torch.arange(bumps, dtype=torch.float64, device=eps.device)).abs()
    bump = (_taper(distance) if bumps > 1 else torch.ones_like(distance)) * _taper(4 * (position - inside).abs())[..., None]
    return (bump[..., None, :] * squares[..., None] * weight[..., None, None]).flatten(2).unflatten(1, (-1, GROUP)).mean(2)


def _taper(distance: Tensor) -> Tensor:
    """From 1 at distance 0 to 0 at distance 1 and beyond, as a cosine."""
    return 0.5 * (1 + torch.cos(torch.pi * distance.clamp(max=1)))


def _fit(features: Tensor, groups: Tensor) -> Tensor:
    """Coefficients (b, P) of groups (b, m) on features (b, m, P): least squares over all rows at unit noise, times a gain in [0, 1] for each row.

    By second differences of neighbours, which do not see the trend. The gain leaves alone the rows that the others do not resemble.
    """
    target, design = groups.diff(n=2, dim=1), features.diff(n=2, dim=1)
    scale = target.square().mean(1, keepdim=True).sqrt()
    scale = torch.where(scale > 0, scale, torch.inf)  # a row without noise has nothing to fit
    whitened, unit = (target / scale).flatten(), (design / scale[..., None]).flatten(0, 1)
    size = unit.square().mean(0).sqrt().clamp_min(1e-300)
    unit = unit / size
    gram = unit.T @ unit + 1e-3 * len(unit) * torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
    common = torch.linalg.solve(gram, unit.T @ whitened) / size
    predicted = design @ common
    gain = (predicted * target).sum(1) / predicted.square().sum(1).clamp_min(1e-300)
    return gain.clamp(0, 1)[:, None] * common


def _finite(values: Tensor) -> Tensor:
    """values (B, ...) if all are finite."""
    bad = (~values.isfinite().flatten(1).all(1)).nonzero()
    if len(bad):
        raise RunError(
            f"given non-finite estimates in {len(bad)} of {len(values)} rows, first row {int(bad[0])}, expected finite numbers; check the denoiser"
        )
    return values


def _mean(parts: list[Tensor], evals: int) -> Estimate:
    """Mean over groups and its standard error, from differences of neighbouring groups, which do not see the trend along the law.

    The trend is no error of equally spaced points. Differences of order k of unit noise have variance (2k choose k).
    """
    groups = _finite(torch.cat(parts))
    n = groups.shape[1]
    order = min(3, max(1, n // 2))
    squares = groups.detach().diff(n=order, dim=1).square()
    return Estimate(groups.mean(1), (squares.mean(1) / (math.comb(2 * order, order) * n)).sqrt(), evals)
