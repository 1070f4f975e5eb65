r"""The level a denoiser is told, corrected.

A sampler's state is not quite a draw of :math:`p_\alpha` at its nominal level. A denoiser that knows how noisy a point is
(``likelihood.noise_posterior``) can be told the level the state seems to have (``likely_levels``), and one can look for the level that makes
a large step land where the law says (``aligned_levels``). Both give a table of levels, made once and read by ``relevelled``: the solver's
coefficients keep the nominal levels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive_diffusion.channel import noise, signal
from contrastive_diffusion.denoisers import Denoiser, evaluate, like, take
from contrastive_diffusion.errors import require
from contrastive_diffusion.likelihood import noise_posterior
from contrastive_diffusion.solvers import Affine

OFFSETS = tuple(0.5 * k for k in range(-4, 5))


def relevelled(denoiser: Denoiser, nominal: Tensor, fed: Tensor) -> Denoiser:
    """The denoiser read at ``fed`` where it is asked at ``nominal`` (L,) log-SNRs, increasing; linear between, the end's shift beyond."""
    nominal, fed = nominal.double(), fed.double()
    require(
        nominal.dim() == 1 and nominal.shape == fed.shape and len(nominal) > 0, f"levels {tuple(nominal.shape)} and {tuple(fed.shape)}", "two of (L,)"
    )
    require(bool((nominal.diff() > 0).all()), "nominal levels that do not increase", "increasing log-SNRs (L,)")

    def shifted(z: Tensor, logsnr: Tensor) -> Tensor:
        return denoiser(z, (logsnr.double() + interpolate(nominal, (fed - nominal)[:, None], logsnr)[:, 0]).to(logsnr.dtype))

    return like(denoiser, shifted, lambda index: relevelled(take(denoiser, index), nominal, fed))


def interpolate(levels: Tensor, values: Tensor, logsnr: Tensor) -> Tensor:
    """``values`` (L, n) at increasing ``levels`` (L,), linear between and constant beyond, at logsnr (B,): (B, n)."""
    levels, values = levels.to(logsnr.device), values.to(logsnr.device)
    at = logsnr.double().clamp(levels[0], levels[-1])
    right = torch.searchsorted(levels, at.contiguous()).clamp(min(1, len(levels) - 1), len(levels) - 1)
    left = (right - 1).clamp(min=0)
    width = levels[right] - levels[left]
    share = torch.where(width > 0, (at - levels[left]) / torch.where(width > 0, width, 1.0), 0.0).to(values.dtype)[:, None]
    return values[left] * (1 - share) + values[right] * share


def likely_levels(
    denoiser: Denoiser,
    states: Tensor,
    nominal: Tensor,
    offsets: Sequence[float] = OFFSETS,
    evals: int = 512,
    generator: torch.Generator | None = None,
) -> Tensor:
    """For each of L nominal log-SNRs, the level at which its ``states`` (L, B, *S) are most likely: (L,) float64.

    The noise posterior of ``nominal + offsets``, multiplied over the B states, which are taken to share one level; ``evals`` per state, at
    least two for each offset. Pass a sampler's ``path``, at the levels worth correcting. The information is in the dimensions: points in a
    plane need thousands of evaluations each for a level to a quarter of a nat, images few.
    """
    require(len(states) == len(nominal) and states.dim() >= 3, f"states {tuple(states.shape)}, {len(nominal)} levels", "states (L, B, *S), L levels")
    require(len(offsets) >= 2, f"{len(offsets)} offsets", "at least two")
    shifts, found = torch.tensor(sorted(offsets), dtype=torch.float64), []
    for z, level in zip(states, nominal.double(), strict=True):
        posterior = noise_posterior(denoiser, z, float(level) + shifts.to(z.device), evals, generator).double().sum(0).cpu()
        found.append(float(level) + _peak(shifts, posterior))
    return torch.tensor(found, dtype=torch.float64)


def _peak(x: Tensor, y: Tensor) -> float:
    """Where the parabola through the largest of y (n,) and its neighbours peaks; the largest itself at the ends."""
    k = int(y.argmax())
    if k in (0, len(x) - 1):
        return float(x[k])
    (x0, x1, x2), (y0, y1, y2) = x[k - 1 : k + 2].tolist(), y[k - 1 : k + 2].tolist()
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    return x1 - 0.5 * ((x1 - x0) * left - (x1 - x2) * right) / (left - right) if left != right else x1


def aligned_levels(
    denoiser: Denoiser, solver: Affine, grid: Tensor, z: Tensor, energy: float, reach: float = 3.0, generator: torch.Generator | None = None
) -> Tensor:
    r"""The level to read at in each step of ``grid`` so that the state after it has the mean square of the law: (T,) float64.

    The timestep aligner (Xia et al. 2024) in its exact form: its loss matches outputs, whose optimum is not the level that makes the step
    right; this matches :math:`E\|z'\|^2=s'^2E\|x\|^2+\nu'^2d`, greedily along the corrected path, and is exact for a centred Gaussian.

    Args:
        solver: a one-step affine solver (``ddim()``); its own noise enters by its variance.
        z: (n, *S) draws of the law at grid[0]; ``energy``: mean square norm of the data.
        reach: how far from the nominal level to look, nats. Where nothing within reach is right, the nearest to right is taken.
    """
    require(isinstance(solver, Affine), f"solver {solver.name}", "a one-step affine solver, such as ddim or ddpm")
    require(energy > 0 and math.isfinite(energy), f"energy = {energy}", "the mean square norm of the data, > 0")
    a, b, c = (v.tolist() for v in solver.coefficients(grid[:-1].double(), grid[1:].double()))
    targets = (signal(grid[1:].double()).square() * energy + noise(grid[1:].double()).square() * z[0].numel()).tolist()
    found = []
    for i, level in enumerate(grid[:-1].tolist()):

        def after(fed: float, i: int = i, z: Tensor = z) -> Tensor:
            return a[i] * z + b[i] * evaluate(denoiser, z, torch.full((len(z),), fed, dtype=torch.float64, device=z.device))

        def excess(fed: float, i: int = i, z: Tensor = z) -> float:
            return float(after(fed, i, z).double().square().flatten(1).sum(1).mean()) + c[i] ** 2 * z[0].numel() - targets[i]

        fed = _root(excess, level, reach)
        found.append(fed)
        z = after(fed)
        if c[i] > 0:
            z = z + c[i] * torch.randn(z.shape, generator=generator, dtype=z.dtype, device="cpu").to(z.device)
    return torch.tensor(found, dtype=torch.float64)


def _root(function, centre: float, reach: float, cells: int = 12) -> float:
    """The root of ``function`` nearest to ``centre`` within ``reach``, by a scan and bisection; where it is smallest if it has none."""
    points = [centre + reach * (2 * k / cells - 1) for k in range(cells + 1)]
    values = [function(p) for p in points]
    changes = [k for k in range(cells) if values[k] * values[k + 1] <= 0]
    if not changes:
        return points[min(range(cells + 1), key=lambda k: (abs(values[k]), abs(points[k] - centre)))]
    k = min(changes, key=lambda k: abs(points[k] + points[k + 1] - 2 * centre))
    low, high, at_low = points[k], points[k + 1], values[k]
    for _ in range(40):
        middle = (low + high) / 2
        value = function(middle)
        low, high, at_low = (middle, high, value) if value * at_low > 0 else (low, middle, at_low)
    return (low + high) / 2
