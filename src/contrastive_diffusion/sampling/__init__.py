"""Sampling: noise from counters, one task checked and counted, and the sequential sampler.

Samples do not depend on batch size, order, window or number of processes, and sequential and parallel sampling draw the same. What this
does not promise: bits of a network that is not itself batch-invariant.
"""

from contrastive_diffusion.sampling.batches import Drawn, Sampler, in_batches
from contrastive_diffusion.sampling.noise import START, normal
from contrastive_diffusion.sampling.sequential import Sequential, State, walk
from contrastive_diffusion.sampling.task import Clock, Draw, Reader, Round, Samples, Watch, check_finite, check_levels, prepare

__all__ = [
    "START", "Clock", "Draw", "Drawn", "Reader", "Round", "Sampler", "Samples", "Sequential", "State", "Watch",
    "check_finite", "check_levels", "in_batches", "normal", "prepare", "walk",
]  # fmt: skip
