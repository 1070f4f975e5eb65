"""How well is log p_zeta(x) - log p(x) estimated? Ours against two restatements of the paper's estimator, at equal evaluations.

"independent": both densities from draws of their own, log-SNR from one logistic law for all zeta (loc 0, scale 3, clip 3), as the paper's
code does in 2-D; "shared": the same law, the same draws for both. Exact denoisers, so the truth is the mixture's closed form.

python benchmarks/llr.py [--quick] [--out benchmarks/results/llr.json]
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive_diffusion.channel import compose, corrupt, per_row
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import dino, two_modes
from contrastive_diffusion.denoisers import Denoiser, noised
from contrastive_diffusion.files import write_atomic
from contrastive_diffusion.likelihood import llr
from contrastive_diffusion.runs import environment, tune_process
from contrastive_diffusion.schedules import logistic, slope

ZETAS = (-6.0, 0.0, 3.0, 6.0, 9.0, 12.0, 15.0)
PAPER = logistic(0.0, 3.0, 3.0)


def mixture64() -> GaussianMixture:
    """Ten components in 64 dimensions, stds between 0.05 and 0.5."""
    generator = torch.Generator().manual_seed(64)
    return GaussianMixture(torch.randn(10, 64, generator=generator), 0.05 * 10 ** torch.rand(10, 64, generator=generator))


def spectrum3072() -> GaussianMixture:
    """One Gaussian in 3,072 dimensions with a log-normal spectrum, log-eigenvalues N(-6.26, 3^2)."""
    generator = torch.Generator().manual_seed(3072)
    return GaussianMixture(torch.zeros(1, 3072), torch.exp(0.5 * (-6.26 + 3 * torch.randn(1, 3072, generator=generator, dtype=torch.float64))))


def _errors(denoiser: Denoiser, x: Tensor, n: int, zeta: float | None, generator: torch.Generator, reuse: Any = None) -> tuple[Tensor, Any]:
    """Half the weighted squared error of each of n points (b, n) of the paper's law, for p (zeta None) or p_zeta, on new or reused draws."""
    if reuse is None:
        u = torch.rand((len(x), n), generator=generator, dtype=torch.float64)
        eps = torch.randn((len(x), n, *x.shape[1:]), generator=generator, dtype=x.dtype)
        reuse = (*slope(PAPER, u), eps)
    logsnr, weight, eps = reuse
    z = corrupt(x[:, None].expand_as(eps).flatten(0, 1), logsnr.flatten(), eps.flatten(0, 1))
    level, b = (logsnr.flatten(), None) if zeta is None else compose(logsnr.flatten(), zeta)
    eps_hat = denoiser(z, level) if b is None else per_row(b, z) * denoiser(z, level)
    return 0.5 * weight * (eps.flatten(0, 1) - eps_hat).square().flatten(1).sum(1).reshape(weight.shape), reuse


def independent(denoiser: Denoiser, x: Tensor, zeta: float, evals: int, generator: torch.Generator) -> Tensor:
    return (_errors(denoiser, x, evals // 2, None, generator)[0] - _errors(denoiser, x, evals // 2, zeta, generator)[0]).mean(1)


def shared(denoiser: Denoiser, x: Tensor, zeta: float, evals: int, generator: torch.Generator) -> Tensor:
    clean, draws = _errors(denoiser, x, evals // 2, None, generator)
    return (clean - _errors(denoiser, x, evals // 2, zeta, generator, draws)[0]).mean(1)


def measure(name: str, law: GaussianMixture, zeta: float, label: int, evals: int, points: int, repeats: int) -> dict[str, Any]:
    """One row of the table: ``points`` draws of the label's law, each estimated ``repeats`` times in batches of ``points``."""
    generator = torch.Generator().manual_seed(0)
    x = law.sample(points, generator, torch.float64)
    if label < 0:
        x = noised(x, zeta, generator)
    truth, deviation, seconds, squares, pooled = law.llr(x, zeta), {}, {}, 0.0, torch.zeros(())
    methods: dict[str, Callable[[], Tensor]] = {
        "independent": lambda: independent(law, x, zeta, evals, generator),
        "shared": lambda: shared(law, x, zeta, evals, generator),
    }
    for method, estimate in methods.items():
        deviation[method] = float(torch.stack([estimate() - truth for _ in range(repeats)]).square().mean().sqrt())
    start, errors = time.perf_counter(), []
    for _ in range(repeats):
        result = llr(law, x, zeta, evals, generator)
        errors.append(result.mean - truth)
        squares += float(result.stderr.square().mean()) / repeats
    seconds = time.perf_counter() - start
    pooled = torch.stack(errors)
    rms = float(pooled.square().mean().sqrt())
    return {
        "law": name, "zeta": zeta, "label": label, "evals": evals, "truth": float(truth.mean()), "bias/se": float(pooled.mean() / pooled.std() * pooled.numel() ** 0.5),
        "rms": rms, "rms/stderr": rms / squares**0.5, "independent rms": deviation["independent"], "shared rms": deviation["shared"],
        "mse ratio": (deviation["independent"] / rms) ** 2, "us/row": 1e6 * seconds / pooled.numel(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Dino and two modes at 128 evaluations only")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tune_process()
    laws = {"dino": (dino(), 20, 20), "two-modes": (two_modes(), 20, 20), "mixture64": (mixture64(), 10, 10), "spectrum3072": (spectrum3072(), 2, 6)}
    rows: list[dict[str, Any]] = []
    for name, (law, points, repeats) in laws.items():
        if options.quick and law.means.shape[1] > 2:
            continue
        for zeta in ZETAS:
            for label in (1, -1):
                for evals in (128,) if options.quick else (32, 128, 512):
                    rows.append(measure(name, law, zeta, label, evals, points, repeats))
                    if len(rows) == 1:
                        print("  ".join(f"{key:>15}" for key in rows[0]))
                    print("  ".join(f"{v:>15.4g}" if isinstance(v, float) else f"{v:>15}" for v in rows[-1].values()), flush=True)
    if options.out:
        found = environment() | {"command": f"python benchmarks/llr.py{' --quick' * options.quick} --out {options.out}"}
        write_atomic(options.out, json.dumps({"environment": found, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
