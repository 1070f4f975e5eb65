"""A recorder of rounds for pictures: windows, errors and slopes of chosen samples, in bounded memory. It never changes a result."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from contrastive_diffusion.parallel.ring import Ring
from contrastive_diffusion.parallel.sweep import Outcome


@dataclass
class Trace:
    """What happened to the samples ``ids``; at most ``limit`` rounds are kept.

    Each entry of ``records``: the round, the sample, the frontier before it (``base``) and ``after`` it, the states' root mean square
    ``error`` (w,) and measured ``slope`` (w,) from the frontier on, and, with ``states``, the states it was made from (w + 1, D).
    """

    ids: tuple[int, ...] = (0,)
    limit: int = 2000
    states: bool = False
    records: list[dict[str, Any]] = field(default_factory=list)

    def record(self, number: int, ring: Ring, outcome: Outcome, held: Any, first: int) -> None:
        """Called by the sampler between a round's correction and its acceptance."""
        if number > self.limit:
            return
        for lane, sample in enumerate(held):
            if sample < 0 or int(sample) + first not in self.ids:
                continue
            base, after = int(ring.base[lane]), int(outcome.base[lane])
            width = int(ring.steps_left()[lane])
            slots = (base + torch.arange(width + 1, device=ring.base.device)) % ring.slots
            found: dict[str, Any] = {"round": number, "sample": int(sample) + first, "base": base, "after": after}
            found["error"] = outcome.error[slots[1:], lane].double().sqrt().cpu()
            found["slope"] = ring.slope[slots[:-1], lane].double().mean(-1).cpu()
            if self.states:
                found["states"] = ring.x[slots, lane].flatten(1).cpu()
            self.records.append(found)

    def of(self, sample: int) -> list[dict[str, Any]]:
        return [r for r in self.records if r["sample"] == sample]

    def heat(self, sample: int, steps: int) -> Tensor:
        """log10 of the errors, (rounds, steps), float32; NaN outside the window."""
        records = self.of(sample)
        image = torch.full((len(records), steps), float("nan"))
        for row, r in enumerate(records):
            image[row, r["base"] : r["base"] + len(r["error"])] = r["error"].clamp(min=1e-12).log10().float()
        return image

    def windows(self, sample: int) -> Tensor:
        """Frontier and end of the window in each round, (rounds, 2)."""
        return torch.tensor([[r["base"], r["base"] + len(r["error"])] for r in self.of(sample)])

    def rows(self) -> Tensor:
        """Steps evaluated in each round, of all recorded samples, (rounds,)."""
        total = torch.zeros(self._rounds(), dtype=torch.int64)
        for r in self.records:
            total[r["round"] - 1] += len(r["error"])
        return total

    def frontiers(self) -> Tensor:
        """The frontier after each round, the mean over the recorded samples, (rounds,)."""
        reached = torch.zeros(len(self.ids), self._rounds())
        for r in self.records:
            reached[self.ids.index(r["sample"]), r["round"] - 1 :] = r["after"]
        return reached.mean(0)

    def _rounds(self) -> int:
        return max((r["round"] for r in self.records), default=0)
