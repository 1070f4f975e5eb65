"""Parallel-in-time sampling against ParaDiGMS as it is in diffusers: same denoiser, same noise, one run. Targets beside what was measured.

Needs the extra: pip install 'contrastive-diffusion[diffusers]'. Errors are root mean squares of the final sample against the sequential one, of
the worst sample. Laws with exact denoisers; trained networks are in `cdl run parallel`.

python benchmarks/parallel.py [--quick] [--out benchmarks/results/parallel.json]
"""

import contextlib
import gc
import math
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _paradigms as theirs
import torch
import torch.distributed as dist
from _common import options, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_diffusion import solvers
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import RunError
from contrastive_diffusion.experiments._laws import LAWS, blobs64, ring
from contrastive_diffusion.parallel import Parallel
from contrastive_diffusion.sampling import START, Sequential, normal
from contrastive_diffusion.schedules import ddpm, grid
from contrastive_diffusion.solvers import SOLVERS

Row = dict[str, Any]


def rms(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().flatten(1).mean(1).sqrt().max())


def noise_of(seed: int, count: int, item: tuple[int, ...]) -> Callable[[int], Tensor]:
    ids = torch.arange(count)
    return lambda i: normal(seed, ids, torch.full((count,), i), item)


def stays_below(curve: list[float], bound: float) -> int:
    """The first round (from 1) after which the curve stays at or below the bound."""
    k = len(curve)
    while k and curve[k - 1] <= bound:
        k -= 1
    return k + 1


def row(target: str, case: str, ours: float, baseline: float | None, limit: str, met: bool, **more: Any) -> Row:
    return {
        "target": target,
        "case": case,
        "ours": ours,
        "diffusers": baseline,
        "ratio": ours / baseline if baseline else None,
        "limit": limit,
        "met": bool(met),
    } | more


def rounds_to_error(kind: str, steps: int, name: str, seeds: int) -> tuple[float, float, float]:
    """Rounds over the whole grid until the error stays below 1e-2, ours and theirs, and ours' worst final error."""
    make, item, count = LAWS[name]
    count = count if steps == 1000 else min(4 * count, 16 if item[0] > 2 else 32)
    made, solver, found = theirs.scheduler(kind, steps), solvers.ddpm() if kind == "ddpm" else solvers.ddim(), []
    for seed in range(seeds):
        denoiser, levels, noise = make(), theirs.grid(made), noise_of(seed, count, item)
        exact = Sequential(solver)(denoiser, levels, (count, *item), seed).x
        a: list[float] = []
        b: list[float] = []
        Parallel(solver, "secant", "all", 1e-4, fallback=False)(
            denoiser, levels, (count, *item), seed, watch=lambda s, a=a, x=exact: a.append(rms(s.states[-1], x))
        )
        theirs.sample(
            made,
            denoiser,
            noise(START),
            noise if kind == "ddpm" else None,
            steps,
            1e-4,
            watch=lambda _, s, b=b, x=exact: b.append(rms(s[-1], x)),
            most=60,
        )
        found.append((stays_below(a, 1e-2), stays_below(b, 1e-2), a[-1]))
    return statistics.mean(f[0] for f in found), statistics.mean(f[1] for f in found), max(f[2] for f in found)


def t1_t2(quick: bool) -> list[Row]:
    rows: list[Row] = []
    cases = [("T1", "ddpm", 1000, name) for name in LAWS] + [
        ("T2", "ddim", t, name) for t in (100, 250) for name in ("ring", "blobs64", "manifold64")
    ]
    for target, kind, steps, name in cases:
        if quick and (name == "manifold64" or steps == 250):
            continue
        a, b, error = rounds_to_error(kind, steps, name, 1 if quick else 3)
        limit = 0.45 if target == "T1" else 0.95
        rows.append(row(target, f"rounds, {kind.upper()}-{steps} {name}", a, b, f"<= {limit}", a <= limit * b, error=error))
    for target, limit in (("T1", 0.36), ("T2", 0.75)):
        ratios = [r["ratio"] for r in rows if r["target"] == target]
        mean = math.exp(statistics.mean(map(math.log, ratios)))
        rows.append(row(target, "rounds, geometric mean of the ratios", mean, None, f"<= {limit}", mean <= limit))
    return rows


def t3_t4(quick: bool) -> list[Row]:
    rows, made, denoiser, count = [], theirs.scheduler("ddpm", 1000), ring(), 64
    levels = theirs.grid(made)
    for window, t3, t4 in ((32, 0.65, 0.55), (64, 0.65, 0.55), (128, 0.65, 0.50), (1000, None, 0.20)):
        found = []
        for seed in range(1 if quick else 3):
            exact, noise = Sequential(solvers.ddpm())(denoiser, levels, (count, 2), seed).x, noise_of(seed, count, (2,))
            a = Parallel(solvers.ddpm(), window=window, tolerance=0.1)(denoiser, levels, (count, 2), seed, verify=True)
            b = theirs.sample(made, denoiser, noise(START), noise, window, 0.1)
            assert a.defect is not None
            found.append(
                (
                    a.rounds,
                    b.rounds,
                    float(a.sample_evals.sum()),
                    float(b.evals),
                    rms(a.x, exact),
                    rms(b.x, exact),
                    float(a.sample_rounds.double().mean()),
                    float(a.defect.max()),
                )
            )
        mean = [statistics.mean(f[k] for f in found) for k in range(8)]
        error, other = max(f[4] for f in found), max(f[5] for f in found)
        more = {"error": error, "diffusers error": other, "mean rounds of a sample": mean[6], "largest defect": max(f[7] for f in found)}
        if t3:
            rows.append(
                row(
                    "T3",
                    f"rounds, ring B=64, window {window}, tolerance 0.1",
                    mean[0],
                    mean[1],
                    f"<= {t3}",
                    mean[0] <= t3 * mean[1] and error <= 5e-3,
                    **more,
                )
            )
        rows.append(
            row(
                "T4",
                f"evaluations a step, window {window}",
                mean[2] / count / 1000,
                mean[3] / count / 1000,
                f"<= {t4}",
                mean[2] <= t4 * mean[3] and error <= 5e-3,
                **more,
            )
        )
    return rows


def t5(quick: bool) -> list[Row]:
    made, denoiser, count, steps = theirs.scheduler("ddpm", 1000), ring(), 4, 1000
    levels, noise = theirs.grid(made), noise_of(0, count, (2,))
    exact = Sequential(solvers.ddpm())(denoiser, levels, (count, 2), 0, path=True)
    a = Parallel(solvers.ddpm(), window=64, tolerance=0.0)(denoiser, levels, (count, 2), 0, path=True)
    b = theirs.sample(made, denoiser, noise(START), noise, 64, 0.0)
    assert exact.path is not None
    assert a.path is not None
    equal = a.path.equal(exact.path)
    return [row("T5", "rounds at tolerance 0, window 64, ring; whole path equal to the bit", a.rounds, b.rounds, "<= 0.35, equal", equal and a.rounds <= 0.35 * b.rounds,
                equal=equal, evals=a.evals / count / steps, **{"diffusers equal": b.path.equal(exact.path)})]  # fmt: skip


def t6(quick: bool) -> list[Row]:
    made, denoiser, count = theirs.scheduler("ddpm", 1000), blobs64(), 6
    levels, noise = theirs.grid(made), noise_of(0, count, (64,))
    options = {"window": 64, "tolerance": 1e-3}
    full, half = (Parallel(solvers.ddpm(), precision=p, **options)(denoiser, levels, (count, 64), 0) for p in (None, torch.float16))
    their_full = theirs.sample(made, denoiser, noise(START), noise, 64, 1e-3)
    their_half = theirs.sample(made, denoiser, noise(START), noise, 64, 1e-3, dtype=torch.float16)
    ours, other = half.rounds / full.rounds, their_half.rounds / their_full.rounds
    return [row("T6", "rounds in float16 over rounds in float32, blobs64, tolerance 1e-3", ours, other, "own ratio <= 1.25", ours <= 1.25,
                rounds=[full.rounds, half.rounds], **{"diffusers rounds": [their_full.rounds, their_half.rounds]})]  # fmt: skip


class Churn:
    """A model that costs nothing: half of the window settles in a round, the rest flickers, so frontiers move as they do in earnest."""

    def __init__(self, rows: int, item: tuple[int, ...]):
        generator = torch.Generator().manual_seed(0)
        self.still, self.moving = torch.randn(2, rows, *item, generator=generator)
        self.calls, self.times = 0, []

    def __call__(self, z: Tensor, logsnr: Tensor) -> Tensor:
        self.times.append(time.process_time())
        self.calls += 1
        out, half = self.still[: len(z)], len(z) // 2
        out[half:] = self.moving[half : len(z)] * (1 if self.calls % 2 else -1)
        return out


def t7(quick: bool) -> list[Row]:
    rows = []
    for window, count, numel, limit in ((64, 16, 3072, 0.6), (64, 1, 3072, 0.5), (32, 1, 16384, 0.5), (1000, 64, 2, 4.0)):
        steps, most = (1000, 24) if window < 1000 else (1000, 20)
        if quick and count * numel > 16384:
            continue
        made, times = theirs.scheduler("ddpm", steps), {}
        levels, free = theirs.grid(made), torch.zeros(count, numel)
        for who in ("ours", "diffusers"):
            model = Churn(window * count, (numel,))
            if who == "ours":
                # Without noise, which both samplers draw and neither counts here: diffusers before its loop, ours as windows move on.
                _rounds(Parallel(solvers.ddim(), window=window, tolerance=0.05, fallback=False, max_rows=10**6), model, levels, (count, numel), most)
            else:
                theirs.sample(made, model, free, lambda i, free=free: free, window, 0.05, most=most)
            gaps = [b - a for a, b in zip(model.times, model.times[1:], strict=False)]
            times[who] = statistics.median(gaps)
        ours, other = times["ours"] * 1e3, times["diffusers"] * 1e3
        rows.append(row("T7", f"update of a round, ms, window {window}, B={count}, D={numel}", ours, other, f"<= {limit}", ours <= limit * other))
    return rows


class _Enough(Exception):
    pass


def _rounds(sampler: Parallel, model: Churn, levels: Tensor, shape: tuple[int, ...], most: int) -> None:
    def stopping(z: Tensor, logsnr: Tensor) -> Tensor:
        if model.calls == most:
            raise _Enough
        return model(z, logsnr)

    with contextlib.suppress(_Enough):
        sampler(stopping, levels, shape)


def _peak(who: str, steps: int, window: int, count: int, numel: int, queue: Any) -> None:
    """Growth of the peak resident size of this process while the sampler runs a few rounds, bytes."""
    torch.set_num_threads(1)
    made, levels = theirs.scheduler("ddpm", min(steps, 1000)), grid(ddpm(max(steps, 2)), steps)
    if steps > 1000:
        made.config["num_train_timesteps"] = steps
    model, start = Churn(window * count, (numel,)), torch.randn(count, numel)
    warm = Churn(8, (4,))
    _rounds(Parallel(solvers.ddpm(), window=4), warm, levels, (2, 4), 3)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _resident()
    if who == "ours":
        _rounds(Parallel(solvers.ddpm(), window=window, fallback=False), model, levels, (count, numel), 6)
    else:
        theirs.sample(made, model, start, lambda i: torch.randn(count, numel), window, 0.05, most=6)
    queue.put((_resident() - before) * 1024)


def _resident() -> int:
    """The peak resident size, KiB (Linux)."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def peak(who: str, steps: int, window: int = 64, count: int = 16, numel: int = 3072) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(who, steps, window, count, numel, queue))
    process.start()
    found = queue.get()
    process.join()
    return found / 2**20


def t8(quick: bool) -> list[Row]:
    ours, other = peak("ours", 1000), peak("diffusers", 1000)
    rows = [row("T8", "peak memory, MiB, T=1000, B=16, D=3072, window 64", ours, other, "<= 0.25", ours <= 0.25 * other)]
    if not quick:
        lengths = {steps: peak("ours", steps) for steps in (250, 4000)} | {1000: ours}
        spread = max(lengths.values()) / min(lengths.values())
        rows.append(row("T8", "largest over smallest, T = 250, 1000, 4000", spread, None, "<= 1.05", spread <= 1.05, peaks=lengths))
    return rows


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count, self.syncs = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self.syncs += any(word in func.__name__ for word in ("_local_scalar_dense", "nonzero"))
        return func(*args, **(kwargs or {}))


def t9_t10(quick: bool) -> list[Row]:
    """Operations and time before the first call of the model, and host-device synchronisations between two calls of it."""
    made, count, numel, found = theirs.scheduler("ddpm", 1000), 16, 3072, {}
    levels, noise = theirs.grid(made), torch.zeros(count, numel)
    for who in ("ours", "diffusers"):
        model, seen, mode = Churn(64 * count, (numel,)), [], _Ops()

        def watched(z: Tensor, logsnr: Tensor, model: Churn = model, seen: list = seen, mode: _Ops = mode) -> Tensor:
            seen.append((mode.count, mode.syncs))
            if len(seen) == 8:
                raise _Enough
            return model(z, logsnr)

        seconds = []
        for counting in (False, True):
            seen.clear()
            start = time.process_time()
            run = (lambda: Parallel(solvers.ddpm(), window=64)(watched, levels, (count, numel))) if who == "ours" else (
                lambda: theirs.sample(made, watched, noise, lambda i: torch.randn(count, numel), 64, 0.05))  # fmt: skip
            first = model.times.__len__()
            with contextlib.suppress(_Enough), mode if counting else contextlib.nullcontext():
                run()
            seconds.append(model.times[first] - start)
        found[who] = seen[0][0], seconds[0] * 1e3, (seen[-1][1] - seen[0][1]) / 7
    a, b = found["ours"], found["diffusers"]
    return [
        row("T9", "operations before the first call of the model, T=1000", a[0], b[0], "<= 0.01", a[0] <= 0.01 * b[0]),
        row("T9", "ms before it, noise of the first window (ours) or of all steps (theirs) included", a[1], b[1], "<= 0.1", a[1] <= 0.1 * b[1]),
        row("T10", "blocking synchronisations a round", a[2], b[2], "0", a[2] == 0),
    ]


def t11_t12(quick: bool) -> list[Row]:
    levels, law = grid(ddpm(), 200), ring()
    whole = Parallel(solvers.ddpm(), window=16, tolerance=0.0)(law, levels, (64, 2), 3).x
    alike = all(
        Parallel(solvers.ddpm(), window=w, tolerance=0.0)(law, levels, (1, 2), 3, first=k).x.equal(whole[k : k + 1])
        for w in (16, 64)
        for k in (0, 17, 63)
    )
    ranks = bool(_in_processes(2, "invariance")["equal"])
    rows = [row("T11", "same bits: batch 1 and 64, window 16 and 64, 1 and 2 processes", float(alike and ranks), None, "equal", alike and ranks)]
    spaced = {"leading": torch.arange(980, -1, -20), "trailing": torch.arange(999, 0, -33), "linspace": torch.linspace(999, 0, 30).round().long()}
    cases = {name: make() for name, make in SOLVERS.items() if not make().alone} | {
        "ddpm-beta": solvers.ddpm("beta"),
        "ddim-0.5": solvers.ddim(0.5),
        "ddim-1": solvers.ddim(1.0),
    }
    for name, solver in cases.items():
        equal = []
        for times in spaced.values():
            levels = torch.cat([theirs.TABLE[times], torch.tensor([math.inf], dtype=torch.float64)])
            exact = Sequential(solver)(law, levels, (3, 2), 0)
            equal.append(Parallel(solver, window=9, tolerance=0.0)(law, levels, (3, 2), 0).x.equal(exact.x))
        rows.append(row("T12", f"{name}: parallel equals sequential on {', '.join(spaced)}", float(all(equal)), None, "equal", all(equal)))
    return rows


def _worker(rank: int, size: int, port: int, what: str, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo")
    levels, group, law = grid(ddpm(), 200), dist.group.WORLD, ring()
    if what == "invariance":
        shared = Parallel(solvers.ddpm(), window=16, tolerance=0.0, group=group)(law, levels, (6, 2), 3).x
        queue.put({"equal": shared.equal(Sequential(solvers.ddpm())(law, levels, (6, 2), 3).x)})
    else:
        rows: list[int] = []

        def slow(z: Tensor, logsnr: Tensor) -> Tensor:
            rows.append(len(z))
            time.sleep(1e-3 * len(z))
            return law(z, logsnr)

        sampler = Parallel(solvers.ddpm(), window=32, group=group)
        dist.barrier()
        drawn = sampler(slow, levels, (8, 2), 3)
        queue.put({"rank": rank, "rows": rows, "seconds": drawn.seconds, "evals": drawn.evals})
    dist.barrier()
    dist.destroy_process_group()


def _in_processes(size: int, what: str) -> dict[str, Any]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    running = [context.Process(target=_worker, args=(rank, size, port, what, queue)) for rank in range(size)]
    for process in running:
        process.start()
    answers = [queue.get(timeout=120) for _ in running]
    for process in running:
        process.join()
    if what == "invariance":
        return {"equal": all(a["equal"] for a in answers)}
    return {"rows": [a["rows"] for a in answers], "seconds": max(a["seconds"] for a in answers), "evals": answers[0]["evals"]}


def t13(quick: bool) -> list[Row]:
    found = _in_processes(2, "sleep")
    ideal, apart = found["evals"] * 1e-3 / 2, max(abs(a - b) for a, b in zip(*found["rows"], strict=True))
    ratio = found["seconds"] / ideal
    return [
        row(
            "T13",
            "wall time over ideal, 2 gloo processes, a model of 1 ms a row",
            ratio,
            None,
            "<= 1.15, rows differ by <= 1",
            ratio <= 1.15 and apart <= 1,
            rows_apart=apart,
        )
    ]


def t14(quick: bool) -> list[Row]:
    def broken(z: Tensor, logsnr: Tensor) -> Tensor:
        return torch.where((logsnr > 3)[:, None] & (z > 0), math.nan, ring()(z, logsnr))

    said = ""
    try:
        Parallel(solvers.ddpm())(broken, grid(ddpm(), 200), (4, 2))
    except RunError as error:
        said = str(error)
    chaos: Denoiser = lambda z, logsnr: torch.sin(1e4 * z)  # noqa: E731
    made, window = theirs.scheduler("ddim", 1000), 64
    drawn = Parallel(solvers.ddim(), window=window)(chaos, theirs.grid(made), (4, 2))
    other = theirs.sample(made, chaos, noise_of(0, 4, (2,))(START), None, window, 0.05)
    bound = 1.2 * 1000 + 20 * window
    worst = int(drawn.sample_evals.max())
    return [
        row(
            "T14", "a NaN stops with sample, step and round", float("sample" in said and "step" in said), None, "raises", "sample" in said, said=said
        ),
        row("T14", "evaluations of a chaotic map, T=1000, window 64", worst, other.evals / 4, f"<= 1.2 T + 20 windows = {bound:.0f}", worst <= bound),
    ]


SECTIONS = {"T1 T2": t1_t2, "T3 T4": t3_t4, "T5": t5, "T6": t6, "T7": t7, "T8": t8, "T9 T10": t9_t10, "T11 T12": t11_t12, "T13": t13, "T14": t14}


def main() -> None:
    parser = options(__doc__, "one seed, fewer cases")
    parser.add_argument("--only", default="", help="sections whose name contains this, e.g. T7")
    chosen = parser.parse_args()
    rows: list[Row] = []
    print(f"{'':<5}{'':<76}{'ours':>10}{'diffusers':>11}{'ratio':>8}  target")
    for name, section in SECTIONS.items():
        if chosen.only not in name:
            continue
        for r in section(chosen.quick):
            rows.append(r)
            numbers = [("" if v is None else f"{v:.4g}") for v in (r["ours"], r["diffusers"], r["ratio"])]
            print(
                f"{r['target']:<5}{r['case']:<76}{numbers[0]:>10}{numbers[1]:>11}{numbers[2]:>8}  {r['limit']} {'met' if r['met'] else 'MISSED'}",
                flush=True,
            )
    write(chosen.out, {"rows": rows})


if __name__ == "__main__":
    main()
