"""Figures as SVG text that follows the page's colours: black is written as ``currentColor``, backgrounds are left open."""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

Arrays = dict[str, np.ndarray]
INK = "#010203"  # becomes currentColor
COLOURS = ("#2f7ed8", "#e4572e", "#8a8f98", "#7a5195", "#2ca58d", "#c99a1c")
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"], "font.size": 10,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 10,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#8a8f98", "grid.alpha": 0.25, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip


def draw(block: dict[str, Any], arrays: Arrays) -> str:
    """The inline SVG of a figure block, reproducible to the byte."""
    salt = re.sub(r"\W+", "-", block["title"].lower())
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):  # pyright: ignore[reportArgumentType]
        figure = FIGURES[block["kind"]](block, arrays)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r' (id|xlink:href|href)="(#?)(?!#|data:)([A-Za-z][\w.-]*)"', rf' \1="\2{salt}-\3"', svg)
    svg = re.sub(r"url\(#([\w.-]+)\)", rf"url(#{salt}-\1)", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{block["title"]}" ', 1)


def lines(block: dict[str, Any], arrays: Arrays) -> Figure:
    """Curves with bands of one standard error, and labelled levels."""
    figure = Figure(figsize=(8.2, 3.9))
    axes = figure.subplots()
    solid = 0
    for curve in block["curves"]:
        x, y = arrays[curve["x"]], arrays[curve["y"]].astype(float)
        dashed = curve["style"] == "dashed"
        colour = COLOURS[(_twin(curve, block) if dashed else solid) % len(COLOURS)]
        solid += not dashed
        if block.get("logy"):
            y = np.where(y > 0, y, np.nan)
        axes.plot(
            x,
            y,
            color=colour,
            label=curve["label"],
            lw=1 if dashed else 1.8,
            ls="--" if dashed else "-",
            marker="" if len(x) > 20 else "o",
            ms=3.5,
            alpha=0.7 if dashed else 1,
        )
        if curve["err"]:
            error = arrays[curve["err"]].astype(float)
            low = y - error if not block.get("logy") else np.maximum(y - error, 1e-12)
            axes.fill_between(x, low, y + error, color=colour, alpha=0.2, lw=0)
    for label, level in block.get("levels", {}).items():
        axes.axhline(level, color=INK, lw=0.9, ls=":")
        axes.annotate(label, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=9)
    _finish(axes, block)
    axes.legend(fontsize=9)
    return figure


def _twin(curve: dict[str, Any], block: dict[str, Any]) -> int:
    """The colour index of the solid curve whose label the dashed one's ends with."""
    solid = [c["label"] for c in block["curves"] if c["style"] != "dashed"]
    return next((i for i, label in enumerate(solid) if curve["label"].endswith(label)), len(solid))


def scatter(block: dict[str, Any], arrays: Arrays) -> Figure:
    """Small multiples of point clouds on common axes, a colour for each GROUP of arrays named GROUP.NAME."""
    panels = [(title, name) for title, name in block["panels"] if name in arrays]
    columns = min(block.get("columns", 4), len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(8.2, 2.25 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    groups = list(dict.fromkeys(name.split(".")[0] for _, name in panels))
    hues = {name: groups.index(name.split(".")[0]) % len(COLOURS) for _, name in panels}
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, name) in zip(grid.flat, panels, strict=False):
        points = arrays[name]
        axes.set_axis_on()
        axes.scatter(points[:, 0], points[:, 1], s=1.2, lw=0, color=COLOURS[hues[name]], rasterized=True)
        axes.set(xlim=block["limits"][:2], ylim=block["limits"][2:], aspect="equal", xticks=[], yticks=[])
        axes.set_title(title, fontsize=8.5)
    return figure


def maps(block: dict[str, Any], arrays: Arrays) -> Figure:
    """Heat maps in a common logarithmic colour, with contours, paths and points drawn over them; points off the map are on its edge."""
    panels = block["panels"]
    figure = Figure(figsize=(8.2, 3.8))
    grid = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    x, y = arrays[block["x"]], arrays[block["y"]]
    values = [np.maximum(arrays[p["values"]], 1e-12) for p in panels]
    low, high = np.quantile(np.concatenate([v.ravel() for v in values]), [0.02, 0.999])
    image = None
    for axes, panel, field in zip(grid, panels, values, strict=True):
        image = axes.pcolormesh(x, y, field, norm=LogNorm(low, high), cmap="Greys", rasterized=True, shading="gouraud")
        if panel.get("contour"):
            density = arrays[panel["contour"]]
            axes.contour(x, y, density, levels=[float(v) for v in panel["contour_levels"]], colors=[COLOURS[4]], linewidths=1.1)
        for number, (label, name) in enumerate(panel.get("paths", {}).items()):
            paths = arrays[name]
            for index, path in enumerate(paths):
                axes.plot(x, path, color=COLOURS[(0, 1, 3)[number % 3]], lw=0.7, alpha=0.9, label=label if index == 0 else None, rasterized=True)
        if panel.get("points"):
            points = np.clip(arrays[panel["points"]], (x[0], y[0]), (x[-1], y[-1]))
            axes.scatter(points[:, 0], points[:, 1], s=9, lw=0, color=COLOURS[1], clip_on=False, zorder=3)
        axes.set_title(panel["title"])
        axes.set_xlabel(block["xlabel"])
        axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
        axes.grid(False)
        if block.get("equal"):
            axes.set_aspect("equal")
    grid[0].set_ylabel(block["ylabel"])
    if panels[0].get("paths"):
        grid[0].legend(fontsize=8, loc="lower left", labelcolor="#111111", facecolor="white", frameon=True, framealpha=0.8)
    if image is not None:
        figure.colorbar(image, ax=list(grid), label=block["colour"], shrink=0.9)
    return figure


def heat(block: dict[str, Any], arrays: Arrays) -> Figure:
    """Rounds downwards, steps to the right, the errors of one sample, and the window that its rounds worked in."""
    figure = Figure(figsize=(8.2, 3.2))
    axes = figure.subplots()
    values, windows = arrays[block["values"]], arrays[block["windows"]]
    rounds, steps = values.shape
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=-5, vmax=1, extent=(0, steps, rounds + 0.5, 0.5))
    number = np.arange(1, rounds + 1)
    for edge, label in ((0, "frontier"), (1, "end of the window")):
        axes.plot(windows[:, edge], number, color=COLOURS[1], lw=1.4, ls="-" if edge == 0 else "--", label=label)
    axes.set(xlabel="step", ylabel="round", xlim=(0, steps))
    axes.grid(False)
    axes.legend(fontsize=8, loc="upper right", labelcolor="#111111", facecolor="white", frameon=True, framealpha=0.8)
    figure.colorbar(image, ax=axes, label="log10 error")
    return figure


def images(block: dict[str, Any], arrays: Arrays) -> Figure:
    """Panels of images (n, C, H, W) in [-1, 1], each a grid of at most ``rows`` x ``columns`` with a line of grey between them."""
    columns = block["columns"]
    panels = [(title, _tiled(arrays[name][: block["rows"] * columns], columns)) for title, name in block["panels"] if name in arrays]
    across = min(block["across"], len(panels))
    down = -(-len(panels) // across)
    height = max(shown.shape[0] / shown.shape[1] for _, shown in panels)
    figure = Figure(figsize=(8.2, (8.2 / across * height + 0.3) * down))
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, shown) in zip(grid.flat, panels, strict=False):
        axes.imshow(shown[..., 0] if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=8.5)
    return figure


def _tiled(x: np.ndarray, columns: int) -> np.ndarray:
    """One picture (H, W, C) in [0, 1] of images (n, C, H, W) in [-1, 1]."""
    rows = -(-len(x) // columns)
    x = np.concatenate([x, np.full((rows * columns - len(x), *x.shape[1:]), -1.0, x.dtype)])
    x = np.pad((np.clip(x, -1, 1) + 1) / 2, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=0.5)
    return x.reshape(rows, columns, *x.shape[1:]).transpose(0, 3, 1, 4, 2).reshape(rows * x.shape[2], columns * x.shape[3], x.shape[1])


def _finish(axes: Axes, block: dict[str, Any]) -> None:
    axes.set_xlabel(block["x"])
    axes.set_ylabel(block["y"])
    if block.get("logx"):
        axes.set_xscale("log")
    if block.get("logy"):
        axes.set_yscale("log")
    if block.get("ylim"):
        axes.set_ylim(*block["ylim"])


FIGURES: dict[str, Callable[[dict[str, Any], Arrays], Figure]] = {"heat": heat, "images": images, "lines": lines, "maps": maps, "scatter": scatter}
