"""Solvers: what a step costs beside the network, against diffusers' schedulers, and how error falls with evaluations.

"overhead": process time of a whole sampling loop whose denoiser costs nothing, ours over theirs, interleaved, the least of the
repeats (needs the extra "diffusers", skipped without it). "error": distance of each solver's samples from the exact solution, on Dino
and a mixture in 64 dimensions with their exact denoisers: for deterministic solvers the root mean square distance to the exact end of
the same start (a fine run of the third-order solver); for noisy ones, which have no such end, the Frechet distance of the first two moments
to the closed form.

python benchmarks/solvers.py [--only overhead | error] [--quick] [--out benchmarks/results/solvers.json]

With --only the other half of an existing --out file stays: "error" counts evaluations, "overhead" wants a quiet machine.
"""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import made, options, show, write
from torch import Tensor

from contrastive_diffusion import schedules, solvers
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import dino
from contrastive_diffusion.metrics import frechet
from contrastive_diffusion.sampling import START, Sequential, normal, walk
from contrastive_diffusion.solvers import StepMap

SHAPES = ((16, 2), (4, 3, 32, 32), (16, 3, 32, 32), (64, 3, 32, 32))
EVALS = (5, 10, 20, 50, 100, 200, 500, 1000)


def mixture64() -> GaussianMixture:
    """Ten components in 64 dimensions, stds between 0.05 and 0.5."""
    generator = torch.Generator().manual_seed(64)
    return GaussianMixture(torch.randn(10, 64, generator=generator), 0.05 * 10 ** torch.rand(10, 64, generator=generator))


def pairs() -> dict[str, tuple[str, Callable[[], Any]]]:
    """Our solver and grid, and their scheduler, whose steps do the same arithmetic."""
    import diffusers  # pyright: ignore[reportMissingImports]

    base: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    return {
        "ddpm": ("leading", lambda: diffusers.DDPMScheduler(**base, clip_sample=False)),
        "ddim": ("leading", lambda: diffusers.DDIMScheduler(**base, clip_sample=False)),
        "ddim:eta=1.0": ("leading", lambda: diffusers.DDIMScheduler(**base, clip_sample=False)),
        "heun": ("karras", lambda: diffusers.HeunDiscreteScheduler(**base, use_karras_sigmas=True)),
        "edm:churn=40,second=false": ("karras", lambda: diffusers.EDMEulerScheduler()),
        "dpmpp": ("trailing", lambda: diffusers.DPMSolverMultistepScheduler(**base, timestep_spacing="trailing")),
        "dpmpp-sde": (
            "trailing",
            lambda: diffusers.DPMSolverMultistepScheduler(**base, timestep_spacing="trailing", algorithm_type="sde-dpmsolver++"),
        ),
    }


def theirs(make: Callable[[], Any], out: Tensor, steps: int, options: dict[str, Any]) -> None:
    """Their loop, as their pipelines write it, with a network that returns ``out``."""
    scheduler, generator = make(), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    z = torch.randn(out.shape, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scheduler.scale_model_input(z, t)
        z = scheduler.step(out, t, z, generator=generator, **options).prev_sample


def overhead(spec: str, grid: str, make: Callable[[], Any], shape: tuple[int, ...], steps: int, repeats: int) -> dict[str, Any]:
    """Microseconds per step of both, in turns."""
    out, solver = torch.randn(shape) * 0.01, solvers.solver(spec)
    levels, options = schedules.named_grid(grid, steps), {"eta": 1.0} if "eta" in spec else {"s_churn": 40.0} if "churn" in spec else {}
    if spec.startswith(("heun", "dpmpp")) and not spec.endswith("sde"):
        accepted = {} if spec == "heun" else options
        options = accepted
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: Sequential(solver)(lambda z, logsnr: out[: len(z)], levels, shape),
        "theirs": lambda: theirs(_without_generator(make) if spec == "heun" else make, out, steps, options),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append((time.process_time() - start) / steps * 1e6)
    ours, other = (min(times[name]) for name in ("ours", "theirs"))
    return {"solver": spec, "shape": "x".join(map(str, shape)), "ours us/step": ours, "theirs us/step": other, "ratio": ours / other}


def _without_generator(make: Callable[[], Any]) -> Callable[[], Any]:
    """Their Heun scheduler takes no generator."""

    class Plain:
        def __init__(self):
            self.scheduler = make()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.scheduler, name)

        def step(self, out: Tensor, t: Any, z: Tensor, generator: Any = None) -> Any:
            return self.scheduler.step(out, t, z)

    return Plain


def moments(law: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of a mixture."""
    w = law.log_weights.exp()[:, None]
    mean = (w * law.means).sum(0)
    spread = law.means - mean
    return mean, (w * law.stds.square()).sum(0).diag() + (w * spread).T @ spread


def errors(law: GaussianMixture, name: str, evals: int, n: int, truth: Tensor, levels: Callable[[int], Tensor]) -> dict[str, Any]:
    """One point of a curve."""
    solver = solvers.SOLVERS[name]()
    drawn = Sequential(solver)(law, levels(solvers.steps_for(solver, evals)), (n, law.means.shape[1]), seed=0, dtype=torch.float64)
    x, (mean, cov) = drawn.x, moments(law)
    return {
        "solver": name, "evals": drawn.evals / n, "flow rms": None if solver.noisy else float((x - truth).square().mean().sqrt()),
        "moments": math.sqrt(max(frechet(mean, cov, x.mean(0), x.T.cov()), 0.0)),
    }  # fmt: skip


def exact_end(law: GaussianMixture, n: int, levels: Callable[[int], Tensor], steps: int) -> Tensor:
    """Where the exact flow takes the start of seed 0, to many digits more than is compared."""
    start = normal(0, torch.arange(n), torch.full((n,), START), (law.means.shape[1],), torch.float64)
    *_, last = walk(StepMap(solvers.eab(3), law, levels(steps)), start, lambda i: start)
    return last


def all_overheads(quick: bool) -> list[dict[str, Any]]:
    """Every pair of solvers and shapes, printed as it comes."""
    try:
        known = pairs()
    except ImportError:
        print("diffusers is not installed: no overhead measured; pip install 'contrastive-diffusion[diffusers]'")
        return []
    rows: list[dict[str, Any]] = []
    for shape in SHAPES[:2] if quick else SHAPES:
        for spec, (grid, make) in known.items():
            rows.append(overhead(spec, grid, make, shape, 50, 5 if quick else 21))
            show(rows)
    return rows


def all_errors(quick: bool) -> dict[str, Any]:
    """Every solver on both laws, printed as curves."""
    levels: Callable[[int], Tensor] = lambda steps: schedules.grid(schedules.uniform(-9.0, 12.0), steps)  # noqa: E731
    return {
        name: _errors_on(name, law, 100 if quick else n, levels, quick) for name, law, n in (("dino", dino(), 500), ("mixture64", mixture64(), 200))
    }


def _errors_on(law_name: str, law: GaussianMixture, n: int, levels: Callable[[int], Tensor], quick: bool) -> dict[str, Any]:
    truth = exact_end(law, n, levels, 1000 if quick else 3000)
    reference = law.sample(n, torch.Generator().manual_seed(1), torch.float64)
    floor = math.sqrt(max(frechet(*moments(law), reference.mean(0), reference.T.cov()), 0.0))
    known = [name for name in solvers.SOLVERS if name != "adaptive"]
    print(f"\n{law_name}: flow rms error (deterministic) or moment error (noisy; of true samples {floor:.3g}) at evaluations a sample")
    rows: list[dict[str, Any]] = []
    for name in known:
        own = [errors(law, name, evals, n, truth, levels) for evals in (EVALS[:4] if quick else EVALS)]
        points = (f"{row['evals']:5.0f}: {(row['moments'] if row['flow rms'] is None else row['flow rms']):<8.3g}" for row in own)
        print(f"  {name:<15}" + "  ".join(points), flush=True)
        rows += own
    return {"moments of true samples": floor, "samples": n, "rows": rows}


def main() -> None:
    parser = options(__doc__, "fewer evaluations, shapes and repeats")
    parser.add_argument("--only", choices=("overhead", "error"))
    chosen = parser.parse_args()
    found: dict[str, Any] = json.loads(chosen.out.read_text()) if chosen.only and chosen.out and chosen.out.exists() else {}
    for name, measure in {"overhead": all_overheads, "error": all_errors}.items():
        if chosen.only in (None, name):
            found[name] = {"environment": made(), "found": measure(chosen.quick)}
    write(chosen.out, found)


if __name__ == "__main__":
    main()
