r"""Steps as long as each sample allows (Jolicoeur-Martineau et al. 2021, "Gotta Go Fast").

Each sample goes its own way from the grid's first level to its last finite one: an Euler-Maruyama and a Heun step on the same noise, accepted where they
agree, the next step sized by how well they did. Unlike the original, noise is a path that exists before the steps: a rejected
step is tried again on a shorter piece of the *same* Brownian path (Rackauckas & Nie 2017), so that rejections do not select noises.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from contrastive_diffusion.channel import per_row
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import RunError, require
from contrastive_diffusion.solvers.contract import of_rows
from contrastive_diffusion.solvers.sde import SdeHeun

SHORTEST = 1e-7  # nats of log-SNR; a step that must be shorter is a denoiser that is not smooth
Noise = Callable[[Tensor, int], Tensor]  # rows (n,) of the batch, attempt number -> unit noise (n, *S)


@dataclass(frozen=True)
class Adaptive:
    """Heun's rule for the reverse VP SDE with step control. See ``adaptive``."""

    relative: float
    absolute: float
    inner: SdeHeun = field(default_factory=SdeHeun)
    name: str = "adaptive"
    order: int = 2
    evals: int = 2
    noisy: bool = True
    draws: int = 1
    alone: str = "each sample chooses its own steps, so there is no common grid to iterate on"
    between: bool = True

    def on(self, grid: Tensor) -> "Adaptive":
        return self

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        """One step without control."""
        return self.inner.step(denoiser, z, logsnr, logsnr_next, noise)

    def solve(self, denoiser: Denoiser, z: Tensor, grid: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        """States (B, *S) and log-SNRs (B,) after each attempt, from grid[0] to the last finite level of ``grid``; the last pair has arrived."""
        finite = grid[grid.isfinite()]
        end = float(finite[-1])
        walker = _Walker(self, z, float(finite[0]), (end - float(finite[0])) / max(len(finite) - 1, 1))
        attempt = 0
        while bool((rows := (walker.logsnr < end).nonzero().squeeze(1)).numel()):
            walker.attempt(denoiser, rows, end, noise(rows, attempt))
            attempt += 1
            yield walker.z, walker.logsnr


class _Walker:
    """The samples under way: states, levels, step sizes, and the known pieces of each one's Brownian path ahead, nearest on top."""

    def __init__(self, solver: Adaptive, z: Tensor, start: float, first: float):
        self.solver, self.z = solver, z.clone()
        self.logsnr = torch.full((len(z),), start, dtype=torch.float64, device=z.device)
        self.size = torch.full_like(self.logsnr, first)
        self.before = z.abs()  # the last accepted Euler step, which scales the tolerance
        self.targets = torch.zeros(4, len(z), dtype=torch.float64, device=z.device)
        self.pieces = z.new_zeros(4, *z.shape)
        self.depth = torch.zeros(len(z), dtype=torch.int64, device=z.device)

    def attempt(self, denoiser: Denoiser, rows: Tensor, end: float, noise: Tensor) -> None:
        """One step of ``rows``, each accepted or not; step sizes follow."""
        z, start = self.z[rows], self.logsnr[rows]
        stop = self._reveal(rows, start, (start + self.size[rows]).clamp(max=end), noise)
        euler, heun = self.solver.inner.both(of_rows(denoiser, rows, self.z), z, start, stop, self.pieces[self.depth[rows] - 1, rows])
        size = torch.maximum(euler.abs(), self.before[rows]) * self.solver.relative
        error = ((euler - heun) / size.clamp(min=self.solver.absolute)).double().flatten(1).square().mean(1).sqrt()
        if not bool(error.isfinite().all()):
            raise RunError("given a non-finite state in the adaptive solver, expected finite numbers; check the denoiser")
        good = error <= 1
        arrived = rows[good]
        self.z[arrived], self.logsnr[arrived], self.before[arrived] = heun[good], stop[good], euler[good].abs()
        self.depth[arrived] -= 1
        self.size[rows] = (stop - start) * (0.9 * error.clamp(min=1e-6).pow(-0.9)).clamp(0.2, 5.0)
        if bool((self.size[rows] < SHORTEST).any()):
            raise RunError(f"given steps under {SHORTEST:g} nats in the adaptive solver, expected a smooth denoiser; raise the tolerance")

    def _reveal(self, rows: Tensor, start: Tensor, stop: Tensor, noise: Tensor) -> Tensor:
        """Puts the Brownian increment of the next step on top; returns where it ends: ``stop``, or the nearest known point before it."""
        top = (self.depth[rows] - 1).clamp(min=0)
        known, target, piece = self.depth[rows] > 0, self.targets[top, rows], self.pieces[top, rows]
        stop = torch.where(known, torch.minimum(stop, target), stop)
        whole, part = _clock(start, torch.where(known, target, stop)), _clock(start, stop)
        share = per_row(part / whole, noise)
        # A bridge to the known point; a fresh increment where there is none.
        spread = per_row((part * torch.where(known, (1 - part / whole).clamp(min=0), 1.0)).sqrt(), noise)
        drawn = per_row(known, noise) * share * piece + spread * noise
        new = ~(known & (stop >= target))
        self.pieces[top[new & known], rows[new & known]] -= drawn[new & known]
        self._push(rows[new], stop[new], drawn[new])
        return stop

    def _push(self, rows: Tensor, stop: Tensor, drawn: Tensor) -> None:
        if len(rows) and int(self.depth[rows].max()) == len(self.targets):
            self.targets = torch.cat([self.targets, torch.zeros_like(self.targets)])
            self.pieces = torch.cat([self.pieces, torch.zeros_like(self.pieces)])
        self.targets[self.depth[rows], rows], self.pieces[self.depth[rows], rows] = stop, drawn
        self.depth[rows] += 1


def _clock(start: Tensor, stop: Tensor) -> Tensor:
    return logsigmoid(stop) - logsigmoid(start)


def adaptive(relative: float = 0.05, absolute: float = 0.0078) -> Adaptive:
    """Step control per sample: the Euler and Heun steps may differ by ``relative`` of the state, or by ``absolute`` where that is larger.

    The defaults are the authors', for data in [-1, 1] to within 1/128. The grid gives the two ends and the length of the first step.
    """
    require(relative > 0 and absolute > 0, f"tolerances {relative} and {absolute}", "both > 0")
    return Adaptive(relative, absolute)
