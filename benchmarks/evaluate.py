"""Time and memory of the Frechet distance and the kernel distance of two sets of random features, against torchmetrics, on one thread.

Each measurement is a process of its own: its seconds (wall and processor: the latter is what the target is held to, as other work on the machine
does not count), and its peak of resident memory above what it held before (with the libraries loaded and warm).
Features are drawn block by block while they are read, the same numbers for both libraries, as an extractor would give them; the time to
draw them is in both. The two kernel distances are different unbiased estimates: ours is the mean over disjoint blocks of 1,000, which uses every row once,
torchmetrics' the mean over 100 random subsets of 1,000.

python benchmarks/evaluate.py [--n 50000] [--d 2048] [--out benchmarks/results/evaluate.json]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _common import options, write
from torch import Tensor

from contrastive_diffusion import metrics

BLOCK = 1024  # rows that are drawn, and given to torchmetrics, at a time
SUBSET = 1000  # rows of a kernel matrix
# glibc gives freed blocks back at once, so that the peak is what is held and not what was: for both libraries
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TARGETS = {"time": 1.0, "memory": 0.5}


class Drawn:
    """Features (n, d) that are drawn when they are read: blocks of a fixed linear map of normal numbers, a function of (seed, block)."""

    def __init__(self, n: int, d: int, seed: int):
        self.n, self.d, self.seed, self.held = n, d, seed, (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, part: slice) -> Tensor:
        begin, end, _ = part.indices(self.n)
        pieces = [self._block(b)[max(begin - b * BLOCK, 0) : end - b * BLOCK] for b in range(begin // BLOCK, -(-end // BLOCK))]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _block(self, number: int) -> Tensor:
        if self.held[0] != number:
            generator = torch.Generator().manual_seed(1000 * self.seed + number)
            x = torch.randn(BLOCK, self.d, generator=generator).abs_()
            self.held = number, x.mul_(1 + 0.1 * self.seed)
        return self.held[1]


class Through(torch.nn.Module):
    """An extractor that hands on what it is given."""

    def __init__(self, d: int):
        super().__init__()
        self.num_features = d

    def forward(self, x: Tensor) -> Tensor:
        return x


def ours_frechet(x: Drawn, y: Drawn) -> float:
    real = metrics.moments(y)
    to = metrics.Frechet(real.mean, real.cov)
    del real
    found = metrics.moments(x)
    mean, cov = found.mean, found.cov
    del found
    return to(mean, cov)


def ours_kid(x: Drawn, y: Drawn) -> tuple[float, float]:
    found = metrics.kid(x, y, SUBSET)
    return found.mean, found.stderr


def _fed(metric: Any, x: Drawn, y: Drawn) -> Any:
    for rows, real in ((y, True), (x, False)):
        for start in range(0, len(rows), BLOCK):
            metric.update(rows[start : start + BLOCK], real=real)
    return metric.compute()


def theirs_frechet(x: Drawn, y: Drawn) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance  # pyright: ignore[reportMissingImports]

    return float(_fed(FrechetInceptionDistance(Through(x.d)), x, y))


def theirs_kid(x: Drawn, y: Drawn) -> tuple[float, float]:
    from torchmetrics.image.kid import KernelInceptionDistance  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    mean, deviation = _fed(KernelInceptionDistance(Through(x.d), subsets=100, subset_size=SUBSET), x, y)
    return float(mean), float(deviation) / 10


WORK = {"frechet": {"ours": ours_frechet, "torchmetrics": theirs_frechet}, "kid": {"ours": ours_kid, "torchmetrics": theirs_kid}}


def _memory(key: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def measure(metric: str, library: str, n: int, d: int) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    work = WORK[metric][library]
    work(Drawn(2 * BLOCK, 300, 0), Drawn(2 * BLOCK, 300, 1))  # loads the code of all it will call
    before, start, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    value = work(Drawn(n, d, 0), Drawn(n, d, 1))
    spent = {"seconds": time.perf_counter() - start, "cpu seconds": time.process_time() - cpu}
    return {"metric": metric, "library": library, "value": value} | spent | {"peak MB": _memory("VmHWM") - before, "before MB": before}


def main() -> None:
    parser = options(__doc__, quick=None)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--d", type=int, default=2_048)
    parser.add_argument("--repeats", type=int, default=1, help="the least time and memory of so many processes")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        metric, library = chosen.one
        print(json.dumps(measure(metric, library, chosen.n, chosen.d)))
        return
    rows, ratios = [], {}
    for metric, libraries in WORK.items():
        best = {}
        for library in libraries:
            command = [sys.executable, __file__, "--n", str(chosen.n), "--d", str(chosen.d), "--one", metric, library]
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | RETURNED).stdout)
                for _ in range(chosen.repeats)
            ]
            best[library] = runs[0] | {key: min(run[key] for run in runs) for key in ("seconds", "cpu seconds", "peak MB")}
            rows.append(best[library])
            print(
                f"{metric:<9}{library:<14}{best[library]['seconds']:>9.2f} s{best[library]['cpu seconds']:>9.2f} s{best[library]['peak MB']:>9.0f} MB  {best[library]['value']}",
                flush=True,
            )
        ours, theirs = best["ours"], best["torchmetrics"]
        ratios[metric] = {
            "time": ours["cpu seconds"] / theirs["cpu seconds"],
            "wall": ours["seconds"] / theirs["seconds"],
            "memory": ours["peak MB"] / max(theirs["peak MB"], 1.0),  # tiny sets leave no trace
        }
        print(
            f"{metric:<9}{'ratio':<14}{ratios[metric]['time']:>9.2f}  {ratios[metric]['memory']:>10.2f}     targets {TARGETS['time']}, {TARGETS['memory']}"
        )
    if chosen.out:
        import torchmetrics

        write(chosen.out, {"n": chosen.n, "d": chosen.d, "rows": rows, "ratios": ratios, "targets": TARGETS}, torchmetrics=torchmetrics.__version__)


if __name__ == "__main__":
    main()
