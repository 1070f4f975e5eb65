"""What the study measures of one trained denoiser, as plain numbers."""

from typing import Any

import torch
from torch import Tensor

from contrastive_diffusion import metrics, schedules, solvers
from contrastive_diffusion.data.images import digits
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import toy
from contrastive_diffusion.denoisers import Denoiser, evaluate, noised
from contrastive_diffusion.likelihood import llr, mse_curve, nll
from contrastive_diffusion.parallel import Paradigms
from contrastive_diffusion.runs import named_denoiser
from contrastive_diffusion.sampling import Round, Sequential
from contrastive_diffusion.training import stream

LEVELS = (-2.0, 2.0, 4.0, 6.0, 8.0)
OFFSETS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)  # level of a point less the claimed one: below 0, noisier than claimed
POINTS = 3000
ROUNDS = (3, 6, 9, 12, 15, 18, 21, 24, 27)  # of the parallel sampler: where its iterates are kept
QUALITY = (15, 20, 25, 30)  # rounds after which the current sample is scored
KEPT = 4000
HELD_OUT = 360
BANDWIDTH, SHARP = 1.0, 0.03**0.5  # of the MMD: for the two modes, and elsewhere the std of the paper's kernel


def mixture(law: str) -> GaussianMixture:
    found = toy(law)
    assert isinstance(found, GaussianMixture)
    return found


def digit_rows(held_out: bool) -> Tensor:
    """8x8 digits as vectors (N, 64) in a fixed random order: the held-out ones, or the others."""
    x = digits().flatten(1)
    x = x[torch.randperm(len(x), generator=stream(0, "digits"))]
    return x[:HELD_OUT] if held_out else x[HELD_OUT:]


def off_level_map(law: str) -> dict[str, Tensor]:
    """Iterates of Picard sampling with the exact denoiser, and the level that each looks like.

    ``points.z``, ``points.logsnr``: random iterates of ROUNDS and the levels that they are read at, those that left |z| < 20 left out; over the steps,
    ``step.logsnr`` (n,) and ``offset.K`` (n,), the mean of the most likely level less the nominal one in round K.
    """
    truth, grid = mixture(law), schedules.grid(schedules.ddpm(), 1000)
    found: dict[str, Tensor] = {"step.logsnr": grid[:-1][::10].clone()}
    states, levels = [], []

    def watch(seen: Round) -> None:
        if seen.number in ROUNDS:
            level = grid[seen.begin : seen.end]
            z = seen.states[: len(level)]
            states.append(z.flatten(0, 1))
            levels.append(level.repeat_interleave(z.shape[1]))
            if seen.number % 6 == 3:
                begin = -(-seen.begin // 10) * 10
                found[f"offset.{seen.number}"] = _offsets(truth, z[begin - seen.begin :: 10], level[begin - seen.begin :: 10])
                found[f"steps.{seen.number}"] = level[begin - seen.begin :: 10].clone()

    Paradigms(solvers.ddpm())(truth, grid, (24, *truth.shape), 7, watch=watch)
    z, level = torch.cat(states), torch.cat(levels)
    near = (z.abs() < 20).flatten(1).all(1).nonzero().squeeze(1)
    chosen = near[torch.randperm(len(near), generator=stream(0, "iterates"))[:KEPT]]
    return found | {"points.z": z[chosen], "points.logsnr": level[chosen].float(), "share.far": torch.tensor(1 - len(near) / len(z))}


def _offsets(truth: GaussianMixture, z: Tensor, level: Tensor) -> Tensor:
    """Most likely level of each state (n, B, *S) less its nominal one, mean over the batch; states that left |z| < 20 are not counted."""
    candidates = torch.linspace(-10, 9.2, 97, dtype=torch.float64)
    best = _likeliest(truth, z.flatten(0, 1), candidates).reshape(z.shape[:2])
    near = (z.abs() < 20).flatten(2).all(2)
    return torch.where(near, best - level[:, None], torch.nan).nanmean(1)


def _likeliest(truth: GaussianMixture, z: Tensor, candidates: Tensor) -> Tensor:
    scores = torch.stack([truth.log_prob(z.double().clamp(-50, 50), float(c)) for c in candidates], 1)
    return candidates[scores.argmax(1)]


def matched_range(facts: dict[str, Tensor]) -> tuple[float, float]:
    """The central nine tenths of the levels (of data noised afresh) that iterates look like: the zeta of a contrastive loss matched to them."""
    offsets = torch.cat([facts[key] + facts[key.replace("offset", "steps")] for key in facts if key.startswith("offset.")])
    offsets = offsets[offsets.isfinite()]
    return float(offsets.quantile(0.05)), float(offsets.quantile(0.95))


@torch.no_grad()
def measure(law: str, path: str, facts: dict[str, Tensor] | None, samples: int, steps: tuple[int, ...], parallel: bool) -> dict[str, Any]:
    """Everything about the denoiser of the run folder ``path``."""
    denoiser, shape = named_denoiser(path)
    if law == "digits":
        return _digits(denoiser, shape, samples)
    truth, found = mixture(law), {}
    assert facts is not None
    x = truth.sample(POINTS, stream(0, "points"))
    for level in LEVELS:
        for offset in OFFSETS:
            z = noised(x, level + offset, stream(0, f"noise {offset}"))
            found[f"error {level:g} {offset:+g}"] = float(_errors(denoiser, truth, z, torch.full((POINTS,), level)).mean())
    found["error on iterates"] = float(_errors(denoiser, truth, facts["points.z"], facts["points.logsnr"]).clamp_min(1e-12).log().mean().exp())
    for count in steps:
        found |= _sequential(denoiser, truth, law, samples, count)
    return found | (_parallel(denoiser, truth, samples // 2) if parallel else {})


def _errors(denoiser: Denoiser, truth: Denoiser, z: Tensor, level: Tensor) -> Tensor:
    return (evaluate(denoiser, z, level) - evaluate(truth, z, level)).square().flatten(1).sum(1).double()


def _sequential(denoiser: Denoiser, truth: GaussianMixture, law: str, samples: int, steps: int) -> dict[str, float]:
    """Exact log-density of the last noisy state, and MMD of the samples."""
    grid = schedules.grid(schedules.ddpm(), steps)
    before: list[Tensor] = []
    drawn = Sequential(solvers.ddpm())(
        denoiser, grid, (samples, *truth.shape), 3, watch=lambda seen: before.append(seen.states[0]) if seen.number == steps - 1 else None
    )
    reference = truth.sample(2000, stream(0, "reference"))
    exact = truth.log_prob(noised(reference, float(grid[-2]), stream(0, "reference noise")).double(), float(grid[-2]))
    return {
        f"log-density {steps}": float(truth.log_prob(before[0].double(), float(grid[-2])).mean()),
        f"true log-density {steps}": float(exact.mean()),
        f"mmd {steps}": metrics.mmd(drawn.x, reference, BANDWIDTH if law == "two-modes" else SHARP).mean,
    }


def _parallel(denoiser: Denoiser, truth: GaussianMixture, samples: int) -> dict[str, Any]:
    """Picard in lock step: rounds, evaluations, and the log-density of the current sample after some rounds."""
    grid, quality = schedules.grid(schedules.ddpm(), 1000), {}

    def watch(seen: Round) -> None:
        if seen.number in QUALITY:
            quality[f"log-density after round {seen.number}"] = float(truth.log_prob(seen.states[-2].double().clamp(-50, 50), float(grid[-2])).mean())

    drawn = Paradigms(solvers.ddpm())(denoiser, grid, (samples, *truth.shape), 3, watch=watch)
    return quality | {"rounds": drawn.rounds, "evals per sample": drawn.evals / samples}


def _digits(denoiser: Denoiser, shape: tuple[int, ...], samples: int) -> dict[str, Any]:
    """On held-out digits: denoising error over log-SNR, bits per dimension, accuracy of the ratio; and the samples' MMD."""
    x = digit_rows(held_out=True)
    levels = torch.linspace(-6, 6, 7)
    curve = mse_curve(denoiser, x, levels, 16 * len(levels), stream(0, "curve")).mean.mean(0)
    found: dict[str, Any] = {f"held-out error {level:g}": float(v) for level, v in zip(levels.tolist(), curve, strict=True)}
    found["held-out nll"] = float(nll(denoiser, x, 128, stream(0, "nll")).mean.mean())
    for zeta in (-2.0, 0.0, 2.0, 4.0):
        dirty = noised(x, zeta, stream(0, "dirty"))
        ratios = [llr(denoiser, rows, zeta, 64, stream(0, "ratio")).mean for rows in (x, dirty)]
        found[f"ratio accuracy {zeta:g}"] = float(((ratios[0] < 0).double().mean() + (ratios[1] > 0).double().mean()) / 2)
        logits = torch.cat([ratios[0], -ratios[1]])
        found[f"ratio cross-entropy {zeta:g}"] = float(torch.nn.functional.softplus(logits).mean())
    drawn = Sequential(solvers.ddpm())(denoiser, schedules.grid(schedules.ddpm(), 100), (samples, *shape), 3)
    found["mmd 100"] = metrics.mmd(drawn.x, x, 4.0).mean
    return found
