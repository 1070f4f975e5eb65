r"""What a denoiser says about densities: denoising errors, nll, likelihood ratios, noise posteriors, each with its standard error.

An optimal denoiser fixes the density of the data and of its noised versions (Kong et al. 2023; Wu et al. 2024, Eq. 2, 3):

.. math:: -\log p_\zeta(x) = c + \tfrac12\int E_\epsilon\|\epsilon - b\,\hat\epsilon(z_\alpha,\beta)\|^2 d\alpha,
          \qquad z_\alpha=\sqrt{\sigma(\alpha)}x+\sqrt{\sigma(-\alpha)}\epsilon,

with :math:`(\beta, b)` of ``channel.compose(alpha, zeta)`` and the same c for every :math:`\zeta`. Their differences are likelihood
ratios; the paper's Eq. 8 lacks the 1/2. Both terms of a ratio are read at the SAME :math:`(\alpha,\epsilon)`, which removes most of the
variance. The integral runs over the whole line: points follow a plateau with exponential tails, so nothing is truncated and the estimate
is unbiased for any denoiser whose error settles in the tails (networks: see ``denoisers.Bounded``). Where the plateau lies decides the
variance only: from the coarsest scale at which the two laws differ at x to the finer of :math:`\zeta` and the data's finest detail.

Three more devices, all without bias. The points of a row are equally spaced along the law, with one random shift, so a smooth integrand costs
no error. Four neighbours share their noise up to rotation: two orthogonal directions, each with both signs, so what is odd in
:math:`\epsilon` cancels; and the squared radii of the two are opposite quantiles of :math:`\chi^2_d`, so most of what is even cancels too.

In up to four dimensions a control variate takes out what quadratic part is left: the best combination of :math:`\epsilon_i^2-1` (mean
zero), smooth in :math:`\alpha`, its coefficients fitted on the even groups of all rows and used on the odd ones, and the other way round.
"""

from contrastive_diffusion.likelihood.densities import discrete_nll, mse_curve, nll, ood_score
from contrastive_diffusion.likelihood.points import GROUP, MARGIN, Estimate, group_means
from contrastive_diffusion.likelihood.posteriors import credible_interval, noise_posterior
from contrastive_diffusion.likelihood.ratios import llr, llr_points

__all__ = ["GROUP", "MARGIN", "Estimate", "credible_interval", "discrete_nll", "group_means", "llr", "llr_points", "mse_curve", "nll", "noise_posterior", "ood_score"]  # fmt: skip
