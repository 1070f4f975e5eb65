"""What the page of the sweep shows, from its numbers."""

from typing import Any, Protocol

from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.metrics import Score

LABELS = {"plain": "plain", "contrastive": "contrastive", "dino": "exact denoiser"}
FLOWS = ("ddim", "heun", "ddim2", "dpmpp", "eab3")
NOISY = ("ddpm", "euler-maruyama", "ddpm2", "dpmpp-sde", "sde-heun")


class Shown(Protocol):
    """The fields of the recipe that the page mentions."""

    @property
    def seeds(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def level(self) -> float: ...
    @property
    def churn_steps(self) -> int: ...
    @property
    def compared(self) -> tuple[int, ...]: ...
    @property
    def evals(self) -> tuple[int, ...]: ...
    @property
    def s_noise(self) -> tuple[float, ...]: ...


def _curves(arms: dict[str, str], curve: str, quantity: str = "y") -> list[dict[str, Any]]:
    return [page.series(label, f"{arm}.{curve}.x", f"{arm}.{curve}.{quantity}", f"{arm}.{curve}.{quantity}.err") for arm, label in arms.items()]


def blocks(config: Shown, numbers: dict[str, Any], arrays: dict[str, Any]) -> list[page.Block]:
    truth: Score = numbers["true samples"]
    y, level = f"log-density at {config.level:g}, nats", {"true samples": truth.mean}
    about = f"Bands: one standard error over {config.seeds} sampling seeds, {config.samples} samples a point in all; one training seed."
    lowest = _low(arrays, truth.mean)
    fig6 = page.lines(
        "Fig. 6: EDM's deterministic sampler",
        "denoiser evaluations a sample",
        y,
        _curves(LABELS, "deterministic"),
        about,
        logx=True,
        levels=level,
        ylim=lowest,
    )
    fig6_mmd = page.lines(
        "Fig. 6 by MMD",
        "denoiser evaluations a sample",
        "MMD²",
        _curves(LABELS, "deterministic", "mmd"),
        "The same samples, kernel std 0.173.",
        logx=True,
        logy=True,
    )
    churned = [
        c | {"label": f"{LABELS[arm]}, S_noise {noise:g}", "style": "line"}
        for noise in config.s_noise for arm in ("plain", "contrastive") for c in _curves({arm: ""}, f"churn.{noise:g}")
    ]  # fmt: skip
    fig7 = page.lines(f"Fig. 7: churn, {config.churn_steps} steps", "S_churn", y, churned, about, levels=level)
    pictures = [
        page.lines(
            f"{kind} solvers, {LABELS[arm]}", "denoiser evaluations a sample", y,
            [page.series(name, f"{arm}.solvers.{name}.x", f"{arm}.solvers.{name}.y", f"{arm}.solvers.{name}.y.err") for name in names],
            "All on one grid, even in log-SNR from -8.7 to 12.4.", logx=True, levels=level, ylim=lowest,
        )
        for arm in ("dino", "contrastive") for kind, names in (("Deterministic", FLOWS), ("Noisy", NOISY))
    ]  # fmt: skip
    return [page.text(*_words(config, numbers)), _table(config, numbers), fig6, fig6_mmd, fig7, *(_tables(config, numbers)), *pictures]


def _low(arrays: dict[str, Any], truth: float) -> list[float]:
    """An axis from what the trained denoisers reach to the truth; the wildest points of few evaluations fall outside."""
    ends = [float(arrays[f"{arm}.deterministic.y"][-1]) for arm in ("plain", "contrastive")]
    return [min(ends) - 3 * (truth - min(ends)) - 2, truth + 0.5]


def _best(scores: dict[str, Any]) -> tuple[str, Score]:
    key = max(scores, key=lambda k: scores[k]["log density"].mean)
    return key, scores[key]["log density"]


def _table(config: Shown, numbers: dict[str, Any]) -> page.Block:
    rows = []
    for arm, label in LABELS.items():
        found = numbers[arm]
        last = found["deterministic"][str(config.evals[-1])]["log density"]
        best = [_best({k: v for k, v in found["churn"].items() if k.endswith(f";{noise:g}")}) for noise in config.s_noise]
        rows.append(
            [
                label,
                *(found["deterministic"][str(e)]["log density"] for e in config.evals[1:4]),
                last,
                *(v for _, v in best),
                *(float(k.split(";")[0]) for k, _ in best),
            ]
        )
    columns = ["", *(f"{e} evals" for e in config.evals[1:4]), f"{config.evals[-1]} evals"]
    columns += [f"best churn, S_noise {n:g}" for n in config.s_noise] + [f"at S_churn (S_noise {n:g})" for n in config.s_noise]
    return page.table(
        "Exact log-density of samples, nats", columns, rows, f"At log-SNR {config.level:g}; true samples score {_text(numbers['true samples'])}."
    )


def _tables(config: Shown, numbers: dict[str, Any]) -> list[page.Block]:
    """Every solver at equal evaluations, one table for each denoiser."""
    out = []
    for arm, label in LABELS.items():
        found: dict[str, dict[str, Any]] = {}
        for key, scores in numbers[arm]["solvers"].items():
            name, _, at = key.partition(";")
            found.setdefault(name, {})[at] = scores
        rows = [[name, *(found[name][str(e)]["log density"] for e in config.compared)] for name in found if name != "adaptive"]
        rows += [
            [f"adaptive, {scores['evals'].mean:.0f} evals", scores["log density"], *[None] * (len(config.compared) - 1)]
            for scores in found["adaptive"].values()
        ]
        out.append(
            page.table(
                f"Every solver: {label}",
                ["", *(f"{e} evals" for e in config.compared)],
                rows,
                "Log-density as above, nats; at most this many evaluations.",
            )
        )
    return out


def _text(score: Score) -> str:
    return f"{score.mean:.2f} ± {score.stderr:.2f}"


def _words(config: Shown, numbers: dict[str, Any]) -> list[str]:
    """The comparison in words, from the numbers."""
    last, truth = str(config.evals[-1]), numbers["true samples"]
    ends = {arm: numbers[arm]["deterministic"][last]["log density"] for arm in LABELS}
    best = {(arm, n): _best({k: v for k, v in numbers[arm]["churn"].items() if k.endswith(f";{n:g}")}) for arm in LABELS for n in config.s_noise}
    words = (
        f"With {last} evaluations of EDM's deterministic sampler the plain branch reaches {_text(ends['plain'])} nats, the contrastive one "
        f"{_text(ends['contrastive'])}, the exact denoiser {_text(ends['dino'])}; true samples have {_text(truth)}. "
    )
    churned = "; ".join(f"{LABELS[arm]}, S_noise {n:g}: {_text(score)} at S_churn {key.split(';')[0]}" for (arm, n), (key, score) in best.items())
    evals = numbers["denoiser evaluations"]
    return [
        words,
        f"Best of the churn sweep: {churned}.",
        f"After the common start each branch has spent {evals['plain']:,} and {evals['contrastive']:,} denoiser evaluations.",
    ]
