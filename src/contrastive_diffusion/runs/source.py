"""What samples are drawn from: a run's network, a converted one, or a toy's exact denoiser, with the hash that says which it is."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from contrastive_diffusion.data.toys import TOYS
from contrastive_diffusion.denoisers import Denoiser
from contrastive_diffusion.errors import require
from contrastive_diffusion.runs.folder import Run
from contrastive_diffusion.runs.start import Weights, is_model_folder, load_trained, named_denoiser
from contrastive_diffusion.training import stream


@dataclass(frozen=True)
class Source:
    """Args:
    name: as it was given. sha256: of the checkpoint, or of the toy's parameters. weights: "ema", "raw", "unknown" (a file that does not say) or "exact".
    shape: S of a sample. label_dim: classes, 0 for none. denoiser: of one-hot labels (B, L), row i's for row i, or None.
    """

    name: str
    sha256: str
    weights: str
    shape: tuple[int, ...]
    label_dim: int
    denoiser: Callable[[Tensor | None], Denoiser]


def open_source(name: str, weights: Weights | None = None, device: str | torch.device = "cpu") -> Source:
    """The source called ``name``, its network on ``device``. ``weights``: which of a run (default "ema"); a model folder must have them."""
    if name in TOYS:
        law, shape = named_denoiser(name)
        digest = hashlib.sha256(b"".join(getattr(law, key).numpy().tobytes() for key in ("means", "stds", "log_weights")))
        return Source(name, digest.hexdigest(), "exact", shape, 0, lambda _: law)
    require(Path(name).exists(), f"{name!r}", f"a run folder, a model folder or one of {', '.join(TOYS)}")
    trained = load_trained(name, weights or "ema")
    trained.net.to(device)
    which, file = _checkpoint(Path(name), weights)
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256")
    return Source(name, digest.hexdigest(), which, trained.shape, trained.label_dim, trained.denoiser)


def _checkpoint(path: Path, weights: Weights | None) -> tuple[str, Path]:
    """Which weights are used, and their file."""
    if not is_model_folder(path):
        return weights or "ema", Run(path).checkpoints()[-1]
    from contrastive_diffusion.checkpoints.model import load_card

    found = load_card(path).weights
    require(
        weights in (None, found), f"--weights {weights} of {path}", f"{found}, the only ones in it", "convert the other file, or leave --weights out"
    )
    return found, path / "model.safetensors"


def labels_of(spec: str | None, ids: Tensor, seed: int, label_dim: int) -> Tensor | None:
    """Classes (n,) int64 of sample ``ids``, a function of (spec, seed, id) alone; None for none.

    Args:
        spec: "random" (uniform, what a network with classes gets by default), "balanced" (id modulo the classes), "none", a class, or classes "0,3,5"
            taken in turn.
    """
    if spec is None:
        spec = "random" if label_dim else "none"
    if spec == "none":
        return None
    require(label_dim, f"--label {spec}", "none: the network has no labels")
    if spec == "random":
        return torch.tensor([int(torch.randint(label_dim, (1,), generator=stream(seed, "label", i))) for i in ids.tolist()])
    if spec == "balanced":
        return ids % label_dim
    parts = spec.split(",")
    known = all(part.strip().isdigit() and int(part) < label_dim for part in parts)
    require(known, f"--label {spec}", f"random, balanced, none, or classes 0 .. {label_dim - 1} as in 0,3,5")
    return torch.tensor([int(part) for part in parts])[ids % len(parts)]
