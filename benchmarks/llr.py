"""How well is log p_zeta(x) - log p(x) estimated? Ours against restatements of the paper's estimator, at equal evaluations.

"independent": both densities from draws of their own, log-SNR from one logistic law for all zeta, as the paper's code does: loc 0, scale 3,
clip 3 in 2-D; in more dimensions also its law for images, 4, 4, 3, and the better of the two counts. "shared": that law, the same draws for both.
Exact denoisers, so the truth is the mixture's closed form; for the trained network it is our own estimate at 65,536 evaluations.
The second table adds our devices one by one.

python benchmarks/llr.py [--quick] [--out benchmarks/results/llr.json]
"""

import time
from typing import Any

import torch
from _common import options, show, write
from torch import Tensor

from contrastive_diffusion.channel import compose, corrupt, per_row
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import dino, two_modes
from contrastive_diffusion.denoisers import Denoiser, finest_of, noised
from contrastive_diffusion.likelihood import MARGIN, llr
from contrastive_diffusion.likelihood.points import grouped_noise, own_scale
from contrastive_diffusion.recipes import Loss, Net
from contrastive_diffusion.schedules import Plateau, Schedule, logistic, slope
from contrastive_diffusion.training import State, Training, train

ZETAS = (-6.0, 0.0, 3.0, 6.0, 9.0, 12.0, 15.0)
PAPER = {"2-D": logistic(0.0, 3.0, 3.0), "images": logistic(4.0, 4.0, 3.0)}
EXACT = 65536  # evaluations of the trained network's own ratio
VARIANTS = ("shared draws", "plateau", "strata", "equal spacing", "pairs", "groups", "ours")


def mixture64() -> GaussianMixture:
    """Ten components in 64 dimensions, stds between 0.05 and 0.5."""
    generator = torch.Generator().manual_seed(64)
    return GaussianMixture(torch.randn(10, 64, generator=generator), 0.05 * 10 ** torch.rand(10, 64, generator=generator))


def spectrum3072() -> GaussianMixture:
    """One Gaussian in 3,072 dimensions with a log-normal spectrum, log-eigenvalues N(-6.26, 3^2)."""
    generator = torch.Generator().manual_seed(3072)
    return GaussianMixture(torch.zeros(1, 3072), torch.exp(0.5 * (-6.26 + 3 * torch.randn(1, 3072, generator=generator, dtype=torch.float64))))


def trained() -> Denoiser:
    """A width-64 network after 2,000 DDPM steps on Dino."""
    loss = Loss()
    state = State(Net().build((2,), 0), Training(steps=2000))
    for _ in train(state, loss.build(), dino(), wrap=loss.bounded):
        pass
    return loss.bounded(state.averaged)


def _points(law: Schedule, x: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """n independent points of a law for every row: log-SNR, weight, noise."""
    u = torch.rand((len(x), n), generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return *slope(law, u), torch.randn((len(x), n, *x.shape[1:]), generator=generator, dtype=x.dtype)


def _integrand(denoiser: Denoiser, x: Tensor, draws: tuple[Tensor, Tensor, Tensor], zeta: float | None) -> Tensor:
    """Half the weighted squared error at every point (b, n), for p (zeta None) or p_zeta."""
    logsnr, weight, eps = draws
    z = corrupt(x[:, None].expand_as(eps).flatten(0, 1), logsnr.flatten(), eps.flatten(0, 1))
    level, b = (logsnr.flatten(), None) if zeta is None else compose(logsnr.flatten(), zeta)
    eps_hat = denoiser(z, level.to(z.dtype))
    eps_hat = eps_hat if b is None else per_row(b, z) * eps_hat
    return 0.5 * weight * (eps.flatten(0, 1) - eps_hat).square().flatten(1).sum(1).reshape(weight.shape)


def independent(denoiser: Denoiser, x: Tensor, zeta: float, evals: int, generator: torch.Generator, law: Schedule) -> Tensor:
    halves = [_integrand(denoiser, x, _points(law, x, evals // 2, generator), level) for level in (None, zeta)]
    return (halves[0] - halves[1]).mean(1)


def shared(denoiser: Denoiser, x: Tensor, zeta: float, draws: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return (_integrand(denoiser, x, draws, None) - _integrand(denoiser, x, draws, zeta)).mean(1)


def variant(name: str, denoiser: Denoiser, x: Tensor, zeta: float, evals: int, generator: torch.Generator, paper: Schedule) -> Tensor:
    """Our estimator without its last devices: each name in VARIANTS adds one."""
    if name == "ours":
        return llr(denoiser, x, zeta, evals, generator).mean
    n, stage, finest = evals // 2, VARIANTS.index(name), finest_of(denoiser)
    logsnr, weight, eps = _points(paper, x, n, generator)
    if stage >= VARIANTS.index("plateau"):
        low = torch.maximum(torch.tensor(zeta), own_scale(x)).clamp(max=finest) - MARGIN
        u = torch.rand((len(x), n if stage < VARIANTS.index("equal spacing") else 1), generator=generator, dtype=torch.float64)
        u = u if stage < VARIANTS.index("strata") else (torch.arange(n) + u) / n
        logsnr, weight = slope(Plateau(low[:, None], finest + MARGIN), u.clamp(1e-12, 1 - 1e-12))
    if name == "pairs":
        eps = torch.stack([eps[:, ::2], -eps[:, ::2]], 2).flatten(1, 2)
    if name == "groups":
        eps = grouped_noise(x, n, generator)
    return shared(denoiser, x, zeta, (logsnr, weight, eps))


def rms(errors: list[Tensor]) -> float:
    return float(torch.stack(errors).square().mean().sqrt())


def points(law: GaussianMixture, zeta: float, label: int, count: int, generator: torch.Generator) -> Tensor:
    x = law.sample(count, generator, torch.float64)
    return x if label > 0 else noised(x, zeta, generator)


def measure(name: str, law: GaussianMixture, denoiser: Denoiser, zeta: float, label: int, evals: int, count: int, repeats: int) -> dict[str, Any]:
    """One row of the table: ``count`` draws of the label's law, each estimated ``repeats`` times in batches of ``count``."""
    generator = torch.Generator().manual_seed(0)
    x = points(law, zeta, label, count, generator)
    x = x if denoiser is law else x.float()
    truth = law.llr(x, zeta) if denoiser is law else llr(denoiser, x, zeta, EXACT, generator).mean
    papers = {key: PAPER[key] for key in PAPER if key == "2-D" or x.shape[1] > 2}
    apart = {key: rms([independent(denoiser, x, zeta, evals, generator, paper) - truth for _ in range(repeats)]) for key, paper in papers.items()}
    best = min(apart, key=lambda key: apart[key])
    together = rms([shared(denoiser, x, zeta, _points(papers[best], x, evals // 2, generator)) - truth for _ in range(repeats)])
    start = time.process_time()
    results = [llr(denoiser, x, zeta, evals, generator) for _ in range(repeats)]
    seconds = time.process_time() - start
    errors = torch.stack([result.mean - truth for result in results])
    stated = float(torch.stack([result.stderr for result in results]).square().mean().sqrt())
    ours = rms(list(errors))
    return {
        "law": name, "zeta": zeta, "label": label, "evals": evals, "truth": float(truth.mean()),
        "bias/se": float(errors.mean() / errors.std() * errors.numel() ** 0.5), "rms": ours, "rms/stderr": ours / stated,
        "independent rms": apart[best], "paper law": best, "shared rms": together, "mse ratio": (apart[best] / ours) ** 2, "us/row": 1e6 * seconds / errors.numel(),
    }  # fmt: skip


def ablation(name: str, law: GaussianMixture, zeta: float, label: int, count: int, repeats: int) -> dict[str, Any]:
    """Root mean square errors at 128 evaluations with our devices added one by one."""
    generator = torch.Generator().manual_seed(1)
    x = points(law, zeta, label, count, generator)
    truth, paper = law.llr(x, zeta), PAPER["2-D" if x.shape[1] <= 2 else "images"]
    apart = rms([independent(law, x, zeta, 128, generator, paper) - truth for _ in range(repeats)])
    found = {v: rms([variant(v, law, x, zeta, 128, generator, paper) - truth for _ in range(repeats)]) for v in VARIANTS}
    return {"law": name, "zeta": zeta, "label": label, "independent": apart} | found


def main() -> None:
    chosen = options(__doc__, "Dino and two modes at 128 evaluations only").parse_args()
    law = dino()
    laws: dict[str, tuple[GaussianMixture, Denoiser, int, int]] = {"dino": (law, law, 20, 20), "two-modes": (*[two_modes()] * 2, 20, 20)}  # pyright: ignore
    if not chosen.quick:
        laws |= {"dino-net": (law, trained(), 20, 20), "mixture64": (*[mixture64()] * 2, 10, 10), "spectrum3072": (*[spectrum3072()] * 2, 4, 6)}  # pyright: ignore
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for name, (truth, denoiser, count, repeats) in laws.items():
            for zeta in ZETAS:
                for label in (1, -1):
                    for evals in (128,) if chosen.quick else (32, 128, 512):
                        rows.append(measure(name, truth, denoiser, zeta, label, evals, count, repeats))
                        show(rows)
        devices: list[dict[str, Any]] = []
        for name in [key for key in ("dino", "two-modes", "mixture64") if key in laws]:
            for zeta in (0.0, 9.0):
                for label in (1, -1):
                    devices.append(ablation(name, laws[name][0], zeta, label, 20, 20))
                    show(devices)
    write(chosen.out, {"rows": rows, "devices": devices})


if __name__ == "__main__":
    main()
