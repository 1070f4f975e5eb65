"""The run folder: the resolved recipe, the environment, metrics as JSON lines, checkpoints by step, results.json, arrays, report.html.

Every file is written whole or not at all, so a run can be killed at any moment; the same command continues it, and ends in the same bits
as an uninterrupted run. A folder that belongs to another recipe is refused, never overwritten.
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from contrastive_diffusion import __version__, checkpoints
from contrastive_diffusion.errors import UsageError, require
from contrastive_diffusion.files import write_atomic
from contrastive_diffusion.recipes import plain

RESULTS_SCHEMA = 1


def environment() -> dict[str, Any]:
    """What a number depends on besides the recipe."""
    return {
        "package": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "cdl " + " ".join(sys.argv[1:]),
    }


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

    @staticmethod
    def open(path: str | Path, config: Any, accept: bool = False) -> "Run":
        """The folder at ``path`` for the recipe ``config``: a new one, or the same recipe's to be continued; or another's, with ``accept``."""
        run, wanted = Run(Path(path)), plain(config)
        wanted.pop("changed", None)  # says what to do with differences, is none
        if run.recipe_file.exists():
            found = yaml.safe_load(run.recipe_file.read_text())
            changed = _differences(found, wanted)
            todo = "choose another --out or remove the folder" + (", or go on with --changed accept" if hasattr(config, "changed") else "")
            require(accept or not changed, f"run folder {path} of another recipe ({'; '.join(changed[:3])})", "the same recipe", todo)
            if changed:
                write_atomic(run.path / f"recipe.before-{len(list(run.path.glob('recipe.before-*')))}.yaml", run.recipe_file.read_text())
        write_atomic(run.recipe_file, yaml.safe_dump(wanted, sort_keys=False))
        write_atomic(run.path / "environment.json", json.dumps(environment(), indent=1))
        return run

    @staticmethod
    def existing(path: str | Path, needs: str = "recipe.yaml") -> "Run":
        """The folder at ``path``, which must hold ``needs``."""
        require((Path(path) / needs).is_file(), f"run folder {path}", f"a folder with {needs}", "make one with cdl train or cdl run")
        return Run(Path(path))

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    def recipe(self) -> dict[str, Any]:
        return yaml.safe_load(self.recipe_file.read_text())

    def environment(self) -> dict[str, Any]:
        return json.loads((self.path / "environment.json").read_text())

    def part(self, name: str, make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A piece of work kept in ``parts/``: made once, loaded when the run is continued."""
        path = self.path / "parts" / f"{name}.safetensors"
        if not path.exists():
            checkpoints.save(path, *make())
        return checkpoints.load(path)

    def write(self, name: str, text: str) -> None:
        """A text file of the folder, whole or not at all."""
        write_atomic(self.path / name, text)

    def write_results(self, results: dict[str, Any], arrays: dict[str, Tensor]) -> None:
        """results.json (with its schema version) and arrays.safetensors, what a report is made of."""
        checkpoints.save(self.path / "arrays.safetensors", {k: v.contiguous() for k, v in arrays.items()}, {})
        write_atomic(self.path / "results.json", json.dumps({"schema": RESULTS_SCHEMA} | results, indent=1))

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.safetensors"))

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint, None if there is none."""
        found = self.checkpoints()
        return checkpoints.load(found[-1]) if found else None

    def trained(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The newest checkpoint, which must be there."""
        latest = self.latest()
        if latest is None:
            raise UsageError(f"given run folder {self.path}, expected a folder with a checkpoint; train it first, or name one of its sub-folders")
        return latest


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [line for key in wanted | found for line in _differences(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)]
    return [] if found == wanted else [f"{path} was {found}, now {wanted}"]
