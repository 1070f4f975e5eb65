"""Pages of measured sets: tables and curves with errors over seeds, paired differences with intervals, and the paper's numbers where they can be compared."""

from collections.abc import Sequence
from typing import Any

import torch

from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._images import BRANCHES
from contrastive_diffusion.experiments._sets import Arm, Compared, Found, Point
from contrastive_diffusion.metrics import Interval, Score, average, interval
from contrastive_diffusion.runs import Run

SCALES = {"frechet": 1.0, "kid": 1e3}
# FID of the paper's tables: name of the pair -> (plain, contrastive), as mean or (mean, spread over three seeds).
Number = float | tuple[float, float]
Paper = dict[str, tuple[Number, Number]]


def score(found: Found, arm: Arm, point: Point, key: str) -> Score:
    """Mean and standard error over seeds."""
    return average([seed[key] for seed in found.scores[arm.key, point.key]])


def change(found: Found, net: str, point: Point, key: str) -> Interval:
    """Contrastive less plain with its 95 % interval over seeds, each of which starts both from the same noise."""
    plain, other = (found.scores[f"{net}-{branch}", point.key] for branch in BRANCHES)
    return interval([b[key] - a[key] for a, b in zip(plain, other, strict=True)])


def keys(found: Found) -> list[str]:
    """The measures that were taken."""
    first = next(iter(found.scores.values()))[0]
    return [key for key in SCALES if key in first]


def heading(found: Found, key: str) -> str:
    return found.title if key == "frechet" else "kernel distance (cubic) × 1000"


def numbers(found: Found) -> dict[str, Any]:
    """All of it, seed by seed, for results.json."""
    rows = {f"{arm.key}, {point.key}": found.scores[arm.key, point.key] for arm in found.arms for point in found.points}
    changes = {f"{net}, {p.key}": {key: change(found, net, p, key) for key in keys(found)} for net in found.nets for p in found.points}
    return {"by seed": rows, "contrastive less plain": changes, "held-out": found.control, "denoiser evaluations": found.evals}


def words(interval_: Interval) -> str:
    return "wins" if interval_.high < 0 else "loses" if interval_.low > 0 else "ties"


def verdict(found: Found, key: str = "frechet") -> str:
    """Where the contrastive network is closer to the data, at 95 % over seeds."""
    parts = []
    for net in found.nets:
        told = [f"{words(change(found, net, point, key))} ({point.label})" for point in found.points]
        parts.append(f"{net}: the contrastive network {', '.join(told)}")
    tests = len(found.nets) * len(found.points)
    return (
        f"By the {found.title}, at 95 % over {_seeds(found)} sampling seeds ({tests} tests): " + "; ".join(parts) + ". One training of each network."
    )


def _seeds(found: Found) -> int:
    return len(next(iter(found.scores.values())))


def table(config: Compared, found: Found, title: str, paper: dict[str, Paper] | None = None) -> page.Block:
    """A row for each network and way to sample, the two branches beside one another. ``paper``: by the key of a point, shown where comparable."""
    cited = {point.key: theirs for point in found.points if (theirs := _comparable(config, found, (paper or {}).get(point.key)))}
    columns = [""]
    for key in keys(found):
        columns += [f"{heading(found, key)}, plain", "contrastive", "contrastive less plain, 95 %"]
    columns += [*(["the paper's FID", "the paper's FID, CDL"] if cited else []), "evaluations a sample, plain", "contrastive"]
    rows = [_row(found, net, point, cited) for net in found.nets for point in found.points]
    sets = config.sets
    held = ", ".join(f"{heading(found, k)} {expected(found, k):.3g}" for k in keys(found) if k in found.control)
    caption = (
        f"{sets.n:,} samples for each of {sets.seeds} seeds; ± standard error over seeds; differences are paired by seed (the same noise for both networks), with 95 % intervals. "
        f"Features: {sets.extractor}. Lower is better. Values are at this n; results.json has those extrapolated to n without end."
        + (f" Held-out images, which are few, extrapolated: {held}." if held else "")
    )
    return page.table(title, columns, rows, caption)


def expected(found: Found, key: str) -> float:
    """What held-out images score, without the part that is due to their number where the measure has one."""
    return SCALES[key] * found.control.get(f"{key}, extrapolated", found.control[key])


def _row(found: Found, net: str, point: Point, cited: dict[str, tuple[Number, Number]]) -> list[Any]:
    arms, cells = [arm for arm in found.arms if arm.net == net], []
    for key in keys(found):
        difference, scale = change(found, net, point, key), SCALES[key]
        cells += [page.cell(score(found, arm, point, key), scale) for arm in arms]
        cells.append(f"{scale * difference.mean:+.3g} [{scale * difference.low:.3g}, {scale * difference.high:.3g}]")
    if cited:
        cells += [_cited(number) for number in cited[point.key]] if point.key in cited else [None, None]
    return [f"{net}, {point.label}", *cells, *(score(found, arm, point, "evals") for arm in arms)]


def _comparable(config: Compared, found: Found, paper: Paper | None) -> tuple[Number, Number] | None:
    """The paper's numbers of this pair of checkpoints, if the measure is FID."""
    return (paper or {}).get(config.checkpoints.name) if found.title == "FID" else None


def _cited(number: Number) -> str:
    return f"{number[0]:.2f} ± {number[1]:.2f}" if isinstance(number, tuple) else f"{number:.2f}"


def curve(found: Found, arrays: dict[str, Any], arm: Arm, points: Sequence[Point], x: Sequence[float], key: str, name: str) -> dict[str, Any]:
    """A measure over ``points`` as arrays NAME.x, NAME.y, NAME.err and the series that draws them."""
    scores = [score(found, arm, point, key) for point in points]
    arrays[f"{name}.x"] = torch.tensor(x, dtype=torch.float64)
    arrays[f"{name}.y"] = torch.tensor([s.mean * SCALES[key] for s in scores], dtype=torch.float64)
    arrays[f"{name}.err"] = torch.tensor([s.stderr * SCALES[key] for s in scores], dtype=torch.float64)
    return page.series(name.split(".", 1)[1], f"{name}.x", f"{name}.y", f"{name}.err")


def pictures(found: Found, arrays: dict[str, Any], title: str, points: Sequence[Point], side: int = 6) -> list[page.Block]:
    """Grids of the first samples of seed 0, side by side for the networks, the data last; none of vectors."""
    panels = []
    for point in points:
        for arm in found.arms:
            arrays[f"shown.{arm.key}.{point.key}"] = found.shown[arm.key, point.key][: side * side]
            panels.append((f"{arm.net}, {arm.branch}, {point.label}", f"shown.{arm.key}.{point.key}"))
    if len(found.data):
        arrays["shown.data"] = found.data[: side * side]
        panels.append(("data", "shown.data"))
    about = "Sample i of every panel starts from the same noise; nothing is picked."
    return [page.images(title, panels, about, rows=side, columns=side, across=len(BRANCHES) if side > 6 else 4)]


def finish(main: Run, experiment: str, title: str, found: Found, blocks: list[page.Block], arrays: dict[str, Any]) -> None:
    """Writes the results."""
    told = numbers(found) if keys(found) else {"by seed": {}}
    main.write_results({"experiment": experiment, "title": title, "numbers": page.numbers(told), "blocks": blocks}, arrays)
