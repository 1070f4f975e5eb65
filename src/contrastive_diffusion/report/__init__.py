"""One self-contained page per run: figures as inline SVG, equations as MathML, no script, no request. It reads files, never torch modules."""

import json
from pathlib import Path

import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from contrastive_diffusion.errors import UsageError, require
from contrastive_diffusion.files import write_atomic
from contrastive_diffusion.report.page import render

SCHEMA = 1  # of results.json


def write(folder: str | Path) -> Path:
    """Writes report.html of a run folder from its results.json, arrays and recipe; returns its path."""
    folder = Path(folder)
    require((folder / "results.json").is_file(), f"run folder {folder}", "a folder with results.json", "make one with cdl run")
    try:
        results = json.loads((folder / "results.json").read_text())
        arrays = load_file(folder / "arrays.safetensors")
        environment = json.loads((folder / "environment.json").read_text())
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"given run folder {folder}, expected whole results: {error}; run it again") from error
    require(results.get("schema") == SCHEMA, f"results of schema {results.get('schema')}", f"schema {SCHEMA}", "run it again with this version")
    path = folder / "report.html"
    write_atomic(path, render(results, arrays, recipe, environment))
    return path
