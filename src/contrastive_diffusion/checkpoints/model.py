"""A network with what is needed to use it: ``Model.from_pretrained(folder or hub id)``, ``save_pretrained``, ``push_to_hub``.

A model is a denoiser itself (without labels), and ``denoiser(class_labels)`` is one with them. On disk: ``model.safetensors`` with the
network's own tensor names, and ``config.json`` with the architecture, the trusted log-SNRs, the origin and the licence.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from contrastive_diffusion.denoisers import Bounded, of_network
from contrastive_diffusion.errors import UsageError, require
from contrastive_diffusion.files import write_atomic
from contrastive_diffusion.nets.spec import ImageNet

FORMAT = "contrastive-diffusion-model"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model is.

    Args:
        net: its architecture. levels: log-SNRs (nats) between which it is trusted; beyond them it is continued (``denoisers.Bounded``).
        weights: "ema", "raw" or "unknown". licence: of the weights. source: where they come from (file, SHA-256, kind).
    """

    net: ImageNet
    levels: tuple[float, float]
    weights: str
    licence: str
    source: Mapping[str, Any]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {"format": FORMAT, "version": VERSION} | json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def of(values: Mapping[str, Any], where: str) -> "Card":
        """The inverse of ``plain``; ``where`` names the file in errors."""
        given = f"{where} of format {values.get('format')!r}, version {values.get('version')!r}"
        todo = "convert foreign checkpoints with cdl convert"
        require((values.get("format"), values.get("version")) == (FORMAT, VERSION), given, f"format {FORMAT!r}, version {VERSION}", todo)
        try:
            low, high = values["levels"]
            return Card(ImageNet.of(values["net"]), (low, high), values["weights"], values["licence"], values["source"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"given {where}, expected a whole model card: {error}") from error


class Model(nn.Module, PyTorchModelHubMixin, library_name="contrastive-diffusion", tags=["diffusion"]):
    """A network ``net`` with its ``card``; called as a denoiser, ``model(z, logsnr) -> eps_hat``."""

    def __init__(self, card: Card, net: nn.Module | None = None):
        super().__init__()
        self.card = card
        self.net = card.net.build() if net is None else net
        self._hub_mixin_config = card.plain()  # what the mixin writes as config.json

    @property
    def finest(self) -> float:
        return self.card.levels[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.card.net.shape

    def denoiser(self, class_labels: Tensor | None = None, augment_labels: Tensor | None = None) -> Bounded:
        """The denoiser given one-hot ``class_labels`` (1, L) or (B, L); without them that of all classes together, as far as it was trained so."""
        return Bounded(of_network(self.net, class_labels, augment_labels), *self.card.levels)

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        return self.denoiser()(z, logsnr)

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {k: v.detach().contiguous().cpu() for k, v in self.net.state_dict().items()}
        write_atomic(Path(save_directory) / "model.safetensors", serialise(tensors, {"format": "pt", "config": json.dumps(self.card.plain())}))

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        return ModelCard(self.readme())

    def readme(self) -> str:
        """The model card as the hub shows it."""
        card = self.card
        head = f"---\nlibrary_name: contrastive-diffusion\ntags: [diffusion]\n---\n\n# {card.net.kind}, {card.net.resolution} x {card.net.resolution}\n\n"
        body = f"Weights: {card.weights}. Licence of the weights: {card.licence}.\n\nSource: `{json.dumps(dict(card.source))}`.\n"
        use = "\n```python\nfrom contrastive_diffusion.checkpoints.model import Model\nmodel = Model.from_pretrained(...)\n```\n"
        return head + body + use

    @classmethod
    def _from_pretrained(cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, map_location="cpu", strict=True, **_):  # pyright: ignore
        """A folder, or a repository of the hub; in evaluation mode."""
        folder = Path(model_id)
        if folder.is_dir():
            return load_model(folder, map_location)
        from huggingface_hub import snapshot_download

        options = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, "token": token}
        files = ["config.json", "model.safetensors"]
        return load_model(Path(snapshot_download(model_id, allow_patterns=files, local_files_only=local_files_only, **options)), map_location)


def load_card(folder: Path) -> Card:
    """The card of a model folder."""
    path = folder / "config.json"
    require(path.is_file(), f"model folder {folder}", "a folder with config.json", "make one with cdl convert")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"given {path}, expected JSON: {error}") from error
    require(isinstance(values, dict), f"{path} holding a {type(values).__name__}", "a JSON object")
    return Card.of(values, str(path))


def load_model(folder: Path, device: str | torch.device = "cpu") -> Model:
    """The model of a folder, in evaluation mode."""
    card, path = load_card(folder), folder / "model.safetensors"
    require(path.is_file(), f"model folder {folder}", "a folder with model.safetensors")
    try:
        tensors = load_file(path, device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"given {path}, expected a whole safetensors file ({error}); it is truncated or of another kind") from error
    with torch.device("meta"):
        net = card.net.build()
    adopt(net, tensors, str(path), assign=True)
    return Model(card, net).eval()


def adopt(net: nn.Module, tensors: Mapping[str, Tensor], where: str, assign: bool = False) -> None:
    """Loads ``tensors`` into ``net``; raises ``UsageError`` with the first keys that differ and the likely cause."""
    problem = difference(net, tensors)
    require(not problem, f"{where} of another network ({problem})", "the tensors of this architecture", likely_cause(net, tensors))
    net.load_state_dict(dict(tensors), assign=assign)


def difference(net: nn.Module, tensors: Mapping[str, Tensor], shown: int = 3) -> str:
    """The first few differences in names and shapes, as text; empty if there is none."""
    own = net.state_dict()
    lines = [f"{k} is missing" for k in own if k not in tensors] + [f"{k} is not expected" for k in tensors if k not in own]
    lines += [f"{k} is {tuple(tensors[k].shape)}, not {tuple(v.shape)}" for k, v in own.items() if k in tensors and tensors[k].shape != v.shape]
    more = f"; {len(lines) - shown} more" if len(lines) > shown else ""
    return "; ".join(lines[:shown]) + more


def likely_cause(net: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Why the tensors of another network may have been given."""
    own = net.state_dict()
    unlike = set(own.keys() ^ tensors.keys()) | {k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape}
    for part, cause in CAUSES.items():
        if unlike and all(part in k for k in unlike):
            return cause
    for part in ("map_noise.freqs", "aux_residual"):
        if any(part in k for k in own.keys() ^ tensors.keys()):
            return "one is DDPM++ and the other NCSN++: set net.kind"
    if not own.keys() & tensors.keys():
        return "names have nothing in common: it is of another family, see cdl inspect"
    if any(k.startswith(("model.enc", "down.")) for k in unlike if k in own and k in tensors):
        return "widths differ: compare net.width and net.mult"
    return "levels, blocks or attention differ: compare net.mult, net.blocks, net.attention and the resolution"


CAUSES = {
    "map_label": "one is class-conditional and the other is not: compare the labels of the data and net.labels",
    "map_augment": "one takes augmentation labels and the other does not: compare images.augment",
    "resample_filter": "the resampling filter differs",
    "aux_conv": "the number of image channels of the output differs",
}
