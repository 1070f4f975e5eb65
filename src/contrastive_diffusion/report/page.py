"""The page: blocks of results.json through one template."""

import html
import math
import re
from importlib.resources import files
from typing import Any

import jinja2
import yaml
from latex2mathml.converter import convert as mathml

from contrastive_diffusion.report.figures import FIGURES, Arrays, draw


def render(results: dict[str, Any], arrays: Arrays, recipe: dict[str, Any], environment: dict[str, Any]) -> str:
    """The HTML page of a run."""
    environment_ = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment_.filters |= {"cell": _cell, "prose": _prose}
    template = environment_.from_string((files("contrastive_diffusion.report") / "page.html").read_text())
    blocks = [block | {"svg": draw(block, arrays)} if block["kind"] in FIGURES else block for block in results["blocks"]]
    blocks = [block | {"mathml": mathml(block["latex"], display="block")} if block["kind"] == "math" else block for block in blocks]
    return template.render(title=results["title"], blocks=blocks, recipe=yaml.safe_dump(recipe, sort_keys=False), environment=environment)


def _prose(text: str) -> str:
    return jinja2.utils.markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)))  # pyright: ignore


def _cell(value: Any) -> str:
    """A number with its error to two digits of the error; a plain number to four; None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        return with_error(value["mean"], value["stderr"])
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def with_error(mean: float, stderr: float) -> str:
    """``mean ± stderr`` rounded to two significant digits of the error."""
    if math.isnan(stderr) or stderr == 0:
        return f"{mean:,.4g}" if abs(mean) < 1e4 else f"{mean:,.0f}"
    exponent = int(f"{stderr:e}".split("e")[1])
    digits = max(0, 1 - exponent)
    return f"{mean:,.{digits}f} ± {stderr:,.{digits}f}"
