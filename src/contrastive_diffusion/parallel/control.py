"""What the host decides between rounds, from numbers that may be one round old: which sample is in which lane, and how wide its window is.

A window pays while its frontier moves by a sixteenth of it (and two steps) per round or its states come nearer to the bound. When neither has happened for
``PATIENCE`` rounds (more at tolerance 0), a lane first loses the measured slope, then its window shrinks to four times its recent advance; with an advance below two
steps a round there is no gain left, and the lane goes on from its frontier with at most ``PRICE`` evaluations per step: a window wider
than one step is only tried with what has been saved. So a map that cannot be parallelised costs PRICE T and the windows it takes to find out:
twice the patience and one for each time that its states came nearer by chance.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PATIENCE = 4  # rounds
EXACT_PATIENCE = 16  # where not a bit may change, the last ones take their time
PRICE = 1.2  # evaluations per step when there is no gain left
NEARER = 0.3  # decades of mean square that count as progress


class Lagged:
    """Small device tensors read by the host: at once on a CPU; elsewhere one round late, so that the device never waits for the host."""

    def __init__(self, lag: int):
        self.lag, self.queue = lag, []

    def push(self, values: Tensor) -> None:
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.queue.append((host, event))
        else:
            self.queue.append((values, None))

    def pop(self, wait: bool = False) -> np.ndarray | None:
        """The values pushed ``lag`` pushes ago, or with ``wait`` the oldest there are; None if there are none yet."""
        if len(self.queue) <= (0 if wait else self.lag):
            return None
        values, event = self.queue.pop(0)
        if event is not None:
            event.synchronize()
        return values.numpy()


@dataclass
class Lanes:
    """The host's view, arrays (B,): sample position ``ids`` (-1: empty), the last ``known`` frontier, ``width``, rounds and evaluations so far."""

    steps: int
    window: int
    adapt: bool
    measures: bool
    patience: int
    ids: np.ndarray
    known: np.ndarray
    width: np.ndarray
    measured: np.ndarray
    best: np.ndarray
    since: np.ndarray  # frontier when the current stretch of patience began
    waited: np.ndarray
    paid: np.ndarray  # evaluations since there was no gain left; -1: there is
    gained: np.ndarray  # steps since then

    @staticmethod
    def make(count: int, steps: int, window: int, adapt: bool, measured: bool, patience: int) -> "Lanes":
        zeros = lambda: np.zeros(count, dtype=np.int64)  # noqa: E731
        return Lanes(
            steps, window, adapt, measured, patience, zeros() - 1, zeros(), zeros() + window, np.full(count, measured), np.full(count, np.inf), zeros(), zeros(),
            zeros() - 1, zeros(),
        )  # fmt: skip

    def load(self, lane: np.ndarray, ids: np.ndarray) -> None:
        self.ids[lane], self.known[lane], self.width[lane], self.measured[lane], self.best[lane] = ids, 0, self.window, self.measures, np.inf
        self.since[lane], self.waited[lane], self.paid[lane], self.gained[lane] = 0, 0, -1, 0

    @property
    def active(self) -> np.ndarray:
        return (self.ids >= 0) & (self.known < self.steps)

    def rows(self) -> np.ndarray:
        """Steps to evaluate of each lane, (B,)."""
        return np.where(self.active, np.minimum(self.width, self.steps - self.known), 0)

    def saw(self, base: np.ndarray, far: np.ndarray, rows: np.ndarray) -> None:
        """A round that evaluated ``rows`` moved the frontiers to ``base`` and left the states ``far`` from the bound."""
        advance, self.known = base - self.known, base
        self.paid += np.where(self.paid >= 0, rows, 0)
        self.gained += np.where(self.paid >= 0, advance, 0)
        if self.adapt:
            moving = (advance >= np.maximum(rows / 16, 2)) | (far <= self.best - NEARER)
            self.best = np.where(moving, np.minimum(self.best, far), self.best)
            self.waited = np.where(moving | (rows <= 1), 0, self.waited + 1)
            self.since = np.where(self.waited == 0, base, self.since)
            for lane in np.flatnonzero((self.waited >= self.patience) & self.active & (self.paid < 0)):
                self._stalled(int(lane))
            saving = self.paid >= 0
            credit = np.floor(PRICE * self.gained - self.paid).astype(np.int64)
            grown = np.where(advance >= rows, 2 * rows, 2 * advance)
            self.width = np.where(saving, np.clip(np.minimum(grown, credit + 1), 1, self.window), self.width)

    def _stalled(self, lane: int) -> None:
        pace = (self.known[lane] - self.since[lane]) / self.patience
        self.waited[lane], self.since[lane] = 0, self.known[lane]
        if self.measured[lane]:
            self.measured[lane] = False
        elif pace >= 2:
            self.width[lane] = int(np.clip(4 * pace, 2, self.width[lane]))
        else:
            self.paid[lane], self.gained[lane], self.width[lane] = 0, 0, 1
