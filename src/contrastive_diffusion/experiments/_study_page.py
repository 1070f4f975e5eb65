"""The page of the study: paired changes against plain training with 95 % intervals, curves, the verdict in words."""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._study_measures import LEVELS, OFFSETS, QUALITY
from contrastive_diffusion.metrics import Interval, average, interval

Found = dict[str, Any]  # what was measured of one denoiser
Arms = dict[str, list[Found]]  # by arm, one for each training seed


def _geometric(*offsets: float) -> Callable[[Found], float]:
    """Mean log error over the levels at these offsets."""
    keys = [f"error {level:g} {offset:+g}" for level in LEVELS for offset in offsets]
    return lambda found: sum(math.log(found[key]) for key in keys) / len(keys)


RATIOS: dict[str, Callable[[Found], float]] = {
    "in distribution": _geometric(0.0),
    "noisier than claimed": _geometric(-4.0, -2.0, -1.0),
    "cleaner than claimed": _geometric(1.0, 2.0, 4.0),
    "on parallel iterates": lambda found: math.log(found["error on iterates"]),
}
DIGITS: dict[str, Callable[[Found], float]] = {
    "held-out error": lambda found: sum(math.log(v) for k, v in found.items() if k.startswith("held-out error")) / 7,
    "ratio cross-entropy": lambda found: sum(math.log(v) for k, v in found.items() if k.startswith("ratio cross-entropy")) / 4,
}


def blocks(
    config: Any, results: dict[str, Arms], factors: Arms, facts: dict[str, Any], reference: str, known: Collection[str]
) -> tuple[list[page.Block], Found, dict[str, Tensor]]:
    """Page blocks, numbers and arrays of the whole study; ``known``: names of the arrays that are there already."""
    numbers: Found = {"measured": results, "factors": factors, "facts": facts, "changes": {}}
    arrays: dict[str, Tensor] = {}
    tables = []
    for law, arms in results.items():
        changes = _changes(arms, arms[reference], reference, law)
        numbers["changes"][law] = changes
        tables += _law(config, law, arms, changes, reference, arrays)
    if factors:
        law = next(iter(results))
        changes = _changes(factors, results[law][reference][: len(next(iter(factors.values())))], "", law)
        numbers["changes"]["factors"] = changes
        seeds = len(next(iter(factors.values())))
        tables.append(
            _table(f"The loss's own choices, {law}", changes, f"Against {reference}, {seeds} training seeds; intervals of two seeds are wide.")
        )
    return [page.text(*_verdict(results, numbers["changes"])), *tables, *_iterates(facts, known)], numbers, arrays


def _changes(arms: Arms, against: list[Found], reference: str, law: str) -> Found:
    """Paired over training seeds: log ratios of errors, differences of the rest, as intervals."""
    measures = dict(DIGITS if law == "digits" else RATIOS)
    plain = {k: (lambda f, k=k: f[k]) for k in against[0] if k.startswith(("log-density", "mmd", "held-out nll", "rounds"))}
    found: Found = {}
    for name, runs in arms.items():
        if name != reference:
            found[name] = {}
            for key, value in (measures | plain).items():
                if all(key in measures or (key in a and key in b) for a, b in zip(runs, against, strict=True)):
                    found[name][key] = interval([value(a) - value(b) for a, b in zip(runs, against, strict=True)])
    return found


def _percent(change: Interval) -> str:
    low, high = (100 * math.expm1(v) for v in (change.low, change.high))
    return f"{100 * math.expm1(change.mean):+.0f}% [{low:+.0f}, {high:+.0f}]"


def _nats(change: Interval) -> str:
    return f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"


def _table(title: str, changes: Found, caption: str) -> page.Block:
    first = next(iter(changes.values()))
    ratios = [key for key in (*RATIOS, *DIGITS) if key in first]
    others = [key for key in first if key not in ratios and not key.startswith(("mmd", "rounds", "log-density after"))]
    rows = [[name, *[_percent(found[key]) for key in ratios], *[_nats(found[key]) for key in others]] for name, found in changes.items()]
    return page.table(
        title, ["arm", *[f"{key}, error" if key in RATIOS else key for key in ratios], *[f"{key}, nats" for key in others]], rows, caption
    )


def _law(config: Any, law: str, arms: Arms, changes: Found, reference: str, arrays: dict[str, Tensor]) -> list[page.Block]:
    seeds = len(arms[reference])
    evals = {name: runs[0]["evals"] for name, runs in arms.items()}
    caption = (
        f"Change against {reference} ({evals[reference]:,} denoiser evaluations after the common start; equal-steps arm {evals['plain, equal steps']:,}, from scratch "
        f"{evals['contrastive, from scratch']:,}). Mean over {seeds} training seeds and 95 % interval of the paired difference. Errors: geometric mean over cells of squared error; "
        "negative is better. Log-density: positive is better."
    )
    found = [_table(f"{law}: change against plain training at equal evaluations", changes, caption), _absolute(law, arms)]
    if law == "digits":
        return found
    shown = [name for name in ("plain", "contrastive", "uniform", "contrastive, uniform") if name in arms]
    arrays["offsets"] = torch.tensor(OFFSETS)
    curves = []
    for name in shown:
        for level in (8.0,):
            scores = [average([run[f"error {level:g} {offset:+g}"] for run in arms[name]]) for offset in OFFSETS]
            key = f"{law}.{name}.{level:g}"
            arrays[key], arrays[f"{key}.err"] = torch.tensor([s.mean for s in scores]), torch.tensor([s.stderr for s in scores])
            curves.append(page.series(name, "offsets", key, f"{key}.err"))
    found.append(
        page.lines(
            f"{law}: error at log-SNR 8 on points of other levels", "level of the points less 8, nats (left: noisier than claimed)", "squared error of eps-hat", curves,
            f"Mean and standard error over {seeds} training seeds.", logy=True,
        )
    )  # fmt: skip
    return found + _rounds(law, arms, arrays, seeds)


def _absolute(law: str, arms: Arms) -> page.Block:
    first = next(iter(arms.values()))[0]
    keys = [k for k in first if k.startswith(("log-density", "mmd", "held-out", "ratio accuracy")) and " after " not in k][:10]
    truth = {k.removeprefix("true log-density "): v for k, v in first.items() if k.startswith("true")}
    exact = f" True log-density at the last level of {', '.join(f'{k} steps: {v:.2f}' for k, v in truth.items())}." if truth else ""
    rows = [[name, *[average([run[key] for run in runs]) for key in keys]] for name, runs in arms.items()]
    return page.table(f"{law}: measured", ["arm", *keys], rows, f"Mean and standard error over training seeds.{exact}")


def _rounds(law: str, arms: Arms, arrays: dict[str, Tensor], seeds: int) -> list[page.Block]:
    """Quality of the parallel sampler after a number of rounds, where it was measured."""
    names = [name for name, runs in arms.items() if "rounds" in runs[0]]
    kept = [q for q in QUALITY if all(f"log-density after round {q}" in run for name in names for run in arms[name])]
    if not names or len(kept) < 2:
        return []
    arrays[f"{law}.quality rounds"] = torch.tensor(kept)
    curves = []
    for name in names:
        scores = [average([max(run[f"log-density after round {q}"], -1e3) for run in arms[name]]) for q in kept]
        key = f"{law}.{name}.quality"
        arrays[key], arrays[f"{key}.err"] = torch.tensor([s.mean for s in scores]), torch.tensor([s.stderr for s in scores])
        curves.append(page.series(name, f"{law}.quality rounds", key, f"{key}.err"))
    caption = f"Exact log-density of the current sample, Picard, 1000 DDPM steps, mean and standard error over {seeds} training seeds; values below -1000 nats count as -1000."
    return [page.lines(f"{law}: the parallel sampler's sample after some rounds", "round", "log-density, nats", curves, caption)]


def _iterates(facts: dict[str, Any], known: Collection[str]) -> list[page.Block]:
    """Which level the parallel sampler's iterates look like."""
    found = []
    for law in facts:
        low, high = facts[law]["matched"]
        curves = [page.series(f"round {k}", f"{law}.steps.{k}", f"{law}.offset.{k}") for k in (3, 9, 15, 21, 27) if f"{law}.steps.{k}" in known]
        caption = (
            f"Picard with the exact denoiser: the most likely level of each iterate less the level it is read at, mean over 24 samples. Levels that iterates look like: nine tenths in "
            f"[{low:.1f}, {high:.1f}]."
        )
        found.append(
            page.lines(f"{law}: where the parallel sampler looks", "log-SNR of the step, nats", "likeliest level less nominal, nats", curves, caption)
        )
    return found


def _verdict(results: dict[str, Arms], changes: Found) -> list[str]:
    """One sentence a law, made from the intervals."""
    words = []
    for law in results:
        change = changes[law]["contrastive"]
        keys = DIGITS if law == "digits" else RATIOS
        parts = []
        for key in keys:
            low, high = change[key].low, change[key].high
            parts.append(f"{key} {'worse' if low > 0 else 'better' if high < 0 else 'not distinguishable'} ({_percent(change[key])})")
        key = next(k for k in change if k.startswith(("log-density", "held-out nll")))
        unit, density = key if law == "digits" else f"{key} of samples", change[key]
        words.append(
            f"{law}: contrastive fine-tuning against plain fine-tuning at equal evaluations: {'; '.join(parts)}; {unit} {_nats(density)} nats."
        )
    return words
