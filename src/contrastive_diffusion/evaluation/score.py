"""Measures of a set against a reference with 95 % intervals, and the difference of two sets.

An interval is over the generated samples, by leaving out blocks of consecutive ids; the reference is taken as it is. Where a measure cannot mean
anything (a covariance of fewer samples than dimensions, neighbours of a reference known by its moments), it is refused by name, or left
out with the reason where no one asked for it by name.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from contrastive_diffusion import metrics
from contrastive_diffusion.errors import UsageError, choose, require
from contrastive_diffusion.evaluation.extractors import Extractor
from contrastive_diffusion.evaluation.references import MOST, Features, Reference
from contrastive_diffusion.metrics import Interval, Replicates

FEWEST = 50  # samples: below it no interval by blocks is worth its name
PAIRS = 10_000  # rows of each side that measures with all pairs use at most
BLOCKS = 10


@dataclass(frozen=True)
class Measure:
    """One number.

    Args:
        key, label: its name in files, and on pages. value, low, high: with its 95 % interval over the generated samples, n of them against m.
        unbiased: the value without the part that falls as 1/n, and its interval, for measures that have one.
        better: which way is better. replicates: what differences and intervals come from. note: what to know about it.
    """

    key: str
    label: str
    value: float
    low: float
    high: float
    n: int
    m: int | None
    better: Literal["lower", "higher", "neither"]
    replicates: Replicates = field(repr=False, compare=False)
    unbiased: Interval | None = None
    note: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        kept = {k: v for k, v in self.__dict__.items() if k not in ("replicates", "unbiased")}
        return kept | {"stderr": self.replicates.stderr, "unbiased": asdict(self.unbiased) if self.unbiased else None}


@dataclass(frozen=True)
class Task:
    """A set's features, its reference, and what the pairs of them share."""

    x: Features
    to: Reference
    extractor: Extractor
    blocks: int
    neighbours: int

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """At most PAIRS rows of each side, evenly spread."""
        require(self.to.features is not None, f"reference {self.to.name}, known by its mean and covariance", "a set of samples for this measure")
        assert self.to.features is not None
        return _spread(self.x, PAIRS), _spread(self.to.features, PAIRS)

    def measure(
        self, key: str, label: str, found: Replicates, better: Any, n: int, m: int | None, biased: bool = False, note: str = ""
    ) -> Measure:  # fmt: skip
        whole = found.interval()
        return Measure(key, label, whole.mean, whole.low, whole.high, n, m, better, found, found.interval(unbiased=True) if biased else None, note)


def _spread(rows: Features, most: int) -> Tensor:
    if len(rows) <= most:
        return rows[0 : len(rows)]
    at = torch.arange(most) * len(rows) // most
    edges = range(0, len(rows), 4096)
    return torch.cat([rows[e : e + 4096][at[(at >= e) & (at < e + 4096)] - e] for e in edges])


def frechet(task: Task) -> list[Measure]:
    """Frechet distance of Gaussians with the sets' means and covariances; extrapolated in 1/n."""
    to, d = task.to, task.to.d
    require(d <= MOST, f"{d} features", f"at most {MOST} for a covariance", "use an extractor with fewer")
    assert to.mean is not None
    assert to.cov is not None
    kept = len(task.x) - -(-len(task.x) // task.blocks)
    todo = f"generate more than {-(-(d + 1) * task.blocks // (task.blocks - 1))}, or use an extractor with fewer features"
    require(kept > d, f"{len(task.x)} samples for a covariance of {d} features", f"more than {d} without a block", todo)
    require(
        to.n is None or to.n > d, f"a reference of {to.n} samples for a covariance of {d} features", f"more than {d}", "use more, or fewer features"
    )
    blocks = metrics.bounds(len(task.x), task.blocks)
    found = metrics.frechet_replicates(task.x, metrics.Frechet(to.mean, to.cov), blocks)
    few = f"only {len(task.x) / d:.1f} samples per feature: the part that falls faster than 1/n is left" if len(task.x) < 10 * d else ""
    return [task.measure("frechet", task.extractor.frechet, found, "lower", len(task.x), to.n, True, few)]


def kid(task: Task) -> list[Measure]:
    """Kernel distance: unbiased squared MMD with the cubic kernel."""
    x, y = task.pairs
    found = metrics.MMD(y, metrics.polynomial()).replicates(x, metrics.bounds(len(x), task.blocks))
    label = "KID" if task.extractor.frechet == "FID" else "kernel distance (cubic)"
    return [task.measure("kid", label, found, "lower", len(x), len(y))]


def mmd(task: Task) -> list[Measure]:
    """Unbiased squared MMD with a Gaussian kernel as wide as the reference's median distance."""
    x, y = task.pairs
    width = metrics.median_distance(y)
    require(width > 0, f"reference {task.to.name} with a median distance of 0", "samples that differ")
    found = metrics.MMD(y, width).replicates(x, metrics.bounds(len(x), task.blocks))
    return [task.measure("mmd", "MMD² (Gaussian)", found, "lower", len(x), len(y), note=f"bandwidth {width:.4g}, the reference's median distance")]


def sliced(task: Task) -> list[Measure]:
    """Squared sliced Wasserstein distance along 256 directions; extrapolated in 1/n."""
    x, y = task.pairs
    found = metrics.sliced_wasserstein(x, y, metrics.directions(task.to.d), metrics.bounds(len(x), task.blocks))
    return [task.measure("sliced", "sliced W₂²", found, "lower", len(x), len(y), True)]


def prdc(task: Task) -> list[Measure]:
    """Precision, recall, density, coverage with k neighbours."""
    x, y = task.pairs
    found = metrics.prdc(x, y, metrics.bounds(len(x), task.blocks), task.neighbours)
    return [task.measure(key, key, one, "higher", len(x), len(y), note=f"k = {task.neighbours}") for key, one in found.items()]


def nearest(task: Task) -> list[Measure]:
    """Mean distance to the nearest sample of the reference, in units of the reference's own, and the share of near-copies, to be read against chance."""
    x, members = task.pairs[0], task.to.features
    assert members is not None
    found, own = metrics.nearest(x, members), metrics.nearest(members[0 : min(2000, len(members))], members, same=True)
    unit, chance = float(own.distance.mean()), float(own.copies().mean())
    require(unit > 0, f"reference {task.to.name} of equal samples", "samples that differ")
    blocks = metrics.bounds(len(x), task.blocks)
    far, near = (
        metrics.of_blocks([float(v[b:e].mean()) for b, e in blocks], [e - b for b, e in blocks]) for v in (found.distance / unit, found.copies())
    )
    notes = (
        "1: as far as the reference's samples are from each other",
        f"less than a third as far as the next one; {chance:.3g} among the reference's own",
    )
    # neither is better by itself: a bad model copies nothing
    return [
        task.measure("nearest", "distance to the nearest reference sample", far, "neither", len(x), len(members), note=notes[0]),
        task.measure("copies", "near-copies of reference samples", near, "neither", len(x), len(members), note=notes[1]),
    ]


METRICS: dict[str, Callable[[Task], list[Measure]]] = {
    "frechet": frechet,
    "kid": kid,
    "mmd": mmd,
    "nearest": nearest,
    "prdc": prdc,
    "sliced": sliced,
}


def evaluate(
    x: Features, to: Reference, extractor: Extractor, names: Sequence[str] = (), blocks: int = BLOCKS, neighbours: int = 5
) -> tuple[list[Measure], dict[str, str]]:
    """The measures called ``names`` (all that can be had by default), and why others were left out.

    Raises ``UsageError`` for features of different dimension, fewer than FEWEST samples, and named measures that cannot be had.
    """
    given = f"features of dimension {x.d} for a reference of dimension {to.d} ({to.name})"
    require(x.d == to.d, given, "the same extractor for both", "choose the --extractor that the reference was made with")
    require(len(x) >= max(FEWEST, 2 * blocks), f"{len(x)} samples", f"at least {max(FEWEST, 2 * blocks)} for numbers with intervals", "generate more")
    task, found, left = Task(x, to, extractor, blocks, neighbours), [], {}
    for name in [choose(n, METRICS, "metric") for n in names] or METRICS:
        try:
            found += METRICS[name](task)
        except UsageError as error:
            if names:
                raise
            left[name] = str(error)
        except ValueError as error:  # of the measures themselves: too few samples for k neighbours
            raise UsageError(f"{name}: {error}") from error
    require(found, f"nothing that can be measured ({next(iter(left.values()), '')})", "more samples or another extractor")
    return found, left


@dataclass(frozen=True)
class Difference:
    """A measure of A less that of B, with its 95 % interval, and what the interval says."""

    key: str
    label: str
    mean: float
    low: float
    high: float
    verdict: Literal["A", "B", "none"]


def compare(a: Iterable[Measure], b: Iterable[Measure], paired: bool) -> list[Difference]:
    """Differences of measures that have a better side; ``paired``: sample i of both came from the same noise, so blocks pair."""
    other = {measure.key: measure for measure in b}
    return [_difference(m, other[m.key], paired) for m in a if m.key in other and m.better != "neither"]


def _difference(a: Measure, b: Measure, paired: bool) -> Difference:
    unbiased = a.unbiased is not None
    if paired:
        found = a.replicates.minus(b.replicates).interval(unbiased)
    else:
        centre = (a.replicates.extrapolated - b.replicates.extrapolated) if unbiased else a.value - b.value
        # each interval has the same Student quantile; independent errors add in quadrature
        half = (((a.high - a.low) / 2) ** 2 + ((b.high - b.low) / 2) ** 2) ** 0.5
        found = Interval(centre, centre - half, centre + half)
    low, high = (found.low, found.high) if a.better == "lower" else (-found.high, -found.low)
    verdict = "A" if high < 0 else "B" if low > 0 else "none"
    return Difference(a.key, a.label, found.mean, found.low, found.high, verdict)


def verdict(differences: Sequence[Difference], n: int) -> str:
    """One sentence: which set is better by which measures, as far as 95 % intervals tell."""
    won = {side: [d.label for d in differences if d.verdict == side] for side in ("A", "B")}
    if not won["A"] and not won["B"]:
        return f"No difference between A and B that {n:,} samples of each can show, in {len(differences)} measures."
    parts = [f"{side} is better by {', '.join(labels)}" for side, labels in won.items() if labels]
    rest = len(differences) - len(won["A"]) - len(won["B"])
    chance = f"; of {len(differences)} such intervals {0.05 * len(differences):.1f} miss by chance"
    return "; ".join(parts) + (f"; no difference that {n:,} samples can show in the other {rest}" if rest else "") + chance + "."
