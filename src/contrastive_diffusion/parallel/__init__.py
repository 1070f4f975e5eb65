r"""Parallel-in-time sampling: all steps of a window at once, corrected round by round until the path stands still.

The sequential path solves :math:`x_{i+1}=\Phi_i(x_i)`. Each round evaluates every :math:`\Phi_i` of a sample's window in one batch and sweeps

.. math:: x_{i+1}^{k+1} = \Phi_i(x_i^k) + L_i\,(x_i^{k+1}-x_i^k)

from the exact left end. :math:`L=1` is Picard iteration (ParaDiGMS, Shih et al. 2023); the slope measured from the last two iterates costs nothing
and needs less than half the rounds. In this form a state whose predecessor did not move is exactly :math:`\Phi` of it, to the last bit, whatever
L: at tolerance 0 the result is the sequential one, bit for bit, for a denoiser whose rows do not depend on the batch. A positive
tolerance bounds the predicted error of each state when it is accepted, not the final error.
"""

from contrastive_diffusion.parallel.paradigms import Paradigms
from contrastive_diffusion.parallel.parareal import Parareal
from contrastive_diffusion.parallel.sampler import Parallel, ParallelSamples
from contrastive_diffusion.parallel.slopes import SLOPES
from contrastive_diffusion.parallel.trace import Trace

__all__ = ["SLOPES", "Paradigms", "Parallel", "ParallelSamples", "Parareal", "Trace"]
