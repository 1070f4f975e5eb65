r"""Solvers that reuse outputs of the steps before: as many evaluations as steps, whatever the order.

In :math:`\lambda=\alpha/2` the flow of the data prediction is :math:`d(z/\nu)/d\lambda=e^\lambda\hat x`, with the scales s and
:math:`\nu` of signal and noise, so a step of h nats of :math:`\lambda` is :math:`z'=\frac{\nu'}{\nu}z+s'\int_0^h e^{\tau-h}\hat x\,d\tau`: exact
but for the extrapolation of :math:`\hat x`. The first step, and the one to +inf, hold :math:`\hat x` (first order).
"""

import torch
from torch import Tensor

from contrastive_diffusion.channel import noise, signal
from contrastive_diffusion.solvers.contract import Coefficients, Multistep


def dpmpp(stochastic: bool = False) -> Multistep:
    r"""DPM-Solver++(2M) of Lu et al. 2022, or its SDE form, in half the log-SNR.

    :math:`\hat x` is extrapolated to the middle of the step, :math:`D=\hat x_i+\frac{h_i}{2h_{i-1}}(\hat x_i-\hat x_{i-1})`. ODE:
    :math:`z'=\frac{\nu'}{\nu}z+s'(1-e^{-h})D`; SDE: :math:`z'=\frac{\nu'}{\nu}e^{-h}z+s'(1-e^{-2h})D+\nu'\sqrt{1-e^{-2h}}\,n`. Both are of
    second order, the SDE form in law (measured on a Gaussian).
    """

    def table(grid: Tensor) -> Coefficients:
        h = 0.5 * grid.diff()
        after_signal, ratio = signal(grid[1:]), noise(grid[1:]) / noise(grid[:-1])
        decay = torch.exp(-h * (2 if stochastic else 1))
        gain = after_signal * -torch.expm1(-h * (2 if stochastic else 1))
        forward = torch.zeros_like(h)
        forward[1:] = 0.5 * h[1:] / h[:-1]
        forward = torch.where(h.isinf(), 0.0, forward)
        a = ratio * torch.exp(-h) if stochastic else ratio
        c = noise(grid[1:]) * (1 - decay).sqrt() if stochastic else torch.zeros_like(h)
        return a, torch.stack([gain * (1 + forward), -gain * forward], 1), c

    return Multistep("dpmpp-sde" if stochastic else "dpmpp", table, noisy=stochastic, order=2, output="x")
