r"""The control variate: what is quadratic in the noise and smooth in log-SNR, with mean zero, taken out of groups of readings."""

import torch
from torch import Tensor

from contrastive_diffusion.likelihood.points import GROUP, group_means
from contrastive_diffusion.schedules import Plateau


def controlled(value: Tensor, law: Plateau, logsnr: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
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
