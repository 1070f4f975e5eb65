"""What the page of the parallel experiment shows: its tables, the comparison at equal error, and what happened round by round."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.experiments._look import heat, iterates, progress
from contrastive_diffusion.metrics import Score, average

BASELINE = "paradigms"
METHODS = (BASELINE, "picard", "eps", "x0", "gauss", "secant")
SWEPT = (BASELINE, "picard", "secant")  # methods compared at equal error
ERRORS = (1e-2, 3e-3, 1e-3)  # worst errors at which they are


class Shown(Protocol):
    """The fields of the recipe that the page needs."""

    @property
    def windows(self) -> tuple[int, ...]: ...
    @property
    def sweep(self) -> tuple[float, ...]: ...
    @property
    def steps(self) -> int: ...
    @property
    def short(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def large(self) -> int: ...
    @property
    def seeds(self) -> int: ...
    @property
    def tolerance(self) -> float: ...


@dataclass(frozen=True)
class Table:
    """One row for every call: denoiser, method, case, seed, and its numbers."""

    rows: list[dict[str, Any]]

    def of(self, **where: Any) -> list[dict[str, Any]]:
        return [row for row in self.rows if all(row[key] == value for key, value in where.items())]

    def score(self, key: str, **where: Any) -> Score:
        """Mean over seeds."""
        return average([float(row[key]) for row in self.of(**where)])

    def worst(self, **where: Any) -> float:
        """The largest error of a sample over all seeds."""
        return max(row["worst"] for row in self.of(**where))

    def denoisers(self) -> list[str]:
        return list(dict.fromkeys(row["denoiser"] for row in self.rows))


def at_error(points: Sequence[tuple[float, float, float]], error: float) -> tuple[float, float] | None:
    """Rounds and evaluations at a worst error, interpolated in its logarithm between runs (error, rounds, evaluations), strictest first; None outside of them.

    The error of a run counts as that of the worst run at least as strict: a sample that changes modes at one tolerance spoils all looser ones.
    """
    errors = np.maximum.accumulate([max(p[0], 1e-12) for p in points])  # one that is exact has a logarithm too
    if not errors[0] <= error <= errors[-1]:
        return None
    rounds, evals = (float(np.interp(math.log(error), np.log(errors), [p[k] for p in points])) for k in (1, 2))
    return rounds, evals


def equal_error(config: Shown, table: Table, name: str) -> dict[str, dict[str, dict[str, float] | None]]:
    """Worst error -> method -> rounds and evaluations a step; and their ratios, secant over the others."""
    found: dict[str, dict[str, dict[str, float] | None]] = {}
    for error in ERRORS:
        line = found.setdefault(f"{error:g}", {})
        for method in SWEPT:
            cases = [
                {"denoiser": name, "method": method, "solver": "ddpm", "window": None, "tolerance": t}
                for t in sorted({config.tolerance, *config.sweep})
            ]
            at = at_error([(table.worst(**c), table.score("rounds", **c).mean, table.score("evals", **c).mean) for c in cases], error)
            line[method] = at and {"rounds": at[0], "evals": at[1]}
        for other in SWEPT[:-1]:
            ours, theirs = line["secant"], line[other]
            line[f"secant / {other}"] = {key: ours[key] / theirs[key] for key in ours} if ours and theirs else None
    return found


def scores(config: Shown, table: Table, name: str, method: str) -> dict[str, Any]:
    """Everything the tables hold of one method on one denoiser."""
    whole = {"denoiser": name, "method": method, "window": None, "tolerance": min(config.sweep)}
    found: dict[str, Any] = {f"{solver} rounds to 1e-2": table.score("to 1e-2", solver=solver, **whole) for solver in ("ddpm", "ddim")}
    for window in (*config.windows, None):
        case = {"denoiser": name, "method": method, "solver": "ddpm", "window": window, "tolerance": config.tolerance}
        found[f"window {window or 'all'}"] = {key: table.score(key, **case) for key in ("rounds", "evals", "typical")} | {
            "worst": table.worst(**case)
        }
    return found


def blocks(config: Shown, table: Table, nets: Sequence[str], arrays: dict[str, Tensor]) -> tuple[dict[str, Any], list[page.Block]]:
    """The numbers of results.json and the page."""
    laws = {name: {method: scores(config, table, name, method) for method in METHODS} for name in table.denoisers()}
    equal = {name: equal_error(config, table, name) for name in nets}
    shown = [page.text(*_verdict(laws, equal)), *_tables(config, laws, equal), *_figures(config, arrays)]
    return {"denoisers": laws, "equal error": equal, "ratios": _ratios(laws)}, shown


def _ratios(laws: dict[str, Any]) -> dict[str, float]:
    """Secant over the baseline, geometric means over the denoisers."""
    keys = {"DDPM rounds to 1e-2": "ddpm rounds to 1e-2", "DDIM rounds to 1e-2": "ddim rounds to 1e-2"}
    return {title: math.exp(float(np.mean([math.log(_over(methods, key)) for methods in laws.values()]))) for title, key in keys.items()}


def _over(methods: dict[str, Any], key: str, part: str | None = None) -> float:
    ours, theirs = (methods[m][key] if part is None else methods[m][key][part] for m in ("secant", BASELINE))
    return ours.mean / theirs.mean


def _verdict(laws: dict[str, Any], equal: dict[str, Any]) -> list[str]:
    means = ", ".join(f"{value:.2f} ({key})" for key, value in _ratios(laws).items())
    lines = [f"Secant against ParaDiGMS over the whole grid, geometric mean over all denoisers: {means}."]
    for name, found in equal.items():
        parts = [
            f"{line[f'secant / {other}']['rounds']:.2f} of the rounds and {line[f'secant / {other}']['evals']:.2f} of the evaluations of {label} at {error}"
            for error, line in found.items()
            for other, label in ((BASELINE, "ParaDiGMS"), ("picard", "our Picard"))
            if line[f"secant / {other}"]
        ]
        lines.append(f"At equal worst error the secant takes on {name} {'; '.join(parts) or 'numbers that these tolerances do not bracket'}.")
    if {"plain", "contrastive"} <= set(laws):
        between = [
            f"{method} {_pm(laws['plain'][method]['ddpm rounds to 1e-2'])} plain, {_pm(laws['contrastive'][method]['ddpm rounds to 1e-2'])} contrastive"
            for method in (BASELINE, "picard", "secant")
        ]
        lines.append(f"Rounds to a worst error of 1e-2 by training: {'; '.join(between)}.")
    return lines


def _pm(score: Score) -> str:
    return f"{score.mean:.1f} ± {score.stderr:.1f}"


def _tables(config: Shown, laws: dict[str, Any], equal: dict[str, Any]) -> list[page.Block]:
    seeds = f"{config.seeds} seeds of {config.samples} samples ({config.large} in more than two dimensions)"
    columns = ["denoiser", *METHODS, f"secant / {BASELINE}"]
    first = [
        page.table(
            f"Rounds until the worst error stays below 1e-2: {kind.upper()}-{steps}, the whole grid", columns,
            [[name, *[v[m][key] for m in METHODS], _over(v, key)] for name, v in laws.items()],
            f"Mean ± standard error over {seeds}; tolerance {min(config.sweep):g}, with fall-back: picard and eps lose their wide windows while their states grow. Error: root mean square of a sample against the sequential one from the same noise.",
        )
        for kind, steps in (("ddpm", config.steps), ("ddim", config.short))
        for key in (f"{kind} rounds to 1e-2",)
    ]  # fmt: skip
    keys = [f"window {w or 'all'}" for w in (*config.windows, None)]
    caption = f"DDPM-{config.steps}, tolerance {config.tolerance:g} for all; mean ± standard error over {seeds}. "
    windowed = [
        page.table(
            title, columns, [[f"{name}, {key}", *[v[m][key][part] for m in METHODS], _over(v, key, part)] for name, v in laws.items() for key in keys], caption + more
        )
        for title, part, more in (
            ("Rounds until the slowest sample is done", "rounds", "The batch waits for its slowest sample in all methods."),
            ("Evaluations a step and sample", "evals", "The sequential sampler takes one."),
        )
    ]  # fmt: skip
    worst = page.table(
        "Worst error", columns[:-1], [[f"{name}, {key}", *[v[m][key]["worst"] for m in METHODS]] for name, v in laws.items() for key in keys],
        caption + "The worst sample of all seeds; one that sits between two modes at some step may end in the other one (errors near 1).",
    )  # fmt: skip
    same = page.table(
        "At equal worst error", ["network, worst error, method", "rounds", "evaluations a step", "secant's share of the rounds", "of the evaluations"],
        [
            [f"{name}, {error}, {m}", *[(line.get(key) or {}).get(part) for key in (m, f"secant / {m}") for part in ("rounds", "evals")]]
            for name, found in equal.items() for error, line in found.items() for m in SWEPT
        ],
        f"Interpolated between tolerances {', '.join(f'{t:g}' for t in sorted({config.tolerance, *config.sweep}))} at the "
        f"same worst error over all samples of {seeds}; the whole grid of {config.steps} steps. A dash: not bracketed.",
    )  # fmt: skip
    return [*first, same, *windowed, worst]


def _figures(config: Shown, arrays: dict[str, Tensor]) -> list[page.Block]:
    named = list(dict.fromkeys(key.split(".")[0] for key in arrays))
    nets = [name for name in named if name != "ring"]
    window = config.windows[len(config.windows) // 2] if config.windows else "all"
    shown = [
        page.lines(f"Worst error after each round ({name})", "round", "root mean square error, worst sample",
                   [page.series(m, f"{name}.{m}.all.round", f"{name}.{m}.all.error") for m in METHODS], "First seed, the whole grid.", logy=True)
        for name in named
    ]  # fmt: skip
    for name, method in ((name, method) for name in nets for method in (BASELINE, "secant")):
        shown += iterates(f"{name}, {method}", name, f"{name}.{method}.all", arrays)
    for name in (name for name in nets if name != "contrastive"):
        shown += [
            heat(f"{name}, {method}, window {width}", f"{name}.{method}.{width}")
            for method, width in dict.fromkeys((("picard", "all"), ("secant", "all"), ("secant", window)))
        ]
        for width in dict.fromkeys(("all", window)):
            shown += progress(f"{name}, window {width}", [(m, f"{name}.{m}.{width}") for m in METHODS])
    return shown
