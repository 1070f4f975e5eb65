"""How well are -log p(x) and the error curve over noise levels estimated? Ours against the usual way, at equal evaluations, exact denoisers.

nll, "usual": log-SNR drawn from a logistic law, independent noise, one Gaussian baseline (Kong et al. 2023): loc 0, scale 3, clip 3 in 2-D; in more
dimensions also the law for images, 4, 4, 3, and the better of the two counts. What lies beyond the clip is left out, as there.
Curve, "usual": independent noise at every level. Errors against the mixture's closed form, or for the curve against its own mean (both unbiased).

python benchmarks/nll.py [--quick] [--out benchmarks/results/nll.json]
"""

import math
from typing import Any

import torch
from _common import options, show, write
from llr import PAPER, mixture64, rms, spectrum3072
from torch import Tensor

from contrastive_diffusion.channel import corrupt
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import dino, two_modes
from contrastive_diffusion.likelihood import Estimate, mse_curve, nll
from contrastive_diffusion.schedules import Schedule, slope

LEVELS = (-4.0, 0.0, 4.0, 8.0)


def errors(law: GaussianMixture, x: Tensor, logsnr: Tensor, generator: torch.Generator) -> Tensor:
    """Squared errors of the denoiser (b, n) at levels (b, n) with independent noise."""
    eps = torch.randn((*logsnr.shape, x.shape[1]), generator=generator, dtype=x.dtype)
    z = corrupt(x[:, None].expand_as(eps).flatten(0, 1), logsnr.flatten(), eps.flatten(0, 1))
    return (eps - law(z, logsnr.flatten().to(z.dtype)).reshape(eps.shape)).square().sum(2)


def usual(law: GaussianMixture, x: Tensor, evals: int, generator: torch.Generator, levels: Schedule) -> Tensor:
    logsnr, weight = slope(levels, torch.rand((len(x), evals), generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12))
    dim = x.shape[1]
    baseline = dim * torch.sigmoid(logsnr)
    return 0.5 * dim * math.log(2 * math.pi * math.e) + 0.5 * (weight * (errors(law, x, logsnr, generator) - baseline)).mean(1)


def likelihood(name: str, law: GaussianMixture, evals: int, count: int, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = law.sample(count, generator, torch.float64)
    truth = law.nll(x)
    papers = {key: PAPER[key] for key in PAPER if key == "2-D" or x.shape[1] > 2}
    apart = {key: rms([usual(law, x, evals, generator, levels) - truth for _ in range(repeats)]) for key, levels in papers.items()}
    best = min(apart, key=lambda key: apart[key])
    found = _ours([nll(law, x, evals, generator) for _ in range(repeats)], truth)
    return {"law": name, "evals": evals, "truth": float(truth.mean()), "usual rms": apart[best], "usual law": best} | found | {
        "mse ratio": (apart[best] / found["rms"]) ** 2
    }  # fmt: skip


def curve(name: str, law: GaussianMixture, evals: int, count: int, repeats: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x, levels = law.sample(count, generator, torch.float64), torch.tensor(LEVELS, dtype=torch.float64)
    each = evals // len(levels)
    plain = [torch.stack([errors(law, x, level.expand(count, each), generator).mean(1) for level in levels], 1) for _ in range(repeats)]
    found = [mse_curve(law, x, levels, evals, generator) for _ in range(repeats)]
    truth = torch.cat([torch.stack(plain), torch.stack([f.mean for f in found])]).mean(0)
    rows = []
    for i, level in enumerate(LEVELS):
        ours = _ours([Estimate(f.mean[:, i], f.stderr[:, i], f.evals) for f in found], truth[:, i])
        usual_ = rms([p[:, i] - truth[:, i] for p in plain])
        rows.append({"law": name, "log-SNR": level, "evals": evals, "truth": float(truth[:, i].mean()), "usual rms": usual_} | ours | {"mse ratio": (usual_ / ours["rms"]) ** 2})  # fmt: skip
    return rows


def _ours(results: list[Estimate], truth: Tensor) -> dict[str, float]:
    gaps = torch.stack([result.mean - truth for result in results])
    stated = float(torch.stack([result.stderr for result in results]).square().mean().sqrt())
    return {"bias/se": float(gaps.mean() / gaps.std() * gaps.numel() ** 0.5), "rms": rms(list(gaps)), "rms/stderr": rms(list(gaps)) / stated}


def main() -> None:
    chosen = options(__doc__).parse_args()
    laws = {"dino": (dino(), 20, 40), "two-modes": (two_modes(), 20, 40), "mixture64": (mixture64(), 10, 20), "spectrum3072": (spectrum3072(), 4, 8)}
    found: dict[str, list[dict[str, Any]]] = {"nll": [], "curve": []}
    with torch.no_grad():
        for name, (law, count, repeats) in list(laws.items())[: 2 if chosen.quick else None]:
            for evals in (128,) if chosen.quick else (32, 128, 512):
                found["nll"].append(likelihood(name, law, evals, count, repeats))
                show(found["nll"], 13)
        for name, (law, count, repeats) in list(laws.items())[: 2 if chosen.quick else None]:
            for row in curve(name, law, 128, count, repeats):
                found["curve"].append(row)
                show(found["curve"], 13)
    write(chosen.out, found)


if __name__ == "__main__":
    main()
