"""Solvers as step maps between two log-SNRs, with no loop, no state and no grid of their own: see ``contract``."""

from collections.abc import Callable

from contrastive_diffusion.solvers.ancestral import ddim, ddpm
from contrastive_diffusion.solvers.contract import Affine, Coefficients, Multistep, Solver, StepMap
from contrastive_diffusion.solvers.edm import Heun, euler, heun
from contrastive_diffusion.solvers.multistep import dpmpp

__all__ = ["SOLVERS", "Affine", "Coefficients", "Heun", "Multistep", "Solver", "StepMap", "ddim", "ddpm", "dpmpp", "euler", "heun"]

SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp": dpmpp,
    "dpmpp-sde": lambda: dpmpp(stochastic=True),
    "euler": euler,
    "heun": heun,
}
