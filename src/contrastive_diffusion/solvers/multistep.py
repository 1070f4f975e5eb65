r"""Solvers that reuse outputs of the steps before: as many evaluations as steps, whatever the order.

In :math:`\lambda=\alpha/2` the flow of the data prediction is :math:`d(z/\nu)/d\lambda=e^\lambda\hat x`, with the scales s and
:math:`\nu` of signal and noise, so a step of h nats of :math:`\lambda` is :math:`z'=\frac{\nu'}{\nu}z+s'\int_0^h e^{\tau-h}\hat x\,d\tau`: exact
but for the extrapolation of :math:`\hat x`. The first step, and the one to +inf, hold :math:`\hat x` (first order).
"""

import numpy as np
import torch
from torch import Tensor

from contrastive_diffusion.channel import noise, sigma_of_logsnr, signal
from contrastive_diffusion.errors import require
from contrastive_diffusion.solvers.contract import Coefficients, Multistep


def dpmpp(stochastic: bool = False) -> Multistep:
    r"""DPM-Solver++(2M) of Lu et al. 2022, or its SDE form, in half the log-SNR.

    :math:`\hat x` is extrapolated to the middle of the step, :math:`D=\hat x_i+\frac{h_i}{2h_{i-1}}(\hat x_i-\hat x_{i-1})`. ODE:
    :math:`z'=\frac{\nu'}{\nu}z+s'(1-e^{-h})D`; SDE: :math:`z'=\frac{\nu'}{\nu}e^{-h}z+s'(1-e^{-2h})D+\nu'\sqrt{1-e^{-2h}}\,n`. Both are of
    second order, the SDE form in law (measured on a Gaussian).
    """

    def table(grid: Tensor) -> Coefficients:
        h = 0.5 * grid.diff()
        rate = -torch.expm1(-h * (2 if stochastic else 1))
        gain, ratio = signal(grid[1:]) * rate, noise(grid[1:]) / noise(grid[:-1])
        forward = torch.zeros_like(h)
        forward[1:] = 0.5 * h[1:] / h[:-1]
        forward = torch.where(h.isinf(), 0.0, forward)
        a = ratio * torch.exp(-h) if stochastic else ratio
        c = noise(grid[1:]) * rate.sqrt() if stochastic else torch.zeros_like(h)
        return a, torch.stack([gain * (1 + forward), -gain * forward], 1), c

    return Multistep("dpmpp-sde" if stochastic else "dpmpp", table, noisy=stochastic, order=2, output="x")


def eab(order: int = 3) -> Multistep:
    r"""Exponential Adams-Bashforth in log-SNR: :math:`\hat x` extrapolated by the polynomial through its last ``order`` values (2 or 3).

    The weights :math:`\int_0^h e^{\tau-h}\ell_j(\tau)d\tau` of the Lagrange polynomials are exact for any grid. The order is reached where
    the first, low-order steps are small: after one step of first order and one of second, order 3 is seen on grids whose first steps
    are shorter than the others or lie where :math:`\hat x` hardly changes.
    """
    require(order in (2, 3), f"order = {order}", "2 or 3")

    def table(grid: Tensor) -> Coefficients:
        h = 0.5 * grid.diff()
        b = torch.zeros(len(h), order, dtype=torch.float64, device=grid.device)
        for i in range(len(h)):
            known = 1 if h[i].isinf() else min(i + 1, order)
            b[i, :known] = signal(grid[i + 1]) * _lagrange(0.5 * (grid[i + 1 - known : i + 1].flip(0) - grid[i]), h[i])
        return noise(grid[1:]) / noise(grid[:-1]), b, torch.zeros_like(h)

    return Multistep(f"eab{order}", table, noisy=False, order=order, output="x")


NODES, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(48))


def _lagrange(nodes: Tensor, h: Tensor) -> Tensor:
    """Integrals of e^(tau - h) times each Lagrange polynomial of ``nodes`` (q,) over [0, h], by Gauss quadrature: positive terms, nothing cancels."""
    if len(nodes) == 1:
        return -torch.expm1(-h)[None]
    tau, weight = h * (NODES.to(h) + 1) / 2, h * WEIGHTS.to(h) / 2
    weight = weight * torch.exp(tau - h)
    others = [[nodes[m] for m in range(len(nodes)) if m != j] for j in range(len(nodes))]
    return torch.stack([(weight * torch.stack([(tau - o) / (nodes[j] - o) for o in others[j]]).prod(0)).sum() for j in range(len(nodes))])


def gradient(gamma: float = 2.0) -> Multistep:
    r"""Gradient-estimation DDIM (Permenter & Yuan 2023): :math:`y'=y+(\sigma'-\sigma)[\gamma\hat\epsilon_i+(1-\gamma)\hat\epsilon_{i-1}]`, y = z / signal.

    ``gamma`` = 1 is DDIM. At 2, the authors' value, errors at 5 to 20 steps are smaller but the order stays 1: 3/2 is the second-order one
    on even steps of sigma. The first step, and the one to +inf, are DDIM's.
    """
    require(1 <= gamma <= 3, f"gamma = {gamma}", "1 <= gamma <= 3")

    def table(grid: Tensor) -> Coefficients:
        after = signal(grid[1:])
        gain = after * sigma_of_logsnr(grid).diff()
        share = torch.full_like(gain, gamma)
        share[0] = 1.0
        share = torch.where(grid[1:].isinf(), 1.0, share)
        return after / signal(grid[:-1]), torch.stack([gain * share, gain * (1 - share)], 1), torch.zeros_like(gain)

    return Multistep("gradient", table, noisy=False, order=1, output="eps")
