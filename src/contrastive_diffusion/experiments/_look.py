"""What a parallel sampler did round by round, collected while it runs, and the figures of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from contrastive_diffusion.data.toys import dino
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.parallel import Trace
from contrastive_diffusion.sampling import Round

LEVEL = 4.0  # log-SNR at which the iterates are drawn over the error of the network
SHOWN = (2, 4, 8)  # rounds whose iterates are drawn
POINTS = 200  # of them


class Look:
    """Frontiers, rows and, of points in the plane, iterates at ``LEVEL`` of one call on samples of ``shape``; with ``trace``, given to the sampler,
    also the errors and the window of its first sample."""

    def __init__(self, grid: Tensor, shape: tuple[int, ...]):
        self.steps, self.count, self.plane = len(grid) - 1, shape[0], tuple(shape[1:]) == (2,)
        self.at = int((grid[:-1] - LEVEL).abs().argmin())
        self.trace = Trace(ids=tuple(range(shape[0])))
        self.frontier: list[int] = []
        self.rows: list[int] = []
        self.iterates: dict[int, Tensor] = {}

    def see(self, seen: Round) -> None:
        self.frontier.append(seen.begin)
        self.rows.append((seen.end - seen.begin) * self.count)
        if self.plane and seen.number in SHOWN and seen.begin <= self.at <= seen.end:
            self.iterates[seen.number] = seen.states[self.at - seen.begin, :POINTS].clone()

    def arrays(self, name: str) -> dict[str, Tensor]:
        frontier, rows, found = torch.tensor(self.frontier).float(), torch.tensor(self.rows).float(), {}
        if self.trace.records:
            frontier, rows = self.trace.frontiers(), self.trace.rows().float()
            found = {f"{name}.heat": self.trace.heat(0, self.steps), f"{name}.windows": self.trace.windows(0).float()}
        found |= {f"{name}.iterates{number}": states for number, states in self.iterates.items()}
        return found | {f"{name}.round": torch.arange(1.0, len(rows) + 1), f"{name}.frontier": frontier, f"{name}.rows": rows}


def dino_map(denoiser: Denoiser) -> dict[str, Tensor]:
    """Squared error of a Dino network over the plane at ``LEVEL``, and the smallest region that holds 99.9 % of the law there."""
    axis, law = torch.linspace(-4, 4, 161), dino()
    z = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)
    level = torch.full((len(z),), LEVEL)
    with torch.no_grad():
        error = (denoiser(z, level) - law(z, level)).square().sum(1)
    ranked, order = law.log_prob(z, level).exp().sort(descending=True)
    inside = torch.zeros(len(z)).scatter(0, order, (ranked.cumsum(0) <= 0.999 * ranked.sum()).float())
    return {"axis": axis, "map": error.view(161, 161), "inside": inside.view(161, 161)}


def progress(label: str, curves: Sequence[tuple[str, str]]) -> list[page.Block]:
    """Advance and rows per round of calls: (label, prefix of the arrays)."""
    return [
        page.lines(
            f"Advance ({label})", "round", "step of the frontier", [page.series(m, f"{name}.round", f"{name}.frontier") for m, name in curves],
            "How far the exact part of the path reaches: of the whole batch in ParaDiGMS, the mean over samples in the others. First seed.",
        ),
        page.lines(
            f"Rows per round ({label})", "round", "evaluations", [page.series(m, f"{name}.round", f"{name}.rows") for m, name in curves],
            "What a round costs: the states evaluated, of all samples. The area under a curve is the number of evaluations. First seed.",
        ),
    ]  # fmt: skip


def heat(label: str, name: str) -> page.Block:
    """Errors of the first sample by round and step, with its window."""
    return page.heat(
        f"Error by round and step ({label})", f"{name}.heat", f"{name}.windows",
        "log10 of the error that the slopes predict for the state after each step, one sample; lines: its window.",
    )  # fmt: skip


def iterates(label: str, network: str, name: str, arrays: dict[str, Tensor]) -> list[page.Block]:
    """Fig. 1 in the plane: where the samples of call ``name`` stand after some rounds, over the error of the Dino network ``network`` there."""
    shown = [number for number in SHOWN if f"{name}.iterates{number}" in arrays]
    panels = [
        {"title": f"round {n}", "values": f"{network}.map", "contour": f"{network}.inside", "contour_levels": [0.5], "points": f"{name}.iterates{n}"} for n in shown
    ]  # fmt: skip
    if not panels:
        return []
    return [
        page.maps(
            f"Iterates over the error of the network ({label})", f"{network}.axis", f"{network}.axis", panels,
            f"Grey: squared error of eps-hat against the exact denoiser at log-SNR {LEVEL:g}; green: the region that holds 99.9 % of the law there; dots: the states "
            "of samples at that level after the round, on the edge those off the map; no panel: the round came after their acceptance. First seed.",
            xlabel="x", ylabel="y", colour="squared error", equal=True,
        )
    ]  # fmt: skip
