"""One file per table or figure. An experiment module holds ``Config`` (its recipe) and ``run(config) -> Path`` (its run folder).

The registry is the folder: the name of an experiment is its file's, the summary its docstring's first line, so listing imports nothing.
"""

import ast
import importlib
from importlib.resources import files
from types import ModuleType

from contrastive_diffusion.errors import choose


def summaries() -> dict[str, str]:
    """Name -> one line on what it shows, for every experiment."""
    sources = {
        f.name.removesuffix(".py"): f
        for f in files("contrastive_diffusion.experiments").iterdir()
        if f.name.endswith(".py") and not f.name.startswith("_")
    }
    return {name.replace("_", "-"): (ast.get_docstring(ast.parse(f.read_text())) or "").split("\n")[0] for name, f in sorted(sources.items())}


def load(name: str) -> ModuleType:
    """The module of the experiment called ``name``; an unknown name is answered with the nearest ones."""
    return importlib.import_module(f"contrastive_diffusion.experiments.{choose(name, summaries(), 'experiment').replace('-', '_')}")
