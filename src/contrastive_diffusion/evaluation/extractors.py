"""Feature extractors: pixels, the bundled classifier of digits, and modules a user brings, each with an id that names its exact weights.

An extractor takes images as bytes (n, C, H, W) uint8, or vectors (n, D) float, and gives features (n, d) float32. The Frechet distance of
features is called FID for Inception-2015's 2,048 alone, whose file is known by its sha256.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from contrastive_diffusion.errors import UsageError, choose, require
from contrastive_diffusion.evaluation.classifier import FILE, load_classifier
from contrastive_diffusion.evaluation.torchscript import file_hash, load_torchscript

# The TorchScript port of the 2015-12-05 graph that StyleGAN2-ADA and clean-fid use: RGB bytes of any size, which it resizes itself.
INCEPTION = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
# pytorch-fid's conversion of the same graph (pt_inception-2015-12-05-6726825d.pth): weights without a network.
INCEPTION_WEIGHTS = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True)
class Extractor:
    """``id`` names the weights; ``frechet`` is what the distance of its features is called; ``takes`` describes the input it expects."""

    id: str
    call: Callable[[Tensor], Tensor]
    frechet: str = "Frechet distance"
    takes: str = "images or vectors"

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Features (n, d) float32 of x. Raises ``UsageError`` unless there is one finite row for each sample."""
        try:
            found = self.call(x)
        except RuntimeError as error:
            what = f"samples of shape {tuple(x.shape[1:])} for extractor {self.id}"
            raise UsageError(f"given {what}, expected {self.takes}: {' '.join(str(error).split())[:160]}") from error
        ok = isinstance(found, Tensor) and found.dim() == 2 and len(found) == len(x)
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        require(ok, f"extractor {self.id} with features {shape} of {len(x)} samples", "(n, d), one row for each")
        broken = (~found.isfinite().all(1)).nonzero().flatten()
        require(
            not len(broken),
            f"features of extractor {self.id} that are not finite, first in row {int(broken[0]) if len(broken) else 0} of a batch",
            "finite ones",
        )
        return found.float().cpu()


def pixels(device: str) -> Extractor:
    """Values themselves: bytes b as b / 127.5 - 1, vectors as they are."""
    return Extractor("pixels", lambda x: (x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x).flatten(1))


def digits(device: str) -> Extractor:
    """The 32 features of the bundled classifier of digits."""
    return _classifier(FILE, device, "digits")


def _classifier(path: Path, device: str, name: str) -> Extractor:
    net, meta = load_classifier(path)
    net, shape = net.to(device), (meta["channels"], meta["resolution"], meta["resolution"])

    def call(x: Tensor) -> Tensor:
        require(
            tuple(x.shape[1:]) == shape and x.dtype == torch.uint8, f"samples of shape {tuple(x.shape[1:])} for extractor {name}", f"images {shape}"
        )
        return net.features(x.to(device).float() / 127.5 - 1)

    return Extractor(f"{name}-{file_hash(path)[:12]}", call, takes=f"images {shape}")


def torchscript(path: Path, device: str) -> Extractor:
    """A TorchScript module: given float32 0 .. 255 (n, C, H, W), or vectors, and nothing scaled or resized for it. Inception's file is known."""
    digest = file_hash(path) if path.is_file() else ""
    require(
        digest != INCEPTION_WEIGHTS, f"{path}, which holds pytorch-fid's weights without a network", "its TorchScript form, inception-2015-12-05.pt"
    )
    module = load_torchscript(path).to(device)
    if digest == INCEPTION:
        return Extractor("inception-2015-12-05", lambda x: module(_rgb(x).to(device), return_features=True), "FID", "images")
    return Extractor(f"torchscript-{digest[:12]}", lambda x: module(x.to(device).float()))


def _rgb(x: Tensor) -> Tensor:
    require(x.dtype == torch.uint8 and x.dim() == 4, f"samples of shape {tuple(x.shape[1:])} for Inception", "images")
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


EXTRACTORS: dict[str, Callable[[str], Extractor]] = {"digits": digits, "pixels": pixels}


def extractor(name: str, device: str = "cpu") -> Extractor:
    """The extractor called ``name``: one of EXTRACTORS, ``torchscript:FILE``, or ``safetensors:FILE``, a classifier of the bundled kind."""
    kind, _, path = name.partition(":")
    if path and kind in ("torchscript", "safetensors"):
        require(Path(path).is_file(), f"extractor {path}", "an existing file")
        return torchscript(Path(path), device) if kind == "torchscript" else _classifier(Path(path), device, "classifier")
    require(not path and not Path(name).is_file(), f"extractor {name!r}", "a name, torchscript:FILE or safetensors:FILE")
    return EXTRACTORS[choose(name, EXTRACTORS, "extractor")](device)
