"""What all samplers of this package ask of their options."""

import math

from contrastive_diffusion.errors import UsageError, require
from contrastive_diffusion.solvers import Solver


def check(sampler: object, solver: Solver, tolerance: float) -> None:
    """Steps that are known beforehand, and a tolerance that is one."""
    if solver.alone:
        name = type(sampler).__name__
        raise UsageError(f"given {solver.name} to {name}, expected a solver whose steps are known beforehand: {solver.alone}; use Sequential")
    require(tolerance >= 0 and math.isfinite(tolerance), f"tolerance = {tolerance}", "a finite tolerance >= 0")


def check_window(window: int, steps: int, whole: str) -> None:
    """No more steps than there are; ``whole``: what to give for all of them."""
    require(window <= steps, f"window = {window}", f"at most the {steps} steps of the grid", f"window={whole} is the whole grid")
