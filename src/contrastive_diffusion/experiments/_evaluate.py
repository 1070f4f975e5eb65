"""What ``cdl evaluate`` and ``cdl compare`` do: sets are opened (or generated), measured in a run folder, and shown on a page."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive_diffusion import evaluation, metrics
from contrastive_diffusion.errors import require
from contrastive_diffusion.evaluation import references, score
from contrastive_diffusion.evaluation.samples import Samples, check_alike, open_samples
from contrastive_diffusion.evaluation.score import Difference, Measure
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.metrics import Score
from contrastive_diffusion.runs import Run
from contrastive_diffusion.runs.generate import Request, generate
from contrastive_diffusion.runs.generated import MANIFEST, Generated, open_generated

ORIGIN = ("source", "source_hash", "weights", "solver", "steps", "evals_per_sample", "grid", "sampler", "seed", "first", "label")
SHOWN = 48  # images of a set on a page


@dataclass(frozen=True)
class Scored:
    """A set and what was measured of it."""

    samples: Samples
    measures: list[Measure]
    features: references.Features


def evaluate(options: Any) -> Path:
    """Measures the sets ``options.generated``; returns the run folder."""
    require(len(options.generated) >= 1, "no generated set", "at least one", "try cdl evaluate samples.npy --data digits")
    sets = [opened(name, options.n) for name in options.generated]
    copies = len(sets) - len({one.hash for one in sets})
    require(not copies, f"{copies + 1} sets with the same samples", "sets of different seeds", "generate them with another --seed")
    run = _run(options, "evaluate", Path(options.generated[0]).name)
    scored, to, left = _scored(options, run, sets)
    blocks = [
        _words(options, scored, to, left),
        _table(scored),
        _details(scored[0]),
        *([_spread(scored)] if len(scored) > 1 else []),
        _origins(scored),
    ]
    shown, arrays = _pictures(scored, to)
    title = f"{scored[0].samples.name} against {to.name}" + (f", {len(scored)} sets" if len(scored) > 1 else "")
    record = {"sets": [_record(one) for one in scored], "reference": to.described(), "extractor": _extractor_id(options), "left out": left}
    run.write_results({"title": title, "blocks": blocks + shown, "record": record}, arrays)
    return run.path


def compare(options: Any) -> Path:
    """Measures A and B and their difference; returns the run folder."""
    run = _run(options, "compare", f"{Path(options.a).name}-{Path(options.b).name}")
    names = [_generated(options, run, letter, name) for letter, name in (("A", options.a), ("B", options.b))]
    a, b = (opened(name, options.n) for name in names)
    require(a.hash != b.hash, f"{options.a} and {options.b} with the same samples", "two different sets")
    require(a.n == b.n, f"{a.n} samples of A and {b.n} of B", "as many of both", f"add --n {min(a.n, b.n)}")
    paired, why = _paired(options.paired, a, b)
    (one, two), to, left = _scored(options, run, [a, b])
    differences = evaluation.compare(one.measures, two.measures, paired)
    sentence = score.verdict(differences, a.n)
    words = page.text(f"A is `{options.a}`, B is `{options.b}`. {sentence}", f"{why} {_about(options, to)}", *_left(left))
    scored = [Scored(replace(s.samples, name=letter), s.measures, s.features) for letter, s in (("A", one), ("B", two))]
    shown, arrays = _pictures(scored, to)
    record = {"A": _record(one), "B": _record(two), "differences": [asdict(d) for d in differences], "paired": paired, "verdict": sentence}
    record |= {"reference": to.described(), "extractor": _extractor_id(options), "left out": left}
    blocks = [words, _table(scored), _differences(differences), _origins(scored), *shown]
    run.write_results({"title": f"A against B, by {to.name}", "blocks": blocks, "record": record}, arrays)
    return run.path


def opened(name: str, n: int | None) -> Samples:
    """A generated set: a folder of ``cdl generate``, whose content is checked against its manifest, or anything ``open_samples`` reads."""
    if not (Path(name) / MANIFEST).is_file():
        require(Path(name).exists(), f"generated set {name!r}", "an existing file or folder", "make one with cdl generate")
        return open_samples(name, n)
    found = open_generated(name)
    shape, hashes = (), []
    for shard in found.shards():
        shape, hashes = tuple(shard.data.shape[1:]), [*hashes, shard.sha256()]
    origin = {key: found.manifest[key] for key in ORIGIN if found.manifest.get(key) is not None}
    return Samples(name, len(found), shape, _digest(hashes), _Reader(found).read, origin, ids=True).first(n)


def _digest(hashes: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


class _Reader:
    """Samples of a generated set by position; reading on is one pass over its shards."""

    def __init__(self, generated: Generated):
        self.generated = generated
        self._restart()

    def _restart(self) -> None:
        self.shards, self.begin, self.data = iter(self.generated.shards()), 0, torch.empty(0)

    def read(self, begin: int, end: int) -> Tensor:
        """Positions [begin, end)."""
        if begin < self.begin:
            self._restart()
        pieces = []
        while begin < end:
            while begin >= self.begin + len(self.data):
                self.begin, self.data = self.begin + len(self.data), next(self.shards).data
            piece = self.data[begin - self.begin : end - self.begin]
            pieces.append(piece)
            begin += len(piece)
        return torch.cat(pieces)


def _generated(options: Any, run: Run, letter: str, name: str) -> str:
    """The set called ``name``, or one generated from the run or model folder of that name, with the same seeds for both letters."""
    if (Path(name) / MANIFEST).is_file() or not any((Path(name) / file).is_file() for file in ("recipe.yaml", "config.json")):
        return name
    out = str(run.path / f"generated-{letter}")
    asked = {key: getattr(options, key) for key in ("solver", "steps", "evals", "grid", "seed", "label", "weights", "device", "batch")}
    generate(Request(source=name, out=out, n=options.n or 5000, **asked))
    return out


def _paired(asked: str, a: Samples, b: Samples) -> tuple[bool, str]:
    """Whether sample i of both sets came from the same noise, and a sentence that says so."""
    same = a.ids and b.ids and all(a.origin.get(key) == b.origin.get(key) for key in ("seed", "first"))
    if asked == "yes" or (asked == "auto" and same):
        return True, "Samples are paired: sample i of both comes from the same noise, so blocks of the same ids are compared."
    return False, "Samples are not paired: the two sets count as independent" + ("." if asked == "no" else ", as no seeds are known that they share.")


def _run(options: Any, kind: str, name: str) -> Run:
    return Run.open(options.out or f"runs/{kind}-{name}", options)


def _scored(options: Any, run: Run, sets: Sequence[Samples]) -> tuple[list[Scored], references.Reference, dict[str, str]]:
    """Features of all sets and of the reference, and their measures."""
    extractor = evaluation.extractor(options.extractor, options.device)
    real = Path(options.data) if references.is_moments(options.data) else open_samples(options.data, options.reference_n)
    check_alike([*sets, *([real] if isinstance(real, Samples) else [])])
    cache = Path(options.cache) if options.cache else references.cache_folder()
    total = sum(one.n for one in sets) + (real.n if isinstance(real, Samples) else 0)
    with _bar(total) as watch:
        to = evaluation.reference(real, extractor, cache, options.batch, watch(0))
        done, scored, left = real.n if isinstance(real, Samples) else 0, [], {}
        for one in sets:
            found = evaluation.features(one, extractor, run.path, options.batch, watch(done))
            measures, left = evaluation.evaluate(found, to, extractor, options.metrics, options.blocks, options.neighbours)
            scored.append(Scored(one, measures, found))
            done += one.n
    return scored, to, left


@contextmanager
def _bar(total: int) -> "Iterator[Callable[[int], Callable[[int], None]]]":
    """A bar over all samples, as ``watch(done before)(done of this set)``."""
    from tqdm import tqdm

    with tqdm(total=total, desc="features", unit="sample", leave=False) as bar:

        def watch(before: int) -> Callable[[int], None]:
            def seen(done: int) -> None:
                bar.update(max(before + done - bar.n, 0))

            return seen

        yield watch


def _extractor_id(options: Any) -> str:
    return evaluation.extractor(options.extractor, "cpu").id


def _record(one: Scored) -> dict[str, Any]:
    s = one.samples
    return {"name": s.name, "n": s.n, "hash": s.hash, "origin": s.origin, "measures": [m.record() for m in one.measures]}


def _about(options: Any, to: references.Reference) -> str:
    size = f"{to.n:,} samples" if to.n else "samples of an unknown number, by their mean and covariance"
    return (
        f"The reference is `{to.name}`, {size}, in {to.d} features of the extractor `{_extractor_id(options)}`. "
        f"Intervals are 95 %, over the generated samples, by leaving out each of {options.blocks} blocks; the reference is taken as it is."
    )


def _left(left: dict[str, str]) -> list[str]:
    return ["Left out: " + "; ".join(f"{name} ({why})" for name, why in left.items()) + "."] if left else []


def _words(options: Any, scored: Sequence[Scored], to: references.Reference, left: dict[str, str]) -> page.Block:
    first = scored[0]
    sets = f"{len(scored)} sets of {first.samples.n:,} samples" if len(scored) > 1 else f"{first.samples.n:,} samples of `{first.samples.name}`"
    biased = [m for m in first.measures if m.unbiased]
    words = [
        f"The {m.label} of {m.n:,} samples is {m.value:.4g}, of which {m.value - m.unbiased.mean:.2g} is due to their number."
        for m in biased
        if m.unbiased
    ]
    return page.text(f"{sets}. {' '.join(words)}", _about(options, to), *_left(left))


def _table(scored: Sequence[Scored]) -> page.Block:
    """A row for each set; with several, the mean over them with its own error."""
    columns = ["set", *(m.label for m in scored[0].measures)]
    rows: list[list[Any]] = [[one.samples.name, *(Score(m.value, m.replicates.stderr) for m in one.measures)] for one in scored]
    if len(scored) > 1 and scored[0].samples.name != "A":
        rows.append(["mean of the sets", *(metrics.average([m.value for m in row]) for row in zip(*(one.measures for one in scored), strict=True))])
    return page.table(
        "Measures", columns, rows, "± is one standard error: of a set over its samples, of the mean over the sets. Never the best of them."
    )


def _details(one: Scored) -> page.Block:
    """Each measure of a set with its interval."""
    columns = ["measure", "value", "95 % interval", "without the part that falls as 1/n", "better", "n", "reference n", "note"]
    rows = [
        [m.label, m.value, _shown(m.low, m.high), f"{m.unbiased.mean:.4g} {_shown(m.unbiased.low, m.unbiased.high)}" if m.unbiased else None, m.better,
         m.n, m.m, m.note] for m in one.measures
    ]  # fmt: skip
    caption = f"Of {one.samples.name}. The unbiased column extrapolates the number of generated samples to infinity, not that of the reference."
    return page.table("Intervals", columns, rows, caption)


def _spread(scored: Sequence[Scored]) -> page.Block:
    """The mean over sets with Student's interval."""
    rows = []
    for measures in zip(*(one.measures for one in scored), strict=True):
        found = metrics.interval([m.value for m in measures])
        rows.append([measures[0].label, found.mean, _shown(found.low, found.high), min(m.value for m in measures), max(m.value for m in measures)])
    return page.table("Over the sets", ["measure", "mean", "95 % interval", "least", "most"], rows, f"Student's interval of {len(scored)} sets.")


def _differences(found: Sequence[Difference]) -> page.Block:
    words = {"A": "A is better", "B": "B is better", "none": "no difference shown"}
    rows = [[d.label, d.mean, _shown(d.low, d.high), words[d.verdict]] for d in found]
    return page.table(
        "A less B", ["measure", "difference", "95 % interval", "verdict"], rows, "Where a measure has a part that falls as 1/n, without it."
    )


def _shown(low: float, high: float) -> str:
    return f"[{low:.4g}, {high:.4g}]"


def _origins(scored: Sequence[Scored]) -> page.Block:
    """Where each set comes from, as far as it says."""
    keys = [key for key in (*ORIGIN, "quantised", "drawn") if key != "source_hash" and any(key in one.samples.origin for one in scored)]
    rows = [[s.name, s.n, *(str(s.origin.get(key, "unknown")) for key in keys), s.hash[:12]] for s in (one.samples for one in scored)]
    return page.table("Where the samples come from", ["set", "n", *(key.replace("_", " ") for key in keys), "sha256"], rows)


def _pictures(scored: Sequence[Scored], to: references.Reference) -> tuple[list[page.Block], dict[str, Tensor]]:
    """Grids of images side by side, and generated images above their nearest in the reference; clouds of points in a plane."""
    shape, real = scored[0].samples.shape, to.samples
    named = [(one.samples.name, one.samples) for one in scored[:3]] + ([(f"reference: {real.name}", real)] if real else [])
    panels = [(name, f"set{i}.samples") for i, (name, _) in enumerate(named)]
    if len(shape) == 3 and shape[1] <= 256:
        arrays = {key: _floats(s.read(0, min(SHOWN, s.n))) for (_, key), (_, s) in zip(panels, named, strict=True)}
        blocks = [page.images("Samples", panels, "The first of each set, not chosen.", rows=6, columns=8, across=min(3, len(panels)))]
        if real and to.features is not None:
            blocks.append(page.images("Nearest in the reference", _nearest(scored, to, real, arrays), _PAIRS, rows=2, columns=16, across=1))
        return blocks, arrays
    if shape == (2,):
        arrays = {key: s.read(0, min(2000, s.n)) for (_, key), (_, s) in zip(panels, named, strict=True)}
        most = max(float(x.abs().quantile(0.999)) for x in arrays.values()) * 1.1
        return [page.scatter("Samples", panels, "The first 2,000 of each set.", limits=[-most, most, -most, most], columns=3)], arrays
    return [], {"none": torch.zeros(1)}


_PAIRS = (
    "Above: the sixteen samples of each set that are nearest to the reference, in features. Below: the samples of the reference they are nearest to."
)


def _nearest(scored: Sequence[Scored], to: references.Reference, real: Samples, arrays: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Adds pairs to ``arrays``; returns their panels."""
    panels = []
    for i, one in enumerate(scored[:3]):
        x = one.features[0 : min(score.PAIRS, one.samples.n)]
        found = metrics.nearest(x, to.features)  # pyright: ignore[reportArgumentType]
        closest = found.distance.argsort()[:16].tolist()
        pairs = [[one.samples.read(at, at + 1) for at in closest], [real.read(at, at + 1) for at in found.index[closest].tolist()]]
        arrays[f"set{i}.pairs"] = _floats(torch.cat([*pairs[0], *pairs[1]]))
        panels.append((one.samples.name, f"set{i}.pairs"))
    return panels


def _floats(x: Tensor) -> Tensor:
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x
