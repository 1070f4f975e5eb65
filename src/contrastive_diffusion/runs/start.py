"""What a run starts from and what it leaves: its data, its network, and a trained one's denoiser by name."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contrastive_diffusion.data.images import Images
from contrastive_diffusion.data.toys import TOYS, toy
from contrastive_diffusion.denoisers import Bounded, Denoiser, of_network
from contrastive_diffusion.errors import require
from contrastive_diffusion.nets.spec import ImageNet
from contrastive_diffusion.recipes import Train, load_data, load_images, validate
from contrastive_diffusion.runs.folder import Run
from contrastive_diffusion.schedules import ends
from contrastive_diffusion.training import Feed

Weights = Literal["ema", "raw"]
FRESH = "trained from scratch: that of whoever trained it"  # licence of such weights


@dataclass(frozen=True)
class Start:
    """What a recipe's names stand for.

    Args:
        feed: what each pass sees. held: images kept from training. shape, label_dim: of the data. net: the network to train.
        spec: its architecture, None for vectors. licence: of the weights it starts from, empty for fresh ones.
    """

    feed: Feed
    held: Images | None
    shape: tuple[int, ...]
    label_dim: int
    net: nn.Module
    spec: ImageNet | None
    licence: str


def start(config: Train) -> Start:
    """Opens the data and builds the network of a recipe."""
    if not config.net.images:
        data = load_data(config.data)
        shape = tuple(data.sample(1, torch.Generator().manual_seed(0)).shape[1:])
        return Start(Feed(data, config.training), None, shape, 0, start_net(config, shape[0]), None, "")
    kept, held = load_images(config.data, config.images)
    net, spec, licence = _image_net(config, kept)
    feed = Feed(kept, config.training, config.images.flip, config.images.augment)
    return Start(feed, held if len(held) else None, kept.shape, kept.label_dim, net, spec, licence)


def start_net(config: Train, dim: int) -> nn.Module:
    """A fresh network for vectors, or that of the run ``config.init`` with its averaged weights."""
    net = config.net.build((dim,), config.training.seed)
    if config.init is not None:
        _load_weights(net, Run.existing(config.init).trained()[0], config.init)
    return net


def _image_net(config: Train, data: Images) -> tuple[nn.Module, ImageNet, str]:
    """The network for images: fresh, a run's average, or a model folder's. Checks that it fits the data."""
    if config.init is not None and (Path(config.init) / "config.json").is_file():
        from contrastive_diffusion.checkpoints.model import load_model

        model = load_model(Path(config.init))
        spec = model.card.net
        require(
            spec.shape == data.shape,
            f"images of shape {data.shape} for {config.init}",
            f"{spec.shape}, its own",
            "set images.resolution and images.channels",
        )
        todo = "set images.labels" + ("" if spec.label_dim else " to false")
        require(spec.label_dim == data.label_dim, f"labels of length {data.label_dim} for {config.init}", f"{spec.label_dim}, its own", todo)
        require(spec.augment_dim or not config.images.augment, f"images.augment for {config.init}", "0: it takes no augmentation labels")
        net = spec.build(config.net.checkpointing)
        net.load_state_dict(model.net.state_dict())
        return net, spec, model.card.licence
    net = config.net.build(data.shape, config.training.seed, data.label_dim, config.images.augment > 0)
    spec = config.net.spec(data.shape, data.label_dim, config.images.augment > 0)
    assert spec is not None
    licence = FRESH
    if config.init is not None:
        tensors, meta = Run.existing(config.init).trained()
        _load_weights(net, tensors, config.init)
        licence = str(meta.get("licence", FRESH))
    return net, spec, licence


def _load_weights(net: nn.Module, tensors: dict[str, Tensor], path: str | Path, which: Weights = "ema") -> None:
    """Weights of the checkpoint of the run folder ``path``, into ``net``."""
    prefix = {"ema": "ema.module.", "raw": "net."}[which]
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    same = {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in net.state_dict().items()}
    todo = "" if same else _why(net, weights)
    require(same, f"the network of {path}{todo}", "the network of this recipe (net.kind, width, blocks, octaves, dimension of the data)")
    net.load_state_dict(weights)


def is_model_folder(path: str | Path) -> bool:
    """Whether ``path`` is a converted model, not a run."""
    return (Path(path) / "config.json").is_file() and not (Path(path) / "recipe.yaml").is_file()


def _why(net: nn.Module, weights: dict[str, Tensor]) -> str:
    from contrastive_diffusion.checkpoints.model import difference, likely_cause

    return f" ({difference(net, weights)}; {likely_cause(net, weights)})"


@dataclass(frozen=True)
class Trained:
    """A trained network and how to use it."""

    net: nn.Module
    levels: tuple[float, float]
    shape: tuple[int, ...]
    label_dim: int = 0

    def denoiser(self, class_labels: Tensor | None = None) -> Bounded:
        """Given one-hot labels (1, L) or (B, L); without, that of no label."""
        return Bounded(of_network(self.net, class_labels), *self.levels).eval()

    def of_class(self, label: int | None) -> Bounded:
        """The denoiser of class ``label``, None for none."""
        if label is None:
            return self.denoiser()
        require(0 <= label < self.label_dim, f"label {label}", f"0 .. {self.label_dim - 1}" if self.label_dim else "none: the network has no labels")
        return self.denoiser(torch.eye(self.label_dim)[label : label + 1])


def load_trained(path: str | Path, weights: Weights = "ema") -> Trained:
    """The network of a run folder, with averaged ("ema") or last ("raw") weights, or that of a model folder, which has only one kind."""
    if is_model_folder(path):
        from contrastive_diffusion.checkpoints.model import load_model

        model = load_model(Path(path))
        return Trained(model.net, model.card.levels, model.shape, model.card.net.label_dim)
    tensors, meta = Run.existing(path).trained()
    config = validate(Train, meta["recipe"], str(path))
    if "image_net" in meta:
        spec = ImageNet.of(meta["image_net"])
        net, shape, label_dim = spec.build(), spec.shape, spec.label_dim
    else:
        net, shape, label_dim = config.net.build((int(meta["dim"]),), 0), (int(meta["dim"]),), 0
    _load_weights(net, tensors, path, weights)
    return Trained(net.eval(), ends(config.loss.law()), shape, label_dim)


def described(start: Start, config: Train) -> dict[str, Any]:
    """What a checkpoint says about its network."""
    if start.spec is None:
        return {"dim": start.shape[0]}
    return {"image_net": dataclasses.asdict(start.spec), "levels": list(ends(config.loss.law())), "licence": start.licence}


def load_denoiser(path: str | Path, label: int | None = None) -> tuple[Bounded, tuple[int, ...]]:
    """The averaged denoiser of a trained run folder or model folder, of class ``label`` if given, and the shape S of its data."""
    trained = load_trained(path)
    return trained.of_class(label), trained.shape


def named_denoiser(name: str, label: int | None = None) -> tuple[Denoiser, tuple[int, ...]]:
    """The denoiser of a run or model folder, or the exact one of a toy mixture."""
    if name in TOYS:
        law = toy(name)
        require(hasattr(law, "log_prob"), f"toy {name!r}", "a toy whose law is a mixture (circles, dino, eight-gaussians, two-modes)")
        return law, tuple(law.shape)  # pyright: ignore
    require(Path(name).exists(), f"{name!r}", f"a run folder or one of {', '.join(TOYS)}")
    return load_denoiser(name, label)
