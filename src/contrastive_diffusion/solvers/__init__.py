"""Solvers as step maps between two log-SNRs, with no loop, no state and no grid of their own: see ``contract``.

The registry names what the command and the tests run; ``solver("edm:churn=40,s_noise=1.007")`` makes one with options.
"""

from collections.abc import Callable

from torch import Tensor

from contrastive_diffusion.errors import call_named, require
from contrastive_diffusion.schedules import named_grid
from contrastive_diffusion.solvers.adaptive import Adaptive, adaptive
from contrastive_diffusion.solvers.ancestral import DDIM2, DDPM2, LearnedDDPM, ddim, ddim2, ddpm, ddpm2
from contrastive_diffusion.solvers.contract import Affine, Coefficients, Multistep, Solver, StepMap
from contrastive_diffusion.solvers.edm import Churned, Heun, edm, euler, heun
from contrastive_diffusion.solvers.multistep import dpmpp, eab, gradient
from contrastive_diffusion.solvers.sde import PredictorCorrector, SdeHeun, euler_maruyama, predictor_corrector, sde_heun

__all__ = [
    "DDIM2", "DDPM2", "SOLVERS", "Adaptive", "Affine", "Churned", "Coefficients", "Heun", "LearnedDDPM", "Multistep", "PredictorCorrector", "SdeHeun",
    "Solver", "StepMap", "adaptive", "ddim", "ddim2", "ddpm", "ddpm2", "dpmpp", "eab", "edm", "euler", "euler_maruyama", "gradient", "heun",
    "levels_for", "natural_grid", "natural_steps", "predictor_corrector", "sde_heun", "solver", "steps_for",
]  # fmt: skip


def solver(spec: str) -> Solver:
    """The solver of a name in ``SOLVERS`` with options, "ddim" or "edm:churn=40,s_noise=1.007"; mistakes are one line."""
    return call_named(spec, SOLVERS, "solver")


def steps_for(solver: Solver, evals: int) -> int:
    """The most steps of a grid to +inf that cost at most ``evals`` evaluations of the denoiser, at least 1 step."""
    require(evals >= 1, f"evals = {evals}", "evals >= 1")
    require(not isinstance(solver, Adaptive), "evals for the adaptive solver", "its tolerances, which decide them", "adaptive:relative=0.05")
    return max(1, (evals + solver.evals - 1) // solver.evals)


def levels_for(solver: Solver, steps: int | None = None, evals: int | None = None, grid: str | None = None) -> Tensor:
    """The log-SNRs (T + 1,) of a named ``grid`` (the solver's usual one by default) of so many ``steps``, or as many as ``evals`` evaluations pay for."""
    require(steps is None or evals is None, "--steps and --evals", "one of the two")
    steps = steps_for(solver, evals) if evals is not None else steps
    grid = grid or natural_grid(solver)
    listed = not grid[:1].isalpha()
    return named_grid(grid, steps if steps is not None or listed else natural_steps(solver))


def dpmpp_sde() -> Multistep:
    """The SDE form of DPM-Solver++(2M)."""
    return dpmpp(stochastic=True)


def eab2() -> Multistep:
    """Exponential Adams-Bashforth of order 2."""
    return eab(2)


def eab3() -> Multistep:
    """Exponential Adams-Bashforth of order 3."""
    return eab(3)


def natural_grid(solver: Solver) -> str:
    """The name of the grid that a solver is usually run on: EDM's in sigma, log-SNR for its multistep relatives, DDPM's otherwise."""
    if solver.name in ("edm", "edm-euler", "euler", "heun"):
        return "karras"
    return "uniform" if solver.name.split("-")[0] in ("adaptive", "dpmpp", "eab2", "eab3", "gradient") else "ddpm"


def natural_steps(solver: Solver) -> int:
    """Steps that leave little error on data of unit scale: 1000 for DDPM and the like, 100 for deterministic or higher-order solvers."""
    return 1000 if solver.noisy and solver.order == 1 else 100


SOLVERS: dict[str, Callable[..., Solver]] = {
    "adaptive": adaptive,
    "ddim": ddim,
    "ddim2": ddim2,
    "ddpm": ddpm,
    "ddpm2": ddpm2,
    "dpmpp": dpmpp,
    "dpmpp-sde": dpmpp_sde,
    "eab2": eab2,
    "eab3": eab3,
    "edm": edm,
    "euler": euler,
    "euler-maruyama": euler_maruyama,
    "gradient": gradient,
    "heun": heun,
    "pc": predictor_corrector,
    "sde-heun": sde_heun,
}
