"""Images per second and memory of a plain and of a contrastive training step, and the share of the time spent waiting for data.

    python benchmarks/train_images.py [--quick] [--device cuda] [--out FILE.json]

Both steps are those of ``training.train`` with the default settings of the contrastive loss, interleaved round by round; times are medians, CPU
times where the device is one. The contrastive step adds two evaluations for each point of each contrasted row to one evaluation for each row.
Data: digits and photo patches from memory, and patches as PNGs in a zip archive, decoded on the way.
"""

import resource
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from _common import options, write
from PIL import Image

from contrastive_diffusion.data.images import open_images, patches
from contrastive_diffusion.recipes import Loss, Net
from contrastive_diffusion.training import Feed, State, Training, train

CASES: dict[str, dict[str, Any]] = {
    "digits, ddpm++ 0.2 M": {
        "data": "digits",
        "net": Net(kind="ddpm++", width=16, blocks=1, mult=(1, 2), attention=(4,)),
        "batch": 128,
        "loss": "edm",
    },
    "digits, ddpm 0.3 M": {"data": "digits", "net": Net(kind="ddpm", width=32, blocks=1, mult=(1, 1), attention=()), "batch": 128, "loss": "ddpm"},
    "patches, ddpm++ 0.7 M": {
        "data": "patches",
        "net": Net(kind="ddpm++", width=32, blocks=1, mult=(1, 2), attention=(16,)),
        "batch": 32,
        "loss": "edm",
    },
    "zip of patches, ddpm++ 0.7 M": {
        "data": "zip",
        "net": Net(kind="ddpm++", width=32, blocks=1, mult=(1, 2), attention=(16,)),
        "batch": 32,
        "loss": "edm",
    },
}
LARGE = {
    "patches, CIFAR-10's ddpm++ 56 M": {
        "data": "patches",
        "net": Net(kind="ddpm++", width=128, blocks=4, mult=(2, 2, 2)),
        "batch": 128,
        "loss": "edm",
    },
    "patches, CIFAR-10's ddpm 36 M": {"data": "patches", "net": Net(kind="ddpm", width=128, blocks=2), "batch": 128, "loss": "ddpm"},
}


def main() -> None:
    parser = options(__doc__, "one case, two rounds")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of one step each")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    chosen = parser.parse_args()
    cases = (CASES | (LARGE if chosen.device == "cuda" else {})) if not chosen.quick else dict(list(CASES.items())[:1])
    with tempfile.TemporaryDirectory() as folder:
        rows = [_case(name, case, 2 if chosen.quick else chosen.rounds, chosen.device, Path(folder)) for name, case in cases.items()]
    _show(rows)
    write(chosen.out, {"rows": rows})


def _case(name: str, case: dict[str, Any], rounds: int, device: str, folder: Path) -> dict[str, Any]:
    """Plain and contrastive steps of one network and data set, in turn."""
    data = open_images(_zip(folder) if case["data"] == "zip" else case["data"])
    losses = {"plain": Loss(denoising=case["loss"]), "contrastive": Loss(denoising=case["loss"], contrastive=0.01)}
    steppers, memory = {}, {}
    for kind, loss in losses.items():
        config = Training(steps=10**6, batch=case["batch"], precision="bfloat16" if device == "cuda" else "float32", workers=0)
        net = case["net"].build(data.shape, 0).to(device)
        state = State(net, config)
        steppers[kind] = train(state, loss.build(case["net"].sigma_data), Feed(data, config), loss.bounded)
        memory[kind] = _memory(lambda kind=kind: next(steppers[kind]), device)
    clock = _clock(device)
    seconds: dict[str, list[float]] = {kind: [] for kind in losses}
    waited: dict[str, list[float]] = {kind: [] for kind in losses}
    for _ in range(rounds):
        for kind, steps in steppers.items():
            before = clock()
            step = next(steps)
            seconds[kind].append(clock() - before)
            waited[kind].append(step.waited / step.seconds)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["contrastive"], strict=True)]
    return {
        "case": name, "batch": case["batch"], "evals": {kind: loss.build().evals(case["batch"]) for kind, loss in losses.items()},
        "images per second": {kind: case["batch"] / s for kind, s in median.items()}, "step ratio": statistics.median(ratios),
        "waiting for data": {kind: statistics.median(v) for kind, v in waited.items()}, "peak memory, MiB": memory,
    }  # fmt: skip


def _zip(folder: Path) -> str:
    """A thousand patches as PNGs, as EDM's archives are laid out."""
    path = folder / "patches.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for index, image in enumerate(patches(stride=48)[:1000].permute(0, 2, 3, 1).contiguous().numpy()):
            buffer = BytesIO()
            Image.fromarray(image).save(buffer, "PNG", compress_level=0)
            archive.writestr(f"00000/img{index:08d}.png", buffer.getvalue())
    return str(path)


def _clock(device: str) -> Callable[[], float]:
    if device == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def _memory(step: Callable[[], object], device: str) -> float:
    """Peak memory of a first step: of the device, or what the process grew to on a CPU (a lower bound after the first case)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':32} {'images/s plain':>15} {'contrastive':>12} {'step ratio':>11} {'waiting, plain':>15} {'contrastive':>12} {'peak MiB':>9}")
    for r in rows:
        speed, wait = r["images per second"], r["waiting for data"]
        line = f"{r['case']:32} {speed['plain']:15,.0f} {speed['contrastive']:12,.0f} {r['step ratio']:11.2f}"
        print(f"{line} {wait['plain']:15.2%} {wait['contrastive']:12.2%} {r['peak memory, MiB']['contrastive']:9,.0f}")


if __name__ == "__main__":
    main()
