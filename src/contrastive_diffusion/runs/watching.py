"""What a run is worth on the way: denoising errors over log-SNR, nll, ratio accuracy on held-out images, a grid of samples; and where scalars go."""

import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from contrastive_diffusion import schedules, solvers
from contrastive_diffusion.data.images import Images
from contrastive_diffusion.denoisers import Denoiser, noised
from contrastive_diffusion.errors import UsageError
from contrastive_diffusion.files import write_atomic
from contrastive_diffusion.likelihood import llr, mse_curve, nll
from contrastive_diffusion.recipes import Train
from contrastive_diffusion.runs.start import Start
from contrastive_diffusion.sampling import Sequential
from contrastive_diffusion.training import stream

LEVELS, ZETAS = (-8.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0), (0.0, 4.0, 8.0)
CHUNK = 512  # rows per call of an image network


def look(config: Train, begun: Start, net: nn.Module, folder: Path, step: int) -> dict[str, float]:
    """Validates ``net`` and draws samples; appends to validation.jsonl, writes samples/step-N.png, returns the scalars."""
    data = begun.held if begun.held is not None else begun.feed.data
    assert isinstance(data, Images)
    device = next(net.parameters()).device
    x, labels = data.all(config.watch.rows)
    denoiser = config.loss.bounded(net, *(() if labels is None else (labels.to(device), None)))
    found = validation(denoiser, x.to(device), config.watch.evals)
    with open(folder / "validation.jsonl", "a") as log:
        log.write(json.dumps({"step": step} | found) + "\n")
    if config.watch.samples:
        picture = samples(config, begun, net, device)
        write_atomic(folder / "samples" / f"step-{step:08d}.png", picture)
    flat = {"validation.nll": found["nll, nats per dimension"][0]}
    flat |= {f"validation.error at {level:g}": v[0] for level, v in zip(LEVELS, found["error per dimension"], strict=True)}
    return flat | {f"validation.accuracy at {zeta:g}": v[0] for zeta, v in zip(ZETAS, found["ratio accuracy"], strict=True)}


@torch.no_grad()
def validation(denoiser: Denoiser, x: Tensor, evals: int) -> dict[str, Any]:
    """Numbers (mean, standard error over rows) of a denoiser on x (N, *S); the same noise every time, so that steps can be compared.

    "ratio accuracy": share of rows for which the sign of the likelihood ratio tells data from data noised to zeta.
    """
    dim = x[0].numel()
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    errors = mse_curve(denoiser, x, levels, max(evals // len(LEVELS) // 4 * 4, 8) * len(LEVELS), stream(0, "validation errors")).mean / dim
    likelihood = nll(denoiser, x, evals, stream(0, "validation nll"), max_rows=CHUNK).mean / dim
    accuracy = []
    for zeta in ZETAS:
        noisy = torch.arange(len(x), device=x.device) % 2 == 1
        mixed = torch.where(noisy.reshape(-1, *[1] * (x.dim() - 1)), noised(x, zeta, stream(0, f"validation {zeta}")), x)
        ratio = llr(denoiser, mixed, zeta, evals, stream(0, f"validation ratio {zeta}"), max_rows=CHUNK).mean
        accuracy.append(_mean(((ratio > 0) == noisy).double()))
    return {
        "levels": list(LEVELS), "error per dimension": [_mean(e) for e in errors.T], "nll, nats per dimension": _mean(likelihood),
        "zetas": list(ZETAS), "ratio accuracy": accuracy,
    }  # fmt: skip


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")


def samples(config: Train, begun: Start, net: nn.Module, device: torch.device) -> bytes:
    """A PNG of DDIM samples with the same noise every time; of a conditional network, classes in turn."""
    n, dim = config.watch.samples, begun.label_dim
    labels = None if not dim else torch.eye(dim, device=device)[torch.arange(n) % dim]
    denoiser = config.loss.bounded(net, *(() if labels is None else (labels, None)))
    law = schedules.karras() if config.loss.denoising == "edm" else schedules.ddpm()
    drawn = Sequential(solvers.ddim(), max_rows=max(n, CHUNK))(denoiser, schedules.grid(law, config.watch.steps), (n, *begun.shape), 0, device=device)
    return tiled(drawn.x.cpu())


def tiled(x: Tensor, columns: int | None = None, zoom: int = 1) -> bytes:
    """Images x (N, C, H, W) in [-1, 1] as one PNG, ``columns`` wide (about square by default)."""
    columns = columns or max(1, round(len(x) ** 0.5))
    rows = -(-len(x) // columns)
    x = torch.cat([x, x.new_full((rows * columns - len(x), *x.shape[1:]), -1.0)])
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    picture = pixels.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    image = Image.fromarray((picture[..., 0] if picture.shape[-1] == 1 else picture).contiguous().numpy())
    buffer = io.BytesIO()
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


class Logger(AbstractContextManager, Protocol):
    """Takes scalars beside metrics.jsonl."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...


class NoLogger:
    """Keeps nothing."""

    def __enter__(self) -> "NoLogger":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def scalars(self, step: int, values: dict[str, float]) -> None:
        pass


class TensorBoard(NoLogger):
    """Event files in the run folder."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError("given no tensorboard, expected it for watch.logger; pip install 'contrastive-diffusion[tensorboard]'") from error
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def __exit__(self, *_: Any) -> None:
        self.writer.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


class Wandb(NoLogger):
    """Weights & Biases; offline unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UsageError("given no wandb, expected it for watch.logger; pip install 'contrastive-diffusion[wandb]'") from error
        import os

        os.environ.setdefault("WANDB_MODE", "offline")
        self.run = wandb.init(dir=str(folder), name=folder.name, id=folder.name, resume="allow")

    def __exit__(self, *_: Any) -> None:
        self.run.finish()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)


def open_logger(kind: str, folder: Path) -> Any:
    """The logger called ``kind``, as a context manager."""
    return LOGGERS[kind](folder)


LOGGERS: dict[str, Callable[[Path], Any]] = {"none": lambda _: NoLogger(), "tensorboard": TensorBoard, "wandb": Wandb}
