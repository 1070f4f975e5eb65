"""Numbers and page of ``ratios``."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from contrastive_diffusion import metrics
from contrastive_diffusion.experiments import _page as page
from contrastive_diffusion.metrics import Score, average

BINS = 10


class Shown(Protocol):
    """The fields of the recipe that the page mentions."""

    @property
    def points(self) -> int: ...
    @property
    def evals(self) -> int: ...
    @property
    def zetas(self) -> tuple[float, ...]: ...


def summarised(found: dict[str, Tensor], zetas: tuple[float, ...]) -> dict[str, Any]:
    """Per zeta: accuracy of the ratio's sign, AUC, cross-entropy (the contrastive loss), calibration; over all: nll in bits per dimension.

    Errors are over images: the answers for the clean and the noised copy of an image are averaged first.
    """
    clean, dirty = found["clean"], found["noised"]  # (n, zetas)
    told = {"bits per dimension": average(found["bits"])} if "bits" in found else {}
    right = 0.5 * ((clean < 0).double() + (dirty > 0).double())
    entropy = 0.5 * (softplus(clean) + softplus(-dirty))
    columns = zip(*(values.T.contiguous() for values in (clean, dirty, right, entropy)), strict=True)
    levels = {f"{zeta:g}": _at(*column) for zeta, column in zip(zetas, columns, strict=True)}
    return told | {"accuracy": average(right.mean(1)), "cross-entropy": average(entropy.mean(1)), "by zeta": levels}


def _at(clean: Tensor, dirty: Tensor, right: Tensor, entropy: Tensor) -> dict[str, Any]:
    found = metrics.calibration(torch.cat([clean, dirty]).sigmoid(), torch.arange(2 * len(clean)) >= len(clean), BINS)
    return {
        "accuracy": average(right), "auc": metrics.auroc(dirty, clean), "cross-entropy": average(entropy), "calibration": found.error,
        "calibration by chance": found.chance,
    }  # fmt: skip


def gap(numbers: dict[str, Any]) -> Score:
    """Bits per dimension of held-out less trained-on images: what was memorised."""
    held, kept = numbers["held-out"]["bits per dimension"], numbers["trained on"]["bits per dimension"]
    return Score(held.mean - kept.mean, math.hypot(held.stderr, kept.stderr))


def blocks(
    config: Shown, parts: dict[str, dict[str, dict[str, Tensor]]], numbers: dict[str, dict[str, Any]], arrays: dict[str, Tensor]
) -> list[page.Block]:
    """The page; curves go to ``arrays``."""
    about = f"{config.points} images of each kind, {config.evals} evaluations a ratio; bands: one standard error over images. Lines: held-out images; dashed: generated ones."
    columns = [
        "network", "bits per dimension, trained on", "held-out", "memorisation gap", "accuracy, held-out, %", "accuracy, generated, %",
        "cross-entropy, held-out, nats", "cross-entropy, generated, nats",
    ]  # fmt: skip
    rows = [
        [name, found["trained on"]["bits per dimension"], found["held-out"]["bits per dimension"], gap(found)]
        + [page.cell(found[kind]["accuracy"], 100) for kind in ("held-out", "generated")]
        + [found[kind]["cross-entropy"] for kind in ("held-out", "generated")]
        for name, found in numbers.items()
    ]
    figures = [
        _curves(key, label, config, numbers, arrays, about, **options)
        for key, label, options in (
            ("accuracy", "share told right", {"levels": {"chance": 0.5}}),
            ("cross-entropy", "nats", {"logy": True, "ylim": [1e-4, 1.5 * _largest(numbers)]}),
            ("calibration", "expected calibration error", {}),
        )
    ]
    caption = f"{config.points} images of each kind, {config.evals} evaluations a ratio, ± standard error over images. The nll is an upper bound on the data's grid of grey levels. Accuracy and cross-entropy: clean images against the same noised, mean over zeta."
    panels = []
    for name, found in parts.items():
        for kind in ("held-out", "generated"):
            arrays[f"shown.{name}.{kind}"] = found[kind]["shown"][:36].float()
            panels.append((f"{name}: {kind}", f"shown.{name}.{kind}"))
    return [
        page.text(_verdict(numbers)), page.table("Likelihoods and the noise classifier", columns, rows, caption), *figures,
        *_histograms(config, parts, arrays), page.images("Images", panels, rows=6, columns=6, across=4),
    ]  # fmt: skip


def _largest(numbers: dict[str, dict[str, Any]]) -> float:
    """The largest cross-entropy that is shown."""
    return max(
        level["cross-entropy"].mean for found in numbers.values() for kind in ("held-out", "generated") for level in found[kind]["by zeta"].values()
    )


def _verdict(numbers: dict[str, dict[str, Any]]) -> str:
    parts = []
    for name, found in numbers.items():
        lost, real, made = gap(found), found["held-out"]["accuracy"], found["generated"]["accuracy"]
        change, error = made.mean - real.mean, math.hypot(made.stderr, real.stderr)
        memorised = "images trained on are likelier than held-out ones" if lost.mean > 2 * lost.stderr else "no sign of memorisation"
        unlike = "unlike" if abs(change) > 2 * error else "not told from"
        parts.append(
            f"{name}: {memorised} ({lost.mean:+.3f} ± {lost.stderr:.3f} bits per dimension, held-out less trained on); generated images are {unlike} held-out ones by the accuracy "
            f"of its own noise classifier ({100 * made.mean:.1f} against {100 * real.mean:.1f} %, difference {100 * change:+.1f} ± {100 * error:.1f})."
        )
    return " ".join(parts)


def _curves(
    key: str, label: str, config: Shown, numbers: dict[str, dict[str, Any]], arrays: dict[str, Tensor], about: str, **options: Any
) -> page.Block:
    """A number over zeta: lines for held-out images, dashed for generated ones."""
    series = []
    for name, found in numbers.items():
        for kind, style in (("held-out", "line"), ("generated", "dashed")):
            scores: list[Score] = [found[kind]["by zeta"][f"{zeta:g}"][key] for zeta in config.zetas]
            array = f"{key}.{name}.{kind}"
            arrays[array], arrays[f"{array}.err"] = (torch.tensor([getattr(s, field) for s in scores]) for field in ("mean", "stderr"))
            series.append(page.series(name if style == "line" else f"generated, {name}", "zetas", array, f"{array}.err", style))
    chance = ""
    if key == "calibration":
        first = next(iter(numbers.values()))["held-out"]["by zeta"]
        least = max(found["calibration by chance"] for found in first.values())
        chance = f" A perfectly calibrated classifier would show up to {least:.3f} with so few images."
    title = {"accuracy": "Accuracy", "cross-entropy": "Cross-entropy (the contrastive loss)", "calibration": "Calibration"}[key]
    return page.lines(f"{title} of the implied noise classifier", "zeta, log-SNR in nats", label, series, about + chance, **options)


def _histograms(config: Shown, parts: dict[str, dict[str, dict[str, Tensor]]], arrays: dict[str, Tensor]) -> list[page.Block]:
    """Densities of the ratio of clean images at the zeta nearest to 6, where the task is neither trivial nor hopeless for images of 8 bits."""
    index = min(range(len(config.zetas)), key=lambda k: abs(config.zetas[k] - 6.0))
    values = [found[kind][which][:, index] for found in parts.values() for kind in ("held-out", "generated") for which in ("clean", "noised")]
    low, high = torch.cat(values).quantile(torch.tensor([0.01, 0.99], dtype=torch.float64)).tolist()
    bins = max(8, min(40, len(values[0]) // 10))
    edges = torch.linspace(low, max(high, low + 1e-3), bins + 1, dtype=torch.float64)
    arrays["ratio"] = (edges[1:] + edges[:-1]) / 2
    shown = []
    for name, found in parts.items():
        series = []
        for kind, style in (("held-out", "line"), ("generated", "dashed")):
            for which in ("clean", "noised"):
                counts = torch.histogram(found[kind][which][:, index].clamp(low, high), edges).hist
                arrays[f"histogram.{name}.{kind}.{which}"] = counts / counts.sum() / (edges[1] - edges[0])
                label = which if style == "line" else f"generated, {which}"
                series.append(page.series(label, "ratio", f"histogram.{name}.{kind}.{which}", None, style))
        caption = "Above 0 the network takes an image for a noised one. Lines: held-out images; dashed: generated ones; the outermost bins hold what lies beyond."
        title = f"Ratios at zeta {config.zetas[index]:g}: {name}"
        shown.append(page.lines(title, "log p_zeta(x) - log p(x), nats", "density, per nat", series, caption))
    return shown
