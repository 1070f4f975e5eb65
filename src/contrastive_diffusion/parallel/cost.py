"""Does a window pay? Times the denoiser at a few numbers of rows and predicts the latency of each window against the sequential sampler.

One device evaluates n rows in c(n): flat while it is not full, then proportional. The sequential sampler takes T c(B); a window of p steps
K(p) c(p B) with K(p) rounds, about ``START_UP`` plus ``VISITS`` T / p (measured on DDPM; Findings in docs/parallel.md). So one device gains only
where c(p B) < c(B) T / K(p): with small networks and batches, or a device that one sample does not fill.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.parallel.processes import Evaluator

START_UP = 8.0  # rounds
VISITS = 1.5  # evaluations of a state
BUDGET = 0.01  # of the sequential sampler's time goes into the timing, at least a few calls
WINDOWS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Plan:
    """The window with the largest predicted ``gain`` (sequential latency over parallel latency), 1 if none has any; ``seconds`` of a call by rows."""

    window: int
    gain: float
    seconds: dict[int, float]
    words: str


def rounds(window: int, steps: int) -> float:
    """Rounds that a window is expected to take."""
    return min(float(steps), START_UP + VISITS * steps / window) if window > 1 else float(steps)


def plan(evaluator: Evaluator, item: tuple[int, ...], lanes: int, steps: int, logsnr: Tensor, dtype: torch.dtype, device: torch.device) -> Plan:
    """Times ``evaluator`` on lanes, 2 lanes, 4 lanes, ... rows until the budget is spent or more rows cannot pay."""
    counted = evaluator.rows, evaluator.reads
    seconds = {lanes: _seconds(evaluator, item, lanes, logsnr, dtype, device)}
    budget = BUDGET * steps * seconds[lanes]
    gains = {1: 1.0}
    for window in (w for w in WINDOWS if w <= steps):
        seconds[window * lanes] = _seconds(evaluator, item, window * lanes, logsnr, dtype, device)
        gains[window] = steps * seconds[lanes] / (rounds(window, steps) * seconds[window * lanes])
        budget -= 2 * seconds[window * lanes]
        if budget < 0 and window >= 8 and gains[window] < max(gains.values()):
            break
    evaluator.rows, evaluator.reads = counted
    best = max(gains, key=lambda w: gains[w])
    gain = gains[best]
    verdict = (
        f"window {best}: {gain:.1f} x lower latency than the sequential sampler predicted"
        if gain > 1
        else f"the sequential sampler is faster here: {min(seconds.values()) * 1e3:.2g} ms for {lanes} rows, and more rows cost as much more; window 1 is used"
    )
    return Plan(best, gain, seconds, verdict)


def _seconds(evaluator: Evaluator, item: tuple[int, ...], rows: int, logsnr: Tensor, dtype: torch.dtype, device: torch.device) -> float:
    """The best of two calls after a warm-up, on noise at levels of the grid."""
    z = torch.randn(rows, *item, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)
    level = logsnr[torch.arange(rows, device=device) % len(logsnr)].to(dtype)
    found = []
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        evaluator(z, level)
        _wait(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
