"""ParaDiGMS as it is in diffusers: its schedulers' own ``batch_step_no_noise``, and the rule of its pipeline restated around it.

The pipeline itself needs transformers and a text encoder, and lies in a folder of deprecated ones; what it does between two calls of its network
is here: noise for every step drawn first, all states stacked, prefix sums, increments against the variance of the next step, the
whole batch waiting for its slowest sample, new states as copies of the last one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import UsageError
from contrastive_diffusion.schedules import ddpm

TABLE = ddpm().logsnrs


@dataclass(frozen=True)
class Result:
    x: Tensor
    rounds: int
    evals: int
    path: Tensor


def schedulers():
    try:
        from diffusers import DDIMParallelScheduler, DDPMParallelScheduler  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError("given no diffusers, expected the baseline's package; pip install 'contrastive-diffusion[diffusers]'") from error
    return DDPMParallelScheduler, DDIMParallelScheduler


def scheduler(kind: str, steps: int):
    """The scheduler on linear betas and leading spacing, without clipping, where its batched and its scalar step agree."""
    ddpm_class, ddim_class = schedulers()
    common = {
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "clip_sample": False,
        "timestep_spacing": "leading",
    }
    made = ddpm_class(variance_type="fixed_small", **common) if kind == "ddpm" else ddim_class(set_alpha_to_one=True, **common)
    made.set_timesteps(steps)
    return made


def grid(made) -> Tensor:
    """Its levels as a grid of log-SNRs."""
    return torch.cat([TABLE[made.timesteps], torch.tensor([torch.inf], dtype=torch.float64)])


def sample(
    made, denoiser: Denoiser, start: Tensor, noise: Callable[[int], Tensor] | None, window: int, tolerance: float,
    watch: Callable[[int, Tensor], object] | None = None, dtype: torch.dtype = torch.float32, most: int = 10**9,
) -> Result:  # fmt: skip
    """``start`` (B, *S); ``noise(i)`` the unit noise of step i for stochastic schedulers; the error of the batch decides for all."""
    times, steps, batch = made.timesteps, len(made.timesteps), len(start)
    numel = start[0].numel()
    spread = [made._get_variance(t) for t in times] if noise is not None else [_ddim_variance(made, t) for t in times]
    variance = torch.tensor([float(v) for v in spread] + [0.0])
    inverse = 1.0 / variance / numel
    draws = torch.zeros(steps + 1, *start.shape, dtype=dtype)
    if noise is not None:
        for i, t in enumerate(times):
            draws[i + 1] = (made._get_variance(t) ** 0.5 if t > 0 else 0) * noise(i).to(dtype)
    states = torch.stack([start.to(dtype)] * (steps + 1))
    begin, end, rounds, evals = 0, min(window, steps), 0, 0
    while begin < steps and rounds < most:
        width = end - begin
        block = states[begin:end]
        t = times[begin:end, None].repeat(1, batch)
        out = denoiser(block.flatten(0, 1), TABLE[t.flatten()].to(block.dtype)).reshape(block.shape)
        rounds, evals = rounds + 1, evals + width * batch
        moved = made.batch_step_no_noise(model_output=out.flatten(0, 1), timesteps=t.flatten(), sample=block.flatten(0, 1)).reshape(block.shape)
        total = torch.cumsum((moved - block).reshape(width, -1), 0).reshape(block.shape)
        if noise is not None:
            total = total + torch.cumsum(draws[begin + 1 : end + 1].reshape(width, -1), 0).reshape(block.shape)
        new = states[begin][None] + total
        error = torch.linalg.norm((new - states[begin + 1 : end + 1]).reshape(width, batch, -1), dim=-1).square()
        relative = error * inverse[begin + 1 : end + 1, None]
        bad = torch.nn.functional.pad(relative > tolerance**2, (0, 0, 0, 1), value=1)
        ahead = torch.max(bad, dim=1).values.int()
        advance = int(torch.argmax(ahead).item())
        states[begin + 1 : end + 1] = new
        next_begin = begin + min(1 + advance, window)
        next_end = min(next_begin + window, steps)
        if next_end > end:
            states[end + 1 : next_end + 1] = states[end][None]
        begin, end = next_begin, next_end
        if watch is not None:
            watch(rounds, states)
    return Result(states[-1], rounds, evals, states)


def _ddim_variance(made, t: Tensor) -> Tensor:
    return made._get_variance(t)
