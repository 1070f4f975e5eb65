r"""Slopes L of a round: how much of a state's correction is taken to pass on to the next state.

Any finite L gives the same limit and the same exactness; the closer L is to :math:`d\Phi/dz`, the fewer rounds. With eps_hat held a step has the
slope "eps", with x_hat held "x0"; the slope for standard normal data, whose denoiser is noise * z, lies between them ("gauss"), and Picard's
is 1. "secant" is measured: the least-squares scalar of the last two iterates of the same state, per sample and step (and channel, on
request), within [x0, 2 eps - x0], where every denoiser with :math:`|d\hat\epsilon/dz|\le 1/\sqrt{\sigma(-\alpha)}` has it; "gauss" before there are two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.channel import noise, signal
from contrastive_diffusion.solvers import StepMap, ddim, ddpm


@dataclass(frozen=True)
class Tables:
    """What a round needs to know of each step (T,), float64: slopes with x_hat held (``x0``), eps_hat held (``eps``), of standard normal data (``gauss``);
    ``a`` and ``b``: the next state is a z + b output + noise, b summed over remembered outputs; ``spread`` of that noise; ``signal``, ``sigma``: scales of the
    step's own level; ``after``: signal scale of the next one; ``variance``: of the DDPM posterior of the step, the unit of the tolerance."""

    x0: Tensor
    eps: Tensor
    gauss: Tensor
    a: Tensor
    b: Tensor
    spread: Tensor
    signal: Tensor
    sigma: Tensor
    after: Tensor
    variance: Tensor
    to_x: tuple[Tensor, Tensor]  # x_hat = to_x[0] z + to_x[1] output

    def low(self) -> Tensor:
        return torch.minimum(self.x0, 2 * self.eps - self.x0)

    def high(self) -> Tensor:
        return torch.maximum(self.x0, 2 * self.eps - self.x0)


def tables(step: StepMap) -> Tables:
    """The tables of a step map. A map that is no table is read as its next state, a = 0 and b = 1, beside DDIM's slopes."""
    level, after = step.logsnr, step.logsnr_next
    sigma, scale = noise(level), signal(level)
    if step.table is None:
        a, b, _ = ddim().coefficients(level, after)
        x0, eps, spread = a + b / sigma, a, torch.zeros_like(a)
        to_x = (1 + a * sigma / b) / scale, -sigma / b / scale  # the eps_hat that DDIM would need to get there
        own = torch.zeros_like(a), torch.ones_like(a)
    else:
        a, b, spread = step.table[0], step.table[1].sum(1), step.table[2]
        on_eps = step.output == "eps"
        x0, eps = (a + b / sigma, a) if on_eps else (a, a + b / scale)
        to_x = (1 / scale, -sigma / scale) if on_eps else (torch.zeros_like(a), torch.ones_like(a))
        own = a, b
    return Tables(x0, eps, eps + (x0 - eps) * sigma.square(), *own, spread, scale, sigma, signal(after), posterior_variance(step.grid), to_x)


def posterior_variance(grid: Tensor) -> Tensor:
    """Variance of the DDPM posterior of each step (T,), float64; the last one's, which has none, is its predecessor's."""
    variance = ddpm("posterior").coefficients(grid[:-1].double(), grid[1:].double())[2].square()
    if bool(grid[-1].isinf()):
        variance[-1] = variance[-2] if len(variance) > 1 else 1.0
    return variance


@dataclass(frozen=True)
class Slope:
    """``first(tables) -> (T,)``: the slope before anything is measured; ``measured``: whether two visits replace it."""

    first: Callable[[Tables], Tensor]
    measured: bool = False


SLOPES: dict[str, Slope] = {
    "eps": Slope(lambda t: t.eps),
    "gauss": Slope(lambda t: t.gauss),
    "picard": Slope(lambda t: torch.ones_like(t.eps)),
    "secant": Slope(lambda t: t.gauss, measured=True),
    "x0": Slope(lambda t: t.x0),
}
