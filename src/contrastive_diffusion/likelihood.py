r"""What a denoiser says about densities: denoising errors, nll, likelihood ratios, noise posteriors, each with its standard error.

An optimal denoiser fixes the density of the data and of its noised versions (Kong et al. 2023; Wu et al. 2024, Eq. 2, 3):

.. math:: -\log p_\zeta(x) = c + \tfrac12\int E_\epsilon\|\epsilon - b\,\hat\epsilon(z_\alpha,\beta)\|^2 d\alpha,
          \qquad z_\alpha=\sqrt{\sigma(\alpha)}x+\sqrt{\sigma(-\alpha)}\epsilon,

with :math:`(\beta, b)` of ``channel.compose(alpha, zeta)`` and the same c for every :math:`\zeta`. Their differences are likelihood
ratios; the paper's Eq. 8 lacks the 1/2. Both terms of a ratio are read at the SAME :math:`(\alpha,\epsilon)`, which removes most of the
variance. The integral runs over the whole line: points follow a plateau with exponential tails, one per stratum, so nothing is
truncated and the estimate is unbiased for any denoiser whose error settles in the tails (networks: see ``denoisers.Bounded``).
Where the plateau lies decides the variance only: from below the coarser to above the finer of the two scales at which the integrand
changes, :math:`\zeta` and the data's finest detail.

Two more devices, both without bias. Neighbouring strata share their noise up to its sign, so what is odd in :math:`\epsilon` cancels. What
is left is mostly quadratic, so a control variate takes out the best combination of :math:`\epsilon_i^2-1` (mean zero), smooth in
:math:`\alpha`; its coefficients are fitted on the even pairs of all rows and used on the odd ones, and the other way round.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.channel import as_logsnr, compose, corrupt, per_row
from contrastive_diffusion.denoisers import Denoiser, check_data, evaluate, finest_of, take, unit_noise
from contrastive_diffusion.errors import require
from contrastive_diffusion.schedules import Plateau, slope

MARGIN = 3.0  # nats by which the plateau reaches beyond the scales it must cover
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
        evals: denoiser evaluations per row, at least 8 (two pairs of points of two evaluations each).
        finest: log-SNR of the data's finest detail; ``finest_of(denoiser)`` by default. Affects the variance only.
        max_rows: rows per denoiser call; bounds memory.

    Raises:
        UsageError: for empty, non-finite or non-floating x, zeta out of range, evals too small.
    """
    points = _points(evals, 2, "two pairs of points of two evaluations each")
    zeta = _level(zeta, check_data(x))
    finest = finest_of(denoiser) if finest is None else finest
    low, high = zeta.clamp(max=finest)[:, None] - MARGIN, finest + MARGIN
    alike = bool((zeta == zeta[0]).all())  # rows of different zeta have no coefficients in common
    parts = []
    for rows in _chunks(len(x), max_rows // (2 * points)):
        law = Plateau(low[rows], high)
        logsnr, weight, eps, z = _draw(x[rows], law, points, generator)
        beta, b = compose(logsnr, zeta[rows, None])
        clean, noised = _read(denoiser, z, torch.stack([logsnr, beta]), max_rows, rows.start)
        noised = noised * per_row(b, z)
        # |eps - clean|^2 - |eps - noised|^2 as a product: no cancellation of squares where the two levels meet.
        value = 0.5 * weight.to(x.dtype) * ((noised - clean) * (2 * eps - clean - noised)).flatten(2).sum(2)
        parts.append(_controlled(value, law, logsnr, weight, eps) if alike else _pairs(value))
    return _mean(parts, 2 * points)


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
        evals: denoiser evaluations per row, at least 4. Others as for ``llr``.
    """
    points, dim = _points(evals, 1, "two pairs of points"), check_data(x)[0].numel()
    spectrum = torch.zeros(dim) if spectrum is None else torch.as_tensor(spectrum)
    require(spectrum.shape == (dim,), f"a spectrum of shape {tuple(spectrum.shape)}", f"({dim},), one log-eigenvalue per dimension of x")
    spectrum = spectrum.to(x.device, torch.float64)
    finest = finest_of(denoiser) if finest is None else finest
    entropy = 0.5 * (dim * torch.log(torch.tensor(2 * torch.pi * torch.e, dtype=torch.float64)) + spectrum.sum()).to(x.device)
    law = Plateau(min(float((-spectrum).min()), finest) - MARGIN, max(float((-spectrum).max()), finest) + MARGIN)
    parts = []
    for rows in _chunks(len(x), max_rows // points):
        logsnr, weight, eps, z = _draw(x[rows], law, points, generator)
        (eps_hat,) = _read(denoiser, z, logsnr[None], max_rows, rows.start)
        error = (eps - eps_hat).square().flatten(2).sum(2)
        excess = torch.sigmoid(logsnr - finest).square() * (dim - eps.square().flatten(2).sum(2))
        baseline = torch.sigmoid(logsnr[..., None] + spectrum).sum(-1)
        parts.append(_controlled(0.5 * (weight * (error + excess - baseline)).to(x.dtype), law, logsnr, weight, eps))
    estimate = _mean(parts, points)
    return Estimate(estimate.mean + entropy.to(x.dtype), estimate.stderr, estimate.evals)


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
    r"""Log-probabilities (B, L) that x was drawn from :math:`p_\zeta` for each of L ``logsnrs``, under equal priors.

    One set of (alpha, eps) serves all levels and only differences between levels enter, so the data itself need not have a density.
    ``evals`` per row, at least 2 L.
    """
    logsnrs = torch.as_tensor(logsnrs, dtype=torch.float64, device=check_data(x).device)
    require(logsnrs.dim() == 1 and len(logsnrs) >= 1, f"logsnrs of shape {tuple(logsnrs.shape)}", "(L,) with L >= 1")
    levels, count = _level(logsnrs, logsnrs[:, None]), len(logsnrs)
    points = _points(evals, count, f"a pair of points, with one evaluation for each of the {count} levels", least=2)
    finest = min(finest_of(denoiser) if finest is None else finest, float(levels.max()))
    law = Plateau(min(float(levels.min()), finest) - MARGIN, finest + MARGIN)
    parts = []
    for rows in _chunks(len(x), max_rows // (count * points)):
        logsnr, weight, eps, z = _draw(x[rows], law, points, generator)
        beta, b = compose(logsnr, levels[:, None, None])  # (L, b, n)
        read = _read(denoiser, z, beta, max_rows, rows.start) * b.reshape(*b.shape, *[1] * (z.dim() - 2)).to(z.dtype)
        gain = (read - read[:1]) * (2 * eps - read - read[:1])
        parts.append((0.5 * weight.to(x.dtype) * gain.flatten(3).sum(3)).mean(2).T)
    return torch.cat(parts).log_softmax(1)


def mse_curve(denoiser: Denoiser, x: Tensor, logsnrs: Tensor, evals: int = 128, generator: torch.Generator | None = None) -> Estimate:
    r""":math:`E_\epsilon\|\epsilon-\hat\epsilon(z_\alpha,\alpha)\|^2` of each row at each of L ``logsnrs``: mean and stderr (B, L).

    ``evals`` per row in all, at least 2 L; every level reads the same noise.
    """
    levels = torch.as_tensor(logsnrs, dtype=torch.float64, device=check_data(x).device)
    n = _points(evals, len(levels), f"two draws at each of {len(levels)} levels", least=2)
    eps = unit_noise((len(x), n, *x.shape[1:]), x, generator)
    out = []
    for level in levels:
        wide = level.expand(len(x), n)
        z = corrupt(x[:, None].expand_as(eps).flatten(0, 1), wide.flatten(), eps.flatten(0, 1)).reshape(eps.shape)
        out.append((eps - _read(denoiser, z, wide[None], 16384)[0]).square().flatten(2).sum(2))
    values = torch.stack(out, 1)  # (B, L, n)
    return Estimate(values.mean(2), values.std(2) / n**0.5, n * len(levels))


def _points(evals: int, per_point: int, why: str, least: int = 4) -> int:
    """The even number of points that ``evals`` pay for."""
    require(evals >= least * per_point, f"evals = {evals}", f"evals >= {least * per_point} ({why})")
    return evals // per_point // 2 * 2


def _level(zeta: Tensor | float, x: Tensor) -> Tensor:
    level = as_logsnr(zeta, len(x), x.device, "zeta")
    require(bool((level.abs() <= LIMIT).all()), f"zeta = {float(level[level.abs().argmax()]):g}", f"log-SNR within +-{LIMIT:g} nats")
    return level


def _chunks(total: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _draw(x: Tensor, law: Plateau, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One point in each n-th of the law for every row: logsnr, weight (b, n) float64; eps, z (b, n, *S). Points 2j and 2j + 1 have noise of opposite sign."""
    device = generator.device if generator is not None else x.device
    u = torch.rand((len(x), n), generator=generator, dtype=torch.float64, device=device).to(x.device)
    logsnr, weight = slope(law, ((torch.arange(n, device=x.device) + u) / n).clamp(1e-12, 1 - 1e-12))
    half = unit_noise((len(x), n // 2, *x.shape[1:]), x, generator)
    eps = torch.stack([half, -half], 2).flatten(1, 2)
    z = corrupt(x[:, None].expand_as(eps).flatten(0, 1), logsnr.flatten(), eps.flatten(0, 1)).reshape(eps.shape)
    return logsnr, weight, eps, z


def _read(denoiser: Denoiser, z: Tensor, logsnr: Tensor, max_rows: int, first: int = 0) -> Tensor:
    """eps_hat at z (b, n, *S) for each of m sets of levels (m, b, n), in one batched call: (m, b, n, *S). Row 0 of z is row ``first`` of x."""
    b, n = z.shape[:2]
    rows = z.flatten(0, 1).repeat(len(logsnr), *[1] * (z.dim() - 2))
    bound = take(denoiser, torch.arange(first, first + b, device=z.device).repeat_interleave(n).repeat(len(logsnr)))
    return evaluate(bound, rows, logsnr.flatten(), max_rows).reshape(len(logsnr), *z.shape)


def _pairs(value: Tensor) -> Tensor:
    """Means of neighbouring points, (b, n) -> (b, n / 2)."""
    return value.unflatten(1, (-1, 2)).mean(2)


def _controlled(value: Tensor, law: Plateau, logsnr: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Pair means (b, n / 2) of weighted integrands (b, n), less the control variate (a constant to the gradient, which it would make noisier)."""
    pairs = _pairs(value)
    features = _features(law, logsnr, weight, eps)
    if features is None:
        return pairs
    even = torch.arange(pairs.shape[1], device=pairs.device) % 2 == 0
    out = torch.empty_like(pairs)
    for fitted, used in ((even, ~even), (~even, even)):
        coefficients = _fit(features[:, fitted], pairs[:, fitted].detach().double())
        out[:, used] = pairs[:, used] - (features[:, used] @ coefficients[..., None]).squeeze(2).to(pairs.dtype)
    return out


def _features(law: Plateau, logsnr: Tensor, weight: Tensor, eps: Tensor) -> Tensor | None:
    """weight * bump_j(logsnr) * (eps_i^2 - 1), averaged over pairs: (b, n / 2, P) float64, mean zero; None with too little to fit them on.

    The bumps are smooth, cover the plateau and vanish beyond it, where weights grow; in more than four dimensions the squares are averaged over i.
    """
    squares = eps.double().square().flatten(2) - 1
    squares = squares if squares.shape[2] <= 4 else squares.mean(2, keepdim=True)
    rows, n, axes = squares.shape
    bumps = min(5, rows * (n // 4 - 1) // (24 * axes))  # 24 differences for each coefficient: fewer do harm
    if bumps < 1:
        return None
    position = (logsnr - law.low) / (law.high - law.low)
    inside = position.clamp(0, 1)
    distance = (inside[..., None] * max(bumps - 1, 1) - torch.arange(bumps, dtype=torch.float64, device=eps.device)).abs()
    bump = (_taper(distance) if bumps > 1 else torch.ones_like(distance)) * _taper(4 * (position - inside).abs())[..., None]
    return (bump[..., None, :] * squares[..., None] * weight[..., None, None]).flatten(2).unflatten(1, (-1, 2)).mean(2)


def _taper(distance: Tensor) -> Tensor:
    """From 1 at distance 0 to 0 at distance 1 and beyond, as a cosine."""
    return 0.5 * (1 + torch.cos(torch.pi * distance.clamp(max=1)))


def _fit(features: Tensor, pairs: Tensor) -> Tensor:
    """Coefficients (b, P) of pairs (b, m) on features (b, m, P): least squares over all rows at unit noise, times a gain in [0, 1] for each row.

    By differences of neighbours, which do not see the trend. The gain leaves alone the rows that the others do not resemble.
    """
    target, design = pairs.diff(dim=1), features.diff(dim=1)
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


def _mean(parts: list[Tensor], evals: int) -> Estimate:
    """Mean over pairs and its standard error, from differences of neighbouring pairs: first ones, or second ones where there are enough.

    Differences do not see the trend across the strata, which is no error of a stratified mean.
    """
    values = torch.cat(parts)
    n = values.shape[1]
    order, norm = (2, 6) if n >= 8 else (1, 2)  # a difference of unit noise has variance 2, a second one 6
    squares = values.detach().diff(n=order, dim=1).square()
    return Estimate(values.mean(1), (squares.mean(1) / (norm * n)).sqrt(), evals)
