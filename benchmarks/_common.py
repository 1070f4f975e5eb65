"""What the benchmarks share: their options, a table that grows as it is measured, and a file that says how it was made."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from contrastive_diffusion.files import write_atomic
from contrastive_diffusion.runs import environment, tune_process


def options(about: str | None, quick: str | None = "fewer cases and repeats") -> argparse.ArgumentParser:
    """The parser of ``--quick`` (unless it is None) and ``--out``, in a process of one thread."""
    tune_process()
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def show(rows: list[dict[str, Any]], width: int = 16) -> None:
    """Prints the last row, after the head if it is the first."""
    if len(rows) == 1:
        print("  ".join(f"{key:>{width}}" for key in rows[0]))
    print("  ".join(f"{v:>{width}.4g}" if isinstance(v, float) else f"{v!s:>{width}}" for v in rows[-1].values()), flush=True)


def made() -> dict[str, Any]:
    """What the numbers of this run depend on: the environment and the command."""
    return environment() | {"command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])}


def write(out: Path | None, found: dict[str, Any], **about: Any) -> None:
    """Writes what was found and how, if a file was asked for."""
    if out:
        write_atomic(out, json.dumps({"environment": made() | about} | found, indent=1))
