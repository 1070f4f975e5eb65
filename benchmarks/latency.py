"""Seconds for one batch: sequential against parallel in time, for a U-Net of the size of EDM's CIFAR-10 network (55.9 million parameters; that one has 55.7).

Written for a GPU; on a CPU it runs at a toy size, to know that it works. Random weights with a conditioned output: the network's last layer is
scaled so that its v prediction is small, which makes the denoiser near that of standard normal data plus a smooth error, a well-posed path without training.

python benchmarks/latency.py [--toy] [--batch 1 4 16] [--dtype bf16 fp32] [--graphs] [--out benchmarks/results/latency.json]
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from _common import options, write
from torch import Tensor, nn
from torch.nn.functional import silu

from contrastive_diffusion import solvers
from contrastive_diffusion.channel import noise, per_row, signal
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.parallel import Parallel
from contrastive_diffusion.sampling import Sequential
from contrastive_diffusion.schedules import ddpm, grid

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, level: int, heads: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(min(32, inputs // 4), inputs), nn.GroupNorm(min(32, outputs // 4), outputs)])
        self.level, self.skip = nn.Linear(level, outputs), nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = nn.MultiheadAttention(outputs, heads, batch_first=True) if heads else None

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.first(silu(self.norms[0](x))) + self.level(level)[:, :, None, None]
        x = self.skip(x) + self.second(silu(self.norms[1](h)))
        if self.attention is not None:
            tokens = x.flatten(2).mT
            x = x + self.attention(tokens, tokens, tokens, need_weights=False)[0].mT.reshape(x.shape)
        return x


class UNet(nn.Module):
    """A residual U-Net with attention at the second resolution; eps_hat = noise z + signal v with a small v."""

    frequencies: Tensor

    def __init__(self, width: int, multiples: tuple[int, ...], blocks: int):
        super().__init__()
        level, size = 4 * width, [width * m for m in multiples]
        self.register_buffer("frequencies", torch.logspace(-4, 1, width // 2, base=2.0))
        self.embed = nn.Sequential(nn.Linear(width, level), nn.SiLU(), nn.Linear(level, level), nn.SiLU())
        self.inner, self.down, self.up, self.blocks = nn.Conv2d(3, width, 3, padding=1), nn.ModuleList(), nn.ModuleList(), blocks
        last, skips = width, [width]
        for r, channels in enumerate(size):
            for _ in range(blocks):
                self.down.append(Block(last, channels, level, heads=channels // 64 if r == 1 and channels >= 64 else 0))
                last = channels
                skips.append(last)
        for channels in reversed(size):
            for _ in range(blocks):
                self.up.append(Block(last + skips.pop(), channels, level, 0))
                last = channels
        self.norm, self.outer = nn.GroupNorm(min(32, last // 4), last), nn.Conv2d(last, 3, 3, padding=1)
        with torch.no_grad():
            self.outer.weight *= 0.3

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        angle = logsnr.float()[:, None] * self.frequencies.to(torch.float32)
        level = self.embed(torch.cat([angle.sin(), angle.cos()], 1).to(z.dtype))
        h, held = self.inner(z), []
        for k, block in enumerate(self.down):
            if k and k % self.blocks == 0:
                h = nn.functional.avg_pool2d(h, 2)
            h = block(h, level)
            held.append(h)
        for k, block in enumerate(self.up):
            if k and k % self.blocks == 0:
                h = nn.functional.interpolate(h, scale_factor=2.0)
            h = block(_joined(h, held, block), level)
        v = self.outer(silu(self.norm(h)))
        scale = logsnr.double()
        return per_row(noise(scale), z) * z + per_row(signal(scale), z) * v


def _joined(h: Tensor, held: list[Tensor], block: Any) -> Tensor:
    """The next skip, or the part of it that the block has room for."""
    return torch.cat([h, held.pop()[:, : block.first.in_channels - h.shape[1]]], 1)


class Graphed:
    """A denoiser captured as a CUDA graph for each number of rows it is called with (``static_rows`` keeps that at one)."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.graphs = denoiser, {}

    def __call__(self, z: Tensor, logsnr: Tensor) -> Tensor:
        if len(z) not in self.graphs:
            self.graphs[len(z)] = self._capture(z, logsnr)
        graph, inputs, out = self.graphs[len(z)]
        for held, value in zip(inputs, (z, logsnr), strict=True):
            held.copy_(value)
        graph.replay()
        return out.clone()

    def _capture(self, z: Tensor, logsnr: Tensor) -> tuple[Any, tuple[Tensor, Tensor], Tensor]:
        inputs, side = (z.clone(), logsnr.clone()), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.denoiser(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.denoiser(*inputs)
        return graph, inputs, out


class Timed:
    """Time the device spends in the denoiser: CUDA events, or wall time on a CPU."""

    def __init__(self, denoiser: Denoiser, cuda: bool):
        self.denoiser, self.cuda, self.rows, self.calls, self.spans = denoiser, cuda, 0, 0, []

    def __call__(self, z: Tensor, logsnr: Tensor) -> Tensor:
        self.rows, self.calls = self.rows + len(z), self.calls + 1
        begin, end = _mark(self.cuda), None
        out = self.denoiser(z, logsnr)
        end = _mark(self.cuda)
        self.spans.append((begin, end))
        return out

    def busy(self) -> float:
        return sum(a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in self.spans)


def _mark(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure(sampler: Callable[..., Any], denoiser: Denoiser, levels: Tensor, shape: tuple[int, ...], device: str, repeats: int) -> dict[str, Any]:
    """The median of ``repeats`` runs after one to warm up."""
    cuda, found = device.startswith("cuda"), []
    for k in range(repeats + 1):
        timed = Timed(denoiser, cuda)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        drawn = sampler(timed, levels, shape, 0, device=device)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if k or repeats == 0:
            found.append({"seconds": seconds, "rounds": drawn.rounds, "evals": drawn.evals / shape[0], "rows per round": timed.rows / timed.calls,
                          "busy": timed.busy() / seconds, "x": drawn.x})  # fmt: skip
    return sorted(found, key=lambda f: f["seconds"])[len(found) // 2]


def main() -> None:
    parser = options(__doc__, quick=None)
    parser.add_argument("--toy", action="store_true", help="a small network and short grids (always on a CPU)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--window", type=int, default=0, help="0: 64 at batch 1, 32 at 4, 16 at 16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--graphs", action="store_true", help="capture the network as CUDA graphs, in the sequential sampler too")
    chosen = parser.parse_args()
    cuda = torch.cuda.is_available()
    toy, device = chosen.toy or not cuda, "cuda" if cuda else "cpu"
    torch.manual_seed(0)
    net = (UNet(16, (1, 2), 1) if toy else UNet(128, (2, 3, 3), 3)).to(device).eval().requires_grad_(False)
    size, rows = (8 if toy else 32), []
    count = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{count:.1f} million parameters on {torch.cuda.get_device_name() if cuda else 'a CPU'}")
    print(f"{'':<34}{'seconds':>9}{'speed-up':>9}{'rounds':>8}{'evals':>8}{'rows/round':>11}{'busy':>6}{'error':>9}")
    for dtype in chosen.dtype:
        casted = net.to(DTYPES[dtype])
        denoiser: Denoiser = Graphed(casted) if chosen.graphs and cuda else casted
        for kind, steps in (("ddpm", 100), ("ddim", 50)) if toy else (("ddpm", 1000), ("ddim", 100)):
            solver = solvers.ddpm() if kind == "ddpm" else solvers.ddim()
            for batch in chosen.batch[:1] if toy else chosen.batch:
                window = min(chosen.window or {1: 64, 4: 32}.get(batch, 16), steps)
                base = {"window": window, "precision": DTYPES[dtype], "static_rows": chosen.graphs}
                samplers = {
                    "sequential": lambda d, *a, s=solver, t=dtype, **k: Sequential(s)(_cast(d, DTYPES[t]), *a, **k),
                    "picard": Parallel(solver, "picard", **base),
                    "secant": Parallel(solver, **base),
                }
                first = None
                for name, sampler in samplers.items():
                    found = measure(sampler, denoiser, grid(ddpm(), steps), (batch, 3, size, size), device, chosen.repeats if cuda else 1)
                    x = found.pop("x")
                    first = (found["seconds"], x) if first is None else first
                    found |= {"speed-up": first[0] / found["seconds"], "error": float((x - first[1]).square().flatten(1).mean(1).sqrt().max())}
                    rows.append({"dtype": dtype, "solver": f"{kind}-{steps}", "batch": batch, "sampler": name, "window": window} | found)
                    label = f"{dtype} {kind}-{steps} batch {batch} {name}"
                    print(f"{label:<34}{found['seconds']:>9.3f}{found['speed-up']:>9.2f}{found['rounds']:>8}{found['evals']:>8.0f}{found['rows per round']:>11.1f}"
                          f"{found['busy']:>6.2f}{found['error']:>9.2g}", flush=True)  # fmt: skip
    write(chosen.out, {"rows": rows}, parameters=count * 1e6, toy=toy)


def _cast(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    return lambda z, logsnr: denoiser(z.to(dtype), logsnr.to(dtype)).to(z.dtype)


if __name__ == "__main__":
    main()
