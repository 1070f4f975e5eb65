"""Denoiser in, denoiser out: what a sampler should see instead of the bare network.

Each returns a callable that any solver, sequential or parallel, takes as it takes the network, and each keeps rows independent.
"""

from contrastive_diffusion.combinators.calibration import calibrated, mean_outputs
from contrastive_diffusion.combinators.guidance import guided
from contrastive_diffusion.combinators.inpainting import inpaint
from contrastive_diffusion.combinators.levels import aligned_levels, likely_levels, relevelled
from contrastive_diffusion.combinators.ranges import clamped, thresholded

__all__ = ["aligned_levels", "calibrated", "clamped", "guided", "inpaint", "likely_levels", "mean_outputs", "relevelled", "thresholded"]
