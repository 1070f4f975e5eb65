"""Where the integrals over log-SNR are read and how readings become estimates: equally spaced points, noise in groups of four, standard errors."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.channel import as_logsnr, corrupt
from contrastive_diffusion.denoisers import Denoiser, evaluate, take, unit_noise
from contrastive_diffusion.errors import RunError, require
from contrastive_diffusion.schedules import Plateau, slope

MARGIN = 1.5  # nats by which the plateau reaches beyond the scales it must cover
GROUP = 4  # neighbouring points that share their noise
SPREAD = (0.7548776662466927, 0.5698402909980532)  # 1/g, 1/g^2 with g^3 = g + 1: the two-dimensional golden ratio (Roberts 2018)
LIMIT = 30.0  # |zeta| (nats) beyond which float32 data cannot tell the levels apart


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo result in nats: ``mean`` and ``stderr`` (B,) or (B, L), ``evals`` denoiser evaluations spent per row of x."""

    mean: Tensor
    stderr: Tensor
    evals: int


def points_for(evals: int, per_point: int, groups: int) -> int:
    """The points, in whole groups, that ``evals`` pay for."""
    least = groups * GROUP * per_point
    why = f"{groups} group{'s' * (groups > 1)} of {GROUP} points with {per_point} evaluation{'s' * (per_point > 1)} each"
    require(evals >= least, f"evals = {evals}", f"evals >= {least} ({why})")
    return evals // per_point // GROUP * GROUP


def level_of(zeta: Tensor | float, x: Tensor) -> Tensor:
    level = as_logsnr(zeta, len(x), x.device, "zeta")
    require(bool((level.abs() <= LIMIT).all()), f"zeta = {float(level[level.abs().argmax()]):g}", f"log-SNR within +-{LIMIT:g} nats")
    return level


def chunks(total: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def own_scale(x: Tensor) -> Tensor:
    """The log-SNR (B,) at which x itself is as large as the noise: below it the integrand fades."""
    return -x.double().square().flatten(1).mean(1).clamp_min(1e-12).log()


def draw(x: Tensor, law: Plateau, n: int, generator: torch.Generator | None, spread: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n equally spaced points of the law with one random shift a row: logsnr, weight (b, n) float64; eps, z (b, n, *S)."""
    shift = uniform((len(x), 1), x, generator)
    logsnr, weight = slope(law, ((torch.arange(n, device=x.device) + shift) / n).clamp(1e-12, 1 - 1e-12))
    eps = grouped_noise(x, n, generator, spread)
    z = corrupt(x[:, None].expand_as(eps).flatten(0, 1), logsnr.flatten(), eps.flatten(0, 1)).reshape(eps.shape)
    return logsnr, weight, eps, z


def grouped_noise(x: Tensor, n: int, generator: torch.Generator | None, spread: bool = False, even: bool = False) -> Tensor:
    """Unit noise (b, n, *S) in groups u, -u, v, -v with u, v orthogonal and opposite quantiles of the radius; each point is exactly N(0, I).

    Groups are independent; or ``spread``: their radii, and in two dimensions their angles, are a shifted low-discrepancy sequence. That is
    more exact, but the differences of neighbours then say little about the error. ``even``: the radii of u and -u are at opposite quantiles
    as well. Integrals over levels are mostly odd in the noise, which equal radii cancel; the error at one fine level is mostly even.
    """
    dim, count = x[0].numel(), n // GROUP
    first, second = unit_noise((2, len(x), count, dim), x, generator)
    quantile = uniform((len(x), count, 1), x, generator)
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
    inner, outer = (radius(q.clamp(1e-12, 1 - 1e-12), dim).to(x.dtype) for q in (quantiles, 1 - quantiles))
    u, v = first * inner[0], second * outer[-1]
    back = (first * outer[0], second * inner[-1]) if even else (u, v)
    return torch.stack([u, -back[0], v, -back[1]], 2).reshape(len(x), n, *x.shape[1:])


def uniform(shape: tuple[int, ...], x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform float64 numbers inside (0, 1) on the device of x, drawn on that of the generator."""
    device = generator.device if generator is not None else x.device
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device).to(x.device).clamp(1e-12, 1 - 1e-12)


def radius(quantile: Tensor, dim: int) -> Tensor:
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


def read(denoiser: Denoiser, z: Tensor, logsnr: Tensor, max_rows: int, first: int = 0) -> Tensor:
    """eps_hat at z (b, n, *S) for each of m sets of levels (m, b, n), in one batched call: (m, b, n, *S). Row 0 of z is row ``first`` of x."""
    b, n = z.shape[:2]
    rows = z.flatten(0, 1).repeat(len(logsnr), *[1] * (z.dim() - 2))
    bound = take(denoiser, torch.arange(first, first + b, device=z.device).repeat_interleave(n).repeat(len(logsnr)))
    return evaluate(bound, rows, logsnr.flatten(), max_rows).reshape(len(logsnr), *z.shape)


def group_means(value: Tensor) -> Tensor:
    """Means of groups of neighbouring points, (b, n) -> (b, n / GROUP)."""
    return value.unflatten(1, (-1, GROUP)).mean(2)


def finite(values: Tensor) -> Tensor:
    """values (B, ...) if all are finite."""
    bad = (~values.isfinite().flatten(1).all(1)).nonzero()
    if len(bad):
        raise RunError(
            f"given non-finite estimates in {len(bad)} of {len(values)} rows, first row {int(bad[0])}, expected finite numbers; check the denoiser"
        )
    return values


def estimate_of(parts: list[Tensor], evals: int) -> Estimate:
    """Mean over groups and its standard error, from differences of neighbouring groups, which do not see the trend along the law.

    The trend is no error of equally spaced points. Differences of order k of unit noise have variance (2k choose k).
    """
    groups = finite(torch.cat(parts))
    n = groups.shape[1]
    order = min(3, max(1, n // 2))
    squares = groups.detach().diff(n=order, dim=1).square()
    return Estimate(groups.mean(1), (squares.mean(1) / (math.comb(2 * order, order) * n)).sqrt(), evals)
