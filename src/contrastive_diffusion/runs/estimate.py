"""Estimates for named points: what ``cdl estimate`` prints. Points come from arrays, images, folders of images, or the source's own data."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrastive_diffusion.data.images import open_images
from contrastive_diffusion.denoisers import check_data, check_denoiser, noised
from contrastive_diffusion.errors import require
from contrastive_diffusion.likelihood import Estimate, credible_interval, discrete_nll, llr, nll, noise_posterior
from contrastive_diffusion.recipes import load_array, load_data
from contrastive_diffusion.runs.folder import Run
from contrastive_diffusion.runs.start import named_denoiser
from contrastive_diffusion.training import stream

NOISED = 10.0  # beyond it nothing on the variance-preserving channel of data in [-1, 1] lies

Table = tuple[list[str], list[list[float]], list[str], list[dict[str, Any]]]


@torch.no_grad()
def estimate(options: Any) -> Table:
    """Names of the points, their rows of numbers, the names of the columns, and what else is known of each point."""
    denoiser, shape = named_denoiser(options.source)
    x, names = points(options, denoiser, shape)
    if options.corrupt is not None:
        x = noised(x, options.corrupt, stream(options.seed, "corrupt"))
    if options.check:
        check_denoiser(denoiser, x, stream(options.seed, "check"))
    generator = stream(options.seed, options.what)
    if options.what == "noise":
        return names, *_noise(options, denoiser, x, generator)
    exact = getattr(denoiser, options.what, None)
    if options.what == "llr":
        result = llr(denoiser, x, options.zeta, options.evals, generator)
        truth = exact(x, options.zeta) if exact else None
    else:
        result = _nll(options, denoiser, x, generator)
        truth = exact(x) if exact and options.likelihood == "continuous" else None
    columns, header = [result.mean, result.stderr], [f"{options.what}, nats", "standard error"]
    if options.what == "nll" and len(shape) == 3:
        columns.append(result.mean / (math.prod(shape) * math.log(2)))
        header.append("bits per dim")
    if truth is not None:
        columns.append(truth)
        header.append("exact")
    return names, torch.stack(columns, 1).tolist(), header, [{} for _ in names]


def _nll(options: Any, denoiser: Any, x: Tensor, generator: torch.Generator) -> Estimate:
    if options.likelihood == "continuous":
        return nll(denoiser, x, options.evals, generator)
    require(x.dim() == 4, f"--likelihood {options.likelihood} of points of shape {tuple(x.shape[1:])}", "images, which lie on a grid")
    return discrete_nll(denoiser, x, options.evals, generator, method=options.likelihood)


def _noise(options: Any, denoiser: Any, x: Tensor, generator: torch.Generator) -> tuple[list[list[float]], list[str], list[dict[str, Any]]]:
    """The most likely level with its credible interval, and the whole posterior as what else is known."""
    levels = torch.tensor(options.logsnrs, dtype=torch.float64)
    require(len(levels) >= 2, f"--logsnrs {options.logsnrs}", "at least two candidate levels")
    posterior = noise_posterior(denoiser, x, levels, options.evals, generator)
    low, high = credible_interval(posterior, levels, options.mass)
    best = levels[posterior.argmax(1)]
    sigma = torch.exp(-0.5 * best)  # noise std in units of the clean signal
    rows = torch.stack([best, low, high, sigma, posterior.exp().amax(1)], 1).tolist()
    header = ["log-SNR", f"from ({options.mass:.0%})", "to", "sigma / signal", "P(most likely)"]
    return rows, header, [{"posterior": dict(zip(map(str, options.logsnrs), row, strict=True))} for row in posterior.exp().tolist()]


def points(options: Any, denoiser: Any, shape: tuple[int, ...]) -> tuple[Tensor, list[str]]:
    """Points (n, *S) and what to call them."""
    vectors = options.x is not None and options.x.endswith((".npy", ".csv", ".txt")) and len(shape) == 1
    if options.x is None:
        data = options.source if hasattr(denoiser, "log_prob") else Run(Path(options.source)).recipe()["data"]
        x = (open_images(data, channels=shape[0], resolution=shape[1]) if len(shape) == 3 else load_data(data)).sample(
            options.n, stream(options.seed, "points")
        )
        names = []
    elif vectors:
        x, names = load_array(Path(options.x))[: options.n], []
    else:
        require(len(shape) == 3, f"images {options.x} for a network of vectors", f"a .npy or .csv file (N, {shape[0]})")
        array = load_array(Path(options.x)) if options.x.endswith(".npy") else None
        if array is not None and _floats(options.x):
            x, names = check_data(array[: options.n], options.x), []
            _in_range(x, options)
        else:
            images = open_images(options.x, channels=shape[0])
            x, _ = images.all(options.n)
            names = [Path(images.source.name(i)).name for i in range(len(x))]
    require(x.shape[1:] == shape, f"points of shape {tuple(x.shape)}", f"(N, {', '.join(map(str, shape))}), as {options.source} was trained on")
    return x, names or [_shown(row) for row in x]


def _floats(path: str) -> bool:
    import numpy as np

    return np.load(path, mmap_mode="r", allow_pickle=False).dtype.kind == "f"


def _in_range(x: Tensor, options: Any) -> None:
    most = NOISED if options.what == "noise" else 1.0 + 1e-6
    wanted = "images in [-1, 1]" + (" or noised ones" if options.what == "noise" else "")
    require(
        float(x.abs().max()) <= most,
        f"{options.x} with values from {float(x.min()):.3g} to {float(x.max()):.3g}",
        wanted,
        "scale bytes by v / 127.5 - 1",
    )


def _shown(row: Tensor) -> str:
    values = row.flatten()[:3].tolist()
    return "(" + ", ".join(f"{v:.3g}" for v in values) + (", ..." if row.numel() > 3 else "") + ")"
