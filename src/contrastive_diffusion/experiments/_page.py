"""The blocks of a results page, as JSON values: what to show, from which arrays, never how it looks (that is ``report``'s)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from contrastive_diffusion.metrics import Score

Block = dict[str, Any]


def text(*paragraphs: str) -> Block:
    """Paragraphs; ``code`` in backticks."""
    return {"kind": "text", "paragraphs": list(paragraphs)}


def math(latex: str, caption: str = "") -> Block:
    """A displayed equation."""
    return {"kind": "math", "latex": latex, "caption": caption}


def cell(value: Score | float | int | str | None, scale: float = 1.0) -> Any:
    """A table cell: a score keeps its error, None is a dash."""
    if isinstance(value, Score):
        return {"mean": value.mean * scale, "stderr": value.stderr * scale}
    return value * scale if isinstance(value, float) else value


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> Block:
    """Rows of cells; the first column names the row."""
    return {"kind": "table", "title": title, "columns": list(columns), "rows": [[cell(v) for v in row] for row in rows], "caption": caption}


def series(label: str, x: str, y: str, err: str | None = None, style: str = "line") -> dict[str, Any]:
    """A curve of a ``lines`` figure: names of arrays; ``style`` "line", "dashed" or "points"."""
    return {"label": label, "x": x, "y": y, "err": err, "style": style}


def lines(title: str, x: str, y: str, curves: Sequence[dict[str, Any]], caption: str = "", **options: Any) -> Block:
    """Curves with error bands. Options: ``logx``, ``logy``, ``levels`` (label -> y of a horizontal line), ``ylim``."""
    return {"kind": "lines", "title": title, "x": x, "y": y, "curves": list(curves), "caption": caption} | options


def images(title: str, panels: Sequence[tuple[str, str]], caption: str = "", *, rows: int, columns: int, across: int) -> Block:
    """Panels (title, array (n, C, H, W) in [-1, 1]), each a grid of images, ``across`` panels side by side."""
    shown = {"rows": rows, "columns": columns, "across": across}
    return {"kind": "images", "title": title, "panels": [list(p) for p in panels], "caption": caption} | shown


def scatter(title: str, panels: Sequence[tuple[str, str]], caption: str = "", **options: Any) -> Block:
    """Panels (title, array (n, 2)) on common axes. Options: ``limits`` [x0, x1, y0, y1], ``columns``."""
    return {"kind": "scatter", "title": title, "panels": [list(p) for p in panels], "caption": caption} | options


def maps(title: str, x: str, y: str, panels: Sequence[dict[str, Any]], caption: str = "", **options: Any) -> Block:
    """Heat maps on the grid of arrays ``x`` and ``y``. A panel: ``title``, ``values`` (ny, nx), ``contour`` (ny, nx), ``paths`` name -> (k, n),
    ``points`` (n, 2). Option: ``equal`` scales of x and y."""
    return {"kind": "maps", "title": title, "x": x, "y": y, "panels": list(panels), "caption": caption} | options


def heat(title: str, values: str, windows: str, caption: str = "") -> Block:
    """A map of log10 errors (rounds, steps) of one sample, with its window (rounds, 2) drawn in."""
    return {"kind": "heat", "title": title, "values": values, "windows": windows, "caption": caption}


def numbers(value: Any) -> Any:
    """Nested results as JSON values."""
    if isinstance(value, dict):
        return {str(k): numbers(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [numbers(v) for v in value] if isinstance(value, list | tuple) else value
