"""What nearest neighbours tell: fidelity and diversity (precision, recall, density, coverage), and copies of training samples.

Precision and recall: Kynkaanniemi et al. 2019; density and coverage: Naeem et al. 2020. A sample lies in a set if it is nearer to one of its
members than that member's k-th neighbour is. Distances are float64, in chunks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.metrics.scores import Replicates, Rows, of_blocks

CHUNK = 2**22
MEMBERS = 4096  # of a large set in memory at a time


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the rows of x with their distances (c, m) to all of y."""
    y = y.double()
    size = max(1, CHUNK // len(y))
    for start in range(0, len(x), size):
        part = slice(start, min(start + size, len(x)))
        mode = "donot_use_mm_for_euclid_dist" if x.shape[1] <= 16 else "use_mm_for_euclid_dist"
        yield part, torch.cdist(x[part].double(), y, compute_mode=mode)


def _others(part: slice, distance: Tensor) -> Tensor:
    """Distances within one set, none to oneself, in place."""
    distance[torch.arange(len(distance)), torch.arange(part.start, part.stop)] = torch.inf
    return distance


def prdc(x: Tensor, y: Tensor, blocks: Sequence[tuple[int, int]], k: int = 5) -> dict[str, Replicates]:
    """Precision, recall, density and coverage of samples x (n, d) against a reference y (m, d), whole and without each of ``blocks`` of x."""
    most = min(len(y), len(x) - max(end - begin for begin, end in blocks)) - 1
    if x.shape[1:] != y.shape[1:] or not 1 <= k <= most:
        raise ValueError(f"given samples {tuple(x.shape)} and {tuple(y.shape)}, k = {k}, expected one dimension and 1 <= k <= {most}")
    near = torch.cat([_others(*found).kthvalue(k, 1).values for found in _distances(y, y)])
    sizes = [end - begin for begin, end in blocks]
    inside, count = [], []
    for _, distance in _distances(x, y):
        hit = distance < near
        inside.append(hit.any(1).double())
        count.append(hit.sum(1).double() / k)
    precision, density = (of_blocks(torch.stack([v[b:e].mean() for b, e in blocks]), sizes) for v in (torch.cat(inside), torch.cat(count)))
    recall, coverage = _covered(x, y, near, blocks, k)
    return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}


def _covered(x: Tensor, y: Tensor, near: Tensor, blocks: Sequence[tuple[int, int]], k: int) -> tuple[Replicates, Replicates]:
    """Shares of the reference inside the sample, and with a sample inside its own neighbourhood."""
    radii = _radii(x, blocks, k)  # row 0: all samples; row g + 1: without block g, of which no sample counts
    recalled, covered = torch.zeros(len(radii), dtype=torch.float64), torch.zeros(len(radii), dtype=torch.float64)
    for part, distance in _distances(y, x):
        recalled += torch.stack([(distance < radius).any(1).sum() for radius in radii])
        closest = torch.stack([distance[:, b:e].amin(1) for b, e in blocks])  # (G, c)
        rest = torch.stack([torch.cat([closest[:g], closest[g + 1 :]]).amin(0) for g in range(len(blocks))])
        covered += torch.cat([closest.amin(0)[None], rest]).lt(near[part]).sum(1)
    return tuple(Replicates(float(hits[0]) / len(y), hits[1:] / len(y)) for hits in (recalled, covered))  # pyright: ignore[reportReturnType]


def _radii(x: Tensor, blocks: Sequence[tuple[int, int]], k: int) -> Tensor:
    """Distance of each sample to its k-th neighbour, (G + 1, n): among all, and without each block; -inf for the samples of that block."""
    found = []
    for part, distance in _distances(x, x):
        distance = _others(part, distance)
        best = [distance[:, b:e].topk(min(k, e - b), largest=False).values for b, e in blocks]
        sets = [best, *(best[:g] + best[g + 1 :] for g in range(len(best)))]
        found.append(torch.stack([torch.cat(some, 1).kthvalue(k, 1).values for some in sets]))
    radii = torch.cat(found, 1)
    for g, (begin, end) in enumerate(blocks):
        radii[g + 1, begin:end] = -torch.inf
    return radii


@dataclass(frozen=True)
class Nearest:
    """Of each sample: distance to the nearest and the second nearest member of a set (n,), and the index of the nearest."""

    distance: Tensor
    second: Tensor
    index: Tensor

    def copies(self, ratio: float = 1 / 3) -> Tensor:
        """Whether each sample is nearer to its nearest member than ``ratio`` times the next one, (n,) float64 in {0, 1}."""
        return (self.distance < ratio * self.second).double()


def nearest(x: Tensor, y: Rows, same: bool = False) -> Nearest:
    """Nearest members of y (m, d), read in slices, of each x (n, d); ``same``: x is the head of y, and no row is its own neighbour."""
    if x.shape[1:] != y[0:1].shape[1:] or len(y) < 2 + same:
        raise ValueError(f"given samples {tuple(x.shape)} and a set of {len(y)}, expected one dimension and at least {2 + same} members")
    values, index = torch.full((len(x), 2), torch.inf, dtype=torch.float64), torch.zeros(len(x), 2, dtype=torch.long)
    for start in range(0, len(y), MEMBERS):
        for part, distance in _distances(x, y[start : start + MEMBERS]):
            own = torch.arange(max(part.start, start), max(min(part.stop, start + distance.shape[1]), max(part.start, start)))
            if same:
                distance[own - part.start, own - start] = torch.inf
            found = distance.topk(min(2, distance.shape[1]), largest=False)
            best = torch.cat([values[part], found.values], 1).topk(2, largest=False)
            index[part] = torch.cat([index[part], found.indices + start], 1).gather(1, best.indices)
            values[part] = best.values
    return Nearest(values[:, 0], values[:, 1], index[:, 0])
