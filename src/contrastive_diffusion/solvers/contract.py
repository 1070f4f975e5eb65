r"""What a solver is, and its step map on a grid.

``solver.step(denoiser, z, logsnr, logsnr_next, noise)`` takes each row of z (B, *S) from its logsnr (B,) to its logsnr_next (B,) with its
own unit noise, so one step map serves one step of many samples and many steps of one sample. Most solvers are less than that: a table

.. math:: z_{i+1} = a_i z_i + \sum_{j<q} b_{ij}\,o_{i-j} + c_i n_i,\qquad o_i = p_i z_i + r_i\,\hat\epsilon(z_i, \alpha_i),

made from the whole grid in float64, where the outputs o are :math:`\hat\epsilon` itself or :math:`\hat x`. One-step solvers have q = 1;
multistep ones remember q - 1 outputs and start with lower order. The step to ``+inf`` returns :math:`\hat x` in all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from contrastive_diffusion.channel import noise, per_row, signal
from contrastive_diffusion.denoisers import Denoiser, take
from contrastive_diffusion.errors import UsageError, require

Coefficients = tuple[Tensor, Tensor, Tensor]
Output = Literal["eps", "x"]


def of_rows(denoiser: Denoiser, rows: Tensor, z: Tensor) -> Denoiser:
    """The denoiser for ``rows`` of z only, with their labels if it is bound to some."""
    return denoiser if len(rows) == len(z) else take(denoiser, rows)


class Solver(Protocol):
    """A step map before it knows its grid.

    Attributes:
        order: of the global error in the step of log-SNR: pathwise for deterministic solvers, in law for noisy ones.
        evals: of the denoiser per step; the step to +inf takes one.
        noisy: whether it draws noise. draws: unit noises per step; the noise is (B, *S) for one, (B, draws, *S) for more.
        alone: why it cannot be used in parallel-in-time sampling; empty if it can.
        between: (optional, default False) it reads levels between those of the grid too.
    """

    @property
    def name(self) -> str: ...
    @property
    def order(self) -> int: ...
    @property
    def evals(self) -> int: ...
    @property
    def noisy(self) -> bool: ...
    @property
    def draws(self) -> int: ...
    @property
    def alone(self) -> str: ...
    def on(self, grid: Tensor) -> "Solver":
        """The solver for this grid (T + 1,), float64: itself where a step depends on its two levels only."""
        ...

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Affine:
    """A one-step solver given by ``coefficients(logsnr, logsnr_next) -> (a, b, c)`` on eps_hat, float64, elementwise."""

    name: str
    coefficients: Callable[[Tensor, Tensor], Coefficients]
    noisy: bool
    order: int = 1
    evals: int = 1
    draws: int = 1
    alone: str = ""
    output: Output = "eps"

    def on(self, grid: Tensor) -> "Affine":
        return self

    def table(self, grid: Tensor) -> Coefficients:
        """a (T,), b (T, 1), c (T,) of a grid (T + 1,)."""
        a, b, c = self.coefficients(grid[:-1], grid[1:])
        return a, b[:, None], c

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        a, b, c = (per_row(v, z) for v in self.coefficients(logsnr, logsnr_next))
        mean = a * z + b * denoiser(z, logsnr.to(z.dtype))
        return mean + c * noise if self.noisy else mean


@dataclass(frozen=True)
class Multistep:
    """A solver given by ``table(grid) -> a (T,), b (T, q), c (T,)``, float64, on outputs of kind ``output``; b_ij = 0 where i < j."""

    name: str
    table: Callable[[Tensor], Coefficients]
    noisy: bool
    order: int
    output: Output
    evals: int = 1
    draws: int = 1
    alone: str = ""

    def on(self, grid: Tensor) -> "Multistep":
        return self

    def step(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor, logsnr_next: Tensor, noise: Tensor) -> Tensor:
        raise UsageError(f"given one step of {self.name}, which remembers steps before it, expected a whole grid; use StepMap or a sampler")


class StepMap:
    """A solver on a grid of T steps. Tables are made once, so every sampler takes the same bits.

    A step index ``i`` is an int for all rows or (N,) int64, one for each row. ``table``: a (T,), b (T, q), c (T,) float64, or None for a
    solver that is no table: then only ``map(z, i, noise)`` works. ``memory``: q - 1 outputs before the newest, 0 for one-step maps.
    """

    def __init__(self, solver: Solver, denoiser: Denoiser, grid: Tensor, device: torch.device | str = "cpu"):
        require(grid.dim() == 1 and len(grid) >= 2 and bool((grid.diff() > 0).all()), "a grid that does not increase", "increasing log-SNRs (T + 1,)")
        grid = grid.double().to(device)
        self.solver, self.denoiser, self.grid = solver.on(grid), denoiser, grid
        self.logsnr, self.logsnr_next = grid[:-1], grid[1:]
        self.table = solver.table(grid) if isinstance(solver, Affine | Multistep) else None
        self.output: Output = solver.output if isinstance(solver, Affine | Multistep) else "eps"
        self.memory = self.table[1].shape[1] - 1 if self.table else 0
        self._narrowed: tuple[Tensor, ...] = ()
        self._rows = _Rows(self.logsnr, self.table, self.output)

    def __len__(self) -> int:
        return len(self.logsnr)

    def read(self, z: Tensor, i: Tensor | int) -> Tensor:
        """The output at z (N, *S), one evaluation: eps_hat, or x_hat where ``output`` is "x"."""
        level = self._narrow(z.dtype)[i].expand(len(z)) if isinstance(i, int) else self.logsnr[i].to(z.dtype)
        eps_hat = self.denoiser(z, level)
        if self.output == "eps":
            return eps_hat
        p, r = self._rows.to_x(i, z)
        return p * z + r * eps_hat

    def combine(self, z: Tensor, i: Tensor | int, outputs: Tensor | Sequence[Tensor], noise: Tensor) -> Tensor:
        """The next state from z (N, *S), at most q ``outputs`` (., N, *S), newest first, and noise (N, *S)."""
        a, b, c = self._rows.coefficients(i, z)
        total = a * z
        for weight, output in zip(b, outputs, strict=False):
            total += weight * output
        if self.solver.noisy:
            total += c * noise
        return total

    def __call__(self, z: Tensor, i: Tensor | int, noise: Tensor) -> Tensor:
        """One step of each row, for one-step maps."""
        require(
            self.memory == 0, f"one step of {self.solver.name}, which remembers {self.memory} outputs", "a one-step solver", "use read and combine"
        )
        if self.table is not None:
            return self.combine(z, i, (self.read(z, i),), noise)
        return self.solver.step(self.denoiser, z, self._level(self.logsnr, z, i), self._level(self.logsnr_next, z, i), noise)

    def _narrow(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The levels of the steps in the state's type, one by one."""
        if not self._narrowed or self._narrowed[0].dtype != dtype:
            self._narrowed = self.logsnr.to(dtype).unbind(0)
        return self._narrowed

    def _level(self, levels: Tensor, z: Tensor, i: Tensor | int) -> Tensor:
        return levels[i].expand(len(z)) if isinstance(i, int) else levels[i]


class _Rows:
    """Coefficients of steps as they multiply rows: numbers for one step, columns (N, 1, ...) for many. Both round once, to the same bits."""

    def __init__(self, logsnr: Tensor, table: Coefficients | None, output: Output):
        self.table = table
        self.x = (1 / signal(logsnr), -noise(logsnr) / signal(logsnr)) if output == "x" else None
        self.numbers = [v.tolist() for v in table] if table else []
        self.x_numbers = [v.tolist() for v in self.x] if self.x else []

    def coefficients(self, i: Tensor | int, z: Tensor) -> tuple[Tensor | float, Sequence[Tensor | float], Tensor | float]:
        assert self.table is not None
        if isinstance(i, int):
            a, b, c = self.numbers
            return a[i], b[i], c[i]
        a, b, c = self.table
        return per_row(a[i], z), [per_row(column[i], z) for column in b.unbind(1)], per_row(c[i], z)

    def to_x(self, i: Tensor | int, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        assert self.x is not None
        if isinstance(i, int):
            return self.x_numbers[0][i], self.x_numbers[1][i]
        return per_row(self.x[0][i], z), per_row(self.x[1][i], z)
