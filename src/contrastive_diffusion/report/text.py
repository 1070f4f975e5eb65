"""The closing lines of a run in a terminal: its first words and its first table, turned so that every column is a line."""

import json
import textwrap
from pathlib import Path

from contrastive_diffusion.report.page import _cell


def summary(folder: Path) -> str:
    """Plain text of the first paragraph and the first table of results.json."""
    blocks = json.loads((folder / "results.json").read_text())["blocks"]
    words = next((p for block in blocks if block["kind"] == "text" for p in block["paragraphs"]), "")
    table = next((block for block in blocks if block["kind"] == "table"), None)
    return "\n".join(["", *(_turned(table) if table else []), "", textwrap.fill(words, 110)])


def _turned(table: dict) -> list[str]:
    rows = [[_cell(v) for v in row] for row in table["rows"]]
    columns = [["", *[row[0].replace(", ", ",\n") for row in rows]]] + [
        [name, *[row[i] for row in rows]] for i, name in enumerate(table["columns"]) if i
    ]
    heads = [cell.split("\n") for cell in columns[0]]
    depth = max(len(h) for h in heads)
    lines = [[h[i] if i < len(h) else "" for h in heads] for i in range(depth)] + columns[1:]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [table["title"], ""] + [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines
    ]
