"""What does a contrastive step cost, and how much does its gradient say for each evaluation of the network?

Cost: plain DDPM steps, the same plus our contrastive loss at its defaults, and plus the paper's recipe re-stated on our modules (two rows of
the batch, B points for each of two densities, independent draws, its 2-D integration law), side by side and interleaved.
Signal: on a network after 2,000 plain steps on Dino, the gradient's mean component along the gradient of the exact loss (many points, many
rows), squared, over the gradient's variance, per evaluation. One choice of the loss is changed at a time.

python benchmarks/contrastive_step.py [--quick] [--out benchmarks/results/contrastive_step.json]
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from _common import options, show, write
from torch import Tensor, nn
from torch.nn.functional import softplus

from contrastive_diffusion.channel import compose, corrupt, per_row
from contrastive_diffusion.data.images import digits
from contrastive_diffusion.data.toys import dino
from contrastive_diffusion.denoisers import Denoiser, check_data, noised
from contrastive_diffusion.objectives import Contrastive, Denoising, Objective, Weighted
from contrastive_diffusion.recipes import Loss, Net
from contrastive_diffusion.schedules import Schedule, draw, logistic, slope, uniform
from contrastive_diffusion.training import Rows, State, Training, stream, train

RANGE = uniform(-4.0, 10.0)


@dataclass(frozen=True)
class Paper:
    """The paper's recipe: two rows, B points for each density, drawn apart."""

    zeta: Schedule = field(default_factory=lambda: RANGE)
    law: Schedule = field(default_factory=lambda: logistic(0.0, 3.0, 3.0))

    def __call__(self, denoiser: Denoiser, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        count = len(check_data(x))
        zeta, _ = draw(self.zeta, 2, generator)
        label = 1.0 - 2.0 * (torch.rand(2, generator=generator) < 0.5).to(x.dtype)
        rows = torch.where((label > 0).reshape(-1, *[1] * (x.dim() - 1)), x[:2], noised(x[:2], zeta, generator)).repeat_interleave(count, 0)
        levels = zeta.repeat_interleave(count)
        ratio = self._half_errors(denoiser, rows, None, generator) - self._half_errors(denoiser, rows, levels, generator)
        logit = label * ratio.reshape(2, count).mean(1)
        return {"loss": softplus(logit).sum() / count}

    def _half_errors(self, denoiser: Denoiser, x: Tensor, zeta: Tensor | None, generator: torch.Generator | None) -> Tensor:
        logsnr, weight = slope(self.law, torch.rand(len(x), generator=generator, dtype=torch.float64))
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        level, b = (logsnr, torch.ones_like(logsnr)) if zeta is None else compose(logsnr, zeta)
        eps_hat = per_row(b, x) * denoiser(corrupt(x, logsnr, eps), level.to(x.dtype))
        return 0.5 * weight.to(x.dtype) * (eps - eps_hat).square().flatten(1).sum(1)

    def evals(self, batch: int) -> int:
        return 4 * batch


def plus(objective: Objective, weight: float = 0.1) -> Weighted:
    return Weighted({"denoising": (1.0, Denoising()), "contrastive": (weight, objective)})


def cost(name: str, net: nn.Module, data: Rows, batch: int, repeats: int) -> dict[str, Any]:
    """Median processor time of a whole optimizer step of each kind, interleaved."""
    loss = Loss()
    objectives: dict[str, Objective] = {"plain": Denoising(), "contrastive": plus(Contrastive()), "paper": plus(Paper())}
    runs = {key: train(State(net, Training(steps=10**6, batch=batch)), objective, data, wrap=loss.bounded) for key, objective in objectives.items()}
    taken: dict[str, list[float]] = {key: [] for key in objectives}
    for i in range(repeats + 3):
        for key, steps in runs.items():
            start = time.process_time()
            next(steps)
            if i >= 3:
                taken[key].append(time.process_time() - start)
    median = {key: statistics.median(values) for key, values in taken.items()}
    evals = {key: objective.evals(batch) for key, objective in objectives.items()}
    return {
        "network": name, "batch": batch, "parameters": sum(p.numel() for p in net.parameters()), "plain ms": 1e3 * median["plain"],
        **{f"{key} {what}": table[key] / table["plain"] for what, table in (("time", median), ("evals", evals)) for key in ("contrastive", "paper")},
    }  # fmt: skip


def trained(steps: int) -> nn.Module:
    loss, state = Loss(), State(Net().build((2,), 0), Training(steps=steps))
    for _ in train(state, loss.build(), dino(), wrap=loss.bounded):
        pass
    return state.averaged


def gradients(net: nn.Module, objective: Objective, batch: int, count: int, purpose: str) -> Tensor:
    """Gradients (count, P) on fresh batches."""
    denoiser, parameters, found = Loss().bounded(net), [p for p in net.parameters() if p.requires_grad], []
    for i in range(count):
        generator = stream(11, purpose, i)
        loss = objective(denoiser, dino().sample(batch, generator), generator)["loss"]
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(found)


def signal(name: str, gradient: Tensor, exact: Tensor, evals: int) -> dict[str, Any]:
    along = gradient @ (exact / exact.norm())
    noise = gradient.var(0).sum()
    mean, error = float(along.mean()), float(along.std() / len(along) ** 0.5)
    return {
        "loss": name, "evals": evals, "signal": mean, "signal error": error, "noise": float(noise.sqrt()),
        "snr / eval": mean**2 / float(noise) / evals, "relative error": 2 * error / abs(mean), "largest / median norm": float(gradient.norm(dim=1).max() / gradient.norm(dim=1).median()),
    }  # fmt: skip


def signals(quick: bool) -> list[dict[str, Any]]:
    net = trained(300 if quick else 2000)
    for p in net.parameters():
        p.requires_grad_(True)
    count = 60 if quick else 400
    exact = gradients(net, Contrastive(RANGE, points=64, share=1.0), 512, 10 if quick else 40, "exact").mean(0)
    ours = {
        "default": Contrastive(),
        "points 4": Contrastive(points=4, share=1 / 8),
        "points 8": Contrastive(points=8, share=1 / 16),
        "points 32": Contrastive(points=32, share=1 / 64),
        "clean 0.25": Contrastive(clean=0.25),
        "clean 0.75": Contrastive(clean=0.75),
        "through clean": Contrastive(through="clean"),
        "through noised": Contrastive(through="noised"),
        "curvature removed": Contrastive(curvature="removed"),
    }
    cases: dict[str, tuple[Objective, int]] = {key: (objective, 512) for key, objective in ours.items()}
    cases |= {"paper's recipe, our zeta": (Paper(), 128), "paper's recipe, its zeta": (Paper(logistic(0.0, 3.0, 3.0)), 128)}
    rows: list[dict[str, Any]] = []
    for name, (objective, batch) in cases.items():
        rows.append(signal(name, gradients(net, objective, batch, count, name), exact, objective.evals(batch)))
        show(rows, 24)
    return rows


def main() -> None:
    chosen = options(__doc__).parse_args()
    toy, images = Rows(dino().sample(20_000, stream(0, "data"))), Rows(digits())
    unet = Net(kind="ddpm", width=32, blocks=1, mult=(1, 2), attention=())
    cases: list[Callable[[], dict[str, Any]]] = [
        lambda: cost("mlp 64", Net().build((2,), 0), toy, 512, 8 if chosen.quick else 60),
        lambda: cost("mlp 128", Net(width=128).build((2,), 0), toy, 512, 8 if chosen.quick else 40),
        lambda: cost("u-net 32", unet.build((1, 8, 8), 0), images, 128, 3 if chosen.quick else 15),
    ]
    costs: list[dict[str, Any]] = []
    for case in cases:
        costs.append(case())
        show(costs, 24)
    write(chosen.out, {"costs": costs, "signals": signals(chosen.quick)})


if __name__ == "__main__":
    main()
