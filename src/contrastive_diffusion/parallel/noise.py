"""The noise of the steps in the windows: drawn from counters once, when a step comes near, and kept while it is needed."""

import math

import numpy as np
import torch
from torch import Tensor

from contrastive_diffusion.parallel.ring import Ring
from contrastive_diffusion.sampling import normal


class Noise:
    """Unit noise in a ring of its own, at least as long as the states'. Which steps are there is known to the host: ``filled`` (B,).

    ``ahead``: steps beyond a lane's known frontier that must be there, because the frontier may already have moved.
    """

    def __init__(self, ring: Ring, seed: int, draws: int, ahead: int):
        self.ring, self.seed = ring, seed
        self.slots = max(ring.slots, ahead + 1 + ring.memory)
        self.ahead = ahead
        self.item = ring.item if draws == 1 else (draws, *ring.item)
        x = ring.x
        self._rows = torch.zeros(self.slots * ring.lanes, math.prod(self.item), dtype=x.dtype, device=x.device)
        self.filled = np.zeros(ring.lanes, dtype=np.int64)

    def reset(self, lanes: np.ndarray) -> None:
        self.filled[lanes] = 0

    def fill(self, known: np.ndarray, ids: np.ndarray, active: np.ndarray) -> None:
        """Draws what is missing of the steps up to ``known`` + ``ahead`` of active lanes."""
        to = np.where(active, np.minimum(known + self.ahead, self.ring.steps), self.filled)
        missing = np.maximum(to - self.filled, 0)
        if not missing.any():
            return
        lane = np.repeat(np.arange(len(missing)), missing)
        step = np.arange(len(lane)) - np.repeat(missing.cumsum() - missing, missing) + np.repeat(self.filled, missing)
        device = self._rows.device
        packed = torch.from_numpy(np.stack([lane, step, ids[lane]])).to(device, non_blocking=True)
        block = max(1, 2**17 // self._rows.shape[1])
        for lanes, steps, samples in zip(*(v.split(block) for v in packed), strict=True):
            self._rows[(steps % self.slots) * self.ring.lanes + lanes] = normal(self.seed, samples, steps, self.item, self._rows.dtype).flatten(1)
        self.filled = np.maximum(to, self.filled)

    def rows(self, step: Tensor, lane: Tensor | None = None) -> Tensor:
        """Noise of steps of lanes, broadcast shapes, (..., numel)."""
        return self._rows[(step % self.slots) * self.ring.lanes + (self.ring.lane if lane is None else lane)]

    def in_slots(self, index: Tensor) -> Tensor:
        """The noise of the steps ``index`` (P, B) that the slots of the ring hold, (P, B, C, E)."""
        held = self._rows.view(self.slots, self.ring.lanes, -1) if self.slots == self.ring.slots else self.rows(index)
        return held.view(self.ring.shape)
