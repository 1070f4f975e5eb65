"""The schema of a training run: network, loss, images, and how they belong together."""

from typing import Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as schema
from torch import nn

from contrastive_diffusion.denoisers import Bounded, Denoiser, of_network
from contrastive_diffusion.errors import UsageError, require
from contrastive_diffusion.nets import NETS
from contrastive_diffusion.nets.spec import AUGMENT, ImageNet
from contrastive_diffusion.objectives import Contrastive, Denoising, Likelihood, Objective, Weighted
from contrastive_diffusion.schedules import Schedule, ddpm, ends, iddpm, logistic, lognormal, uniform, ve, vp
from contrastive_diffusion.training import Training

STRICT = ConfigDict(extra="forbid")


@schema(config=STRICT, frozen=True)
class Net:
    """The network."""

    kind: Literal["mlp", "plain-mlp", "ddpm++", "ncsn++", "ddpm"] = "mlp"
    """Vectors: mlp (residual on Fourier features), plain-mlp (the paper's). Images: ddpm++ and ncsn++ (Song et al., as EDM trains them), ddpm (Ho et al.)."""
    width: int = Field(default=64, ge=1)
    """Hidden units, or channels of the finest level."""
    blocks: int = Field(default=3, ge=1)
    """Residual blocks, of an image network per level."""
    octaves: int = Field(default=6, ge=1)
    """Fourier octaves per coordinate (mlp only)."""
    mult: tuple[int, ...] = (1, 2, 2, 2)
    """Widths of the levels in units of the width, from the finest (images)."""
    attention: tuple[int, ...] = (16,)
    """Resolutions with self-attention (images)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of residual blocks (images)."""
    precondition: Literal["edm", "vp", "ve", "iddpm"] = "edm"
    """Of ddpm++ and ncsn++."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Std of the data, of the edm preconditioning and loss (images)."""
    checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory (images)."""

    @property
    def images(self) -> bool:
        return self.kind not in NETS

    def spec(self, shape: tuple[int, ...], label_dim: int = 0, augment: bool = False) -> ImageNet | None:
        """The image network for (C, R, R), None for a network of vectors. Raises ``UsageError`` where the two do not fit."""
        expected = "images" if self.images else "vectors"
        todo = "net.kind mlp or plain-mlp" if self.images else "set net.kind to ddpm++, ncsn++ or ddpm"
        require((len(shape) == 3) == self.images, f"data of shape {shape} for a {self.kind} network", expected, todo)
        if not self.images:
            return None
        try:
            return ImageNet(
                self.kind, shape[1], shape[0], label_dim, AUGMENT if augment else 0, self.width, self.mult, self.blocks, self.attention, self.dropout,
                self.precondition, self.sigma_data,
            )  # fmt: skip
        except ValueError as error:
            raise UsageError(str(error)) from error

    def build(self, shape: tuple[int, ...], seed: int, label_dim: int = 0, augment: bool = False) -> nn.Module:
        """A fresh network for data of ``shape``, initialised by ``seed`` without touching the global stream."""
        spec = self.spec(shape, label_dim, augment)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if spec is not None:
                return _one_line(lambda: spec.build(self.checkpointing))
            kwargs = {"octaves": self.octaves} if self.kind == "mlp" else {}
            return NETS[self.kind](shape[0], self.width, self.blocks, **kwargs)


def _one_line(build) -> nn.Module:
    """A network, or its complaint as a ``UsageError``: ``nets`` imports nothing of the package."""
    try:
        return build()
    except ValueError as error:
        raise UsageError(str(error)) from error


@schema(config=STRICT, frozen=True)
class Loss:
    """The training objective: a denoising loss, plus the contrastive one with ``contrastive`` as its weight."""

    denoising: Literal["ddpm", "uniform", "edm", "vp", "ve", "iddpm", "likelihood"] = "ddpm"
    """ddpm: eps error, uniform timestep; uniform: eps error, uniform log-SNR over the same range; edm: EDM's law and weight; vp, ve, iddpm: eps error
    at the levels of these processes, for networks preconditioned so; likelihood: nll (ITD)."""
    contrastive: float = Field(default=0.0, ge=0)
    """Weight of the contrastive loss; 0 leaves it out."""
    zeta: tuple[float, float] = (-4.0, 10.0)
    """Range of the contrasted log-SNR, uniform."""
    points: int = Field(default=16, ge=4, multiple_of=4)
    """(log-SNR, noise) points per likelihood ratio, a multiple of four."""
    share: float = Field(default=1 / 32, gt=0, le=1)
    """Share of the batch that is contrasted."""
    perturbation: float = Field(default=0.0, ge=0)
    """Std of extra input noise in the denoising part (DDPM-IP)."""

    def law(self) -> Schedule:
        """The law of noise levels of the denoising part."""
        laws = {
            "ddpm": ddpm, "uniform": lambda: uniform(*ends(ddpm())), "edm": lognormal, "vp": vp, "ve": ve, "iddpm": iddpm, "likelihood": logistic,
        }  # fmt: skip
        return laws[self.denoising]()

    def build(self, sigma_data: float = 1.0) -> Objective:
        """The objective; ``sigma_data``: std of the data in EDM's weight."""
        if self.denoising == "likelihood":
            plain: Objective = Likelihood(self.law())
        else:
            plain = Denoising(self.law(), "edm" if self.denoising == "edm" else "eps", sigma_data, self.perturbation)
        if not self.contrastive:
            return plain
        contrast = Contrastive(uniform(*self.zeta), self.points, self.share)
        return Weighted({"denoising": (1.0, plain), "contrastive": (self.contrastive, contrast)})

    def bounded(self, net: nn.Module, class_labels: torch.Tensor | None = None, augment_labels: torch.Tensor | None = None) -> Bounded:
        """The denoiser of ``net``, trusted on the levels it was trained on and continued beyond them."""
        denoiser: Denoiser = of_network(net, class_labels, augment_labels)
        return Bounded(denoiser, *ends(self.law()))


@schema(config=STRICT, frozen=True)
class Images:
    """How images are read (for networks of images)."""

    resolution: int | None = Field(default=None, ge=1)
    """Crop the centre square and resize it to this; None: images must be square and alike."""
    channels: Literal[1, 3] | None = None
    """Grey or colour; None: as the first image."""
    labels: bool = False
    """Train a conditional network on the set's labels."""
    flip: bool = False
    """Flip half of the images left to right."""
    augment: float = Field(default=0.0, ge=0, le=1)
    """Probability of each transform of EDM's augmentation, whose labels the network gets; 0 for none."""
    corrupt: Literal["stop", "skip"] = "stop"
    """At a broken image: stop, or take the next one."""
    holdout: int = Field(default=0, ge=0)
    """Images kept from training for validation."""


@schema(config=STRICT, frozen=True)
class Watch:
    """What is looked at on the way (for networks of images)."""

    every: int = Field(default=0, ge=0)
    """Steps between validations and sample grids; 0 for none."""
    rows: int = Field(default=64, ge=1)
    """Held-out images of a validation (those trained on, if none are held out)."""
    evals: int = Field(default=32, ge=16)
    """Denoiser evaluations for each number of each image."""
    samples: int = Field(default=64, ge=0)
    """Images of the sample grid, 0 for none."""
    steps: int = Field(default=50, ge=1)
    """Steps of its sampler (DDIM)."""
    logger: Literal["none", "tensorboard", "wandb"] = "none"
    """Where scalars go besides metrics.jsonl."""


@schema(config=STRICT, frozen=True)
class Train:
    """Train a denoiser on a toy law, an array or images; run again to resume."""

    data: str = "dino"
    """A toy's name, a .npy / .csv file of shape (N, D); or images: digits, patches, a folder, .zip, .npz, or CIFAR-10's .tar.gz."""
    out: str = "runs/train"
    """The run folder."""
    init: str | None = None
    """What to start from (fine-tuning): a run folder's averaged weights, or a model folder of cdl convert, whose architecture replaces net."""
    net: Net = Field(default_factory=Net)
    loss: Loss = Field(default_factory=Loss)
    training: Training = Field(default_factory=Training)
    images: Images = Field(default_factory=Images)
    watch: Watch = Field(default_factory=Watch)
    device: str = "cpu"
    """cpu or cuda."""
    checkpoint_every: int = Field(default=1000, ge=1)
    """Steps between checkpoints."""
    changed: Literal["refuse", "accept"] = "refuse"
    """When the run folder is of another recipe: refuse, or go on with this one from its last checkpoint."""
