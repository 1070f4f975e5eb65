"""Measures of samples and of denoisers, each with its error, computed in chunks.

Truths are any callables and samples are tensors: nothing here imports the rest of the package. A measure of a sample against a reference
comes as a ``Score`` (mean and standard error) or, by leaving out blocks of the sample, as ``Replicates`` (jackknife interval, bias,
paired comparison).
"""

from contrastive_diffusion.metrics.classifiers import Calibration, auroc, calibration
from contrastive_diffusion.metrics.gaussians import Frechet, Moments, frechet, frechet_replicates, moments
from contrastive_diffusion.metrics.kernels import MMD, bandwidth_scan, gaussian, kid, median_distance, mmd, polynomial
from contrastive_diffusion.metrics.neighbours import Nearest, nearest, prdc
from contrastive_diffusion.metrics.scores import Interval, Replicates, Rows, Score, average, bounds, interval, of_blocks
from contrastive_diffusion.metrics.sliced import directions, sliced_wasserstein
from contrastive_diffusion.metrics.truth import denoiser_error, log_density, off_support

__all__ = [
    "MMD", "Calibration", "Frechet", "Interval", "Moments", "Nearest", "Replicates", "Rows", "Score", "auroc", "average",
    "bandwidth_scan", "bounds", "calibration", "denoiser_error", "directions", "frechet", "frechet_replicates", "gaussian", "interval", "kid",
    "log_density", "median_distance", "mmd", "moments", "nearest", "of_blocks", "off_support", "polynomial", "prdc", "sliced_wasserstein",
]  # fmt: skip
