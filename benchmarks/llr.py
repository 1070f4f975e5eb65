"""How well is log p_zeta(x) - log p(x) estimated? Bias, spread and calibration against the closed form, on Dino and two modes.

python benchmarks/llr.py [--out benchmarks/results/llr.json]
"""

import argparse
import json
import time
from pathlib import Path

import torch

from contrastive_diffusion.data.toys import toy
from contrastive_diffusion.denoisers import noised
from contrastive_diffusion.files import write_atomic
from contrastive_diffusion.likelihood import llr
from contrastive_diffusion.runs import environment, tune_process

ZETAS = (-6.0, 0.0, 6.0, 9.0, 12.0, 15.0)
EVALS = (32, 128, 512)


def measure(name: str, zeta: float, label: int, evals: int, points: int = 40, repeats: int = 50) -> dict[str, float | str | int]:
    """One row of the table: ``points`` draws of the label's law, each estimated ``repeats`` times."""
    law, generator = toy(name), torch.Generator().manual_seed(0)
    x = law.sample(points, generator, torch.float64)
    if label < 0:
        x = noised(x, zeta, generator)
    x = x.repeat(repeats, 1)
    start = time.perf_counter()
    result = llr(law, x, zeta, evals, generator)  # pyright: ignore[reportArgumentType]
    seconds = time.perf_counter() - start
    error = (result.mean - law.llr(x, zeta)).double()  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "law": name, "zeta": zeta, "label": label, "evals": evals, "truth": float(law.llr(x, zeta).double().mean()),  # pyright: ignore
        "bias in standard errors": float(error.mean() / (error.std() / len(error) ** 0.5)), "rms deviation": float(error.square().mean().sqrt()),
        "rms z-score": float((error / result.stderr).square().mean().sqrt()), "microseconds per row": 1e6 * seconds / len(x),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    tune_process()
    rows = []
    for name in ("dino", "two-modes"):
        for zeta in ZETAS:
            for label in (1, -1):
                for evals in EVALS:
                    rows.append(measure(name, zeta, label, evals))
                    if len(rows) == 1:
                        print("  ".join(f"{key:>23}" for key in rows[0]))
                    print("  ".join(f"{v:>23.4g}" if isinstance(v, float) else f"{v:>23}" for v in rows[-1].values()), flush=True)
    if out:
        write_atomic(out, json.dumps({"environment": environment() | {"command": f"python benchmarks/llr.py --out {out}"}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
