r"""Triangular Anderson acceleration on top of a round (Tang et al. 2024): a state's step is corrected by what earlier rounds did to it and to
the states before it, never after it, so causality and exactness stay.

With the residual :math:`R=x^{new}-x` and differences of the last rounds, a state i takes :math:`x^{new}_i-\sum_h\gamma_{ih}(\Delta x+\Delta R)_{ih}`, where
:math:`\gamma_i` solves the least squares of R against :math:`\Delta R` over the states from the frontier to i, regularised by a thousandth of the
mean diagonal. States that are accepted in this round, and the first that is not, are left as the round made them. A difference of a slot counts
only if the slot held the same state in both rounds.
"""

import torch
from torch import Tensor

from contrastive_diffusion.parallel.ring import Ring
from contrastive_diffusion.parallel.sweep import Outcome

RIDGE = 1e-3


class Anderson:
    """Differences of up to ``depth`` earlier rounds: 2 depth + 2 buffers the size of the ring's."""

    def __init__(self, ring: Ring, depth: int):
        self.depth = depth
        self.last: tuple[Tensor, Tensor, Tensor] | None = None  # x, R, and the state that each slot held
        self.pairs: list[tuple[Tensor, Tensor]] = []  # differences of x and R, newest first

    def apply(self, ring: Ring, outcome: Outcome) -> None:
        """Corrects ``ring.x_old``, the new states, before they are swapped in; errors stay those of the plain round."""
        x, new = ring.x, ring.x_old
        held = torch.where(outcome.arrives, ring.index().roll(1, 0) + 1, -1)
        held = torch.where(outcome.arrives.roll(1, 0) | outcome.arrives, held, -1)
        residual = new - x
        if self.last is not None:
            same = ((self.last[2] == held) & (held >= 0) & ring.seen)[..., None, None]
            self.pairs = [(dx * same, dr * same) for dx, dr in self.pairs[: self.depth - 1]]
            self.pairs.insert(0, ((x - self.last[0]) * same, (residual - self.last[1]) * same))
            self._mix(ring, outcome, new, residual)
        self.last = x.clone(), residual, held

    def _mix(self, ring: Ring, outcome: Outcome, new: Tensor, residual: Tensor) -> None:
        basis = torch.stack([dr.flatten(2) for _, dr in self.pairs], 2)  # (P, B, h, D)
        gram, right = basis @ basis.mT, (basis @ residual.flatten(2)[..., None])[..., 0]
        j = torch.arange(ring.window, device=new.device)[:, None]
        order = ring.row(ring.base + 1 + j)  # rows of the window's states, frontier first
        gram, right = (v.flatten(0, 1)[order].cumsum(0).double() for v in (gram, right))
        ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + torch.finfo(torch.float64).tiny
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        gamma = torch.linalg.solve_ex(gram + ridge * eye, right[..., None])[0][..., 0]
        free = (j >= outcome.base - ring.base) & (j < ring.steps_left())
        gamma = torch.where(free[..., None] & gamma.isfinite(), gamma, 0.0).to(new.dtype)
        slots = gamma.new_zeros(ring.slots * ring.lanes, gamma.shape[-1])
        slots[order.flatten()] = gamma.flatten(0, 1)
        for h, (dx, dr) in enumerate(self.pairs):
            new -= slots[:, h].view(*ring.shape[:2], 1, 1) * (dx + dr)
