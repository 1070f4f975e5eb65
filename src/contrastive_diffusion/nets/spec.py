"""What an image network is, as plain values: enough to build it again from a file that executes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .ddpm_unet import DDPMUNet
from .preconditioning import Preconditioned
from .song_unet import SongUNet

# Options of ``SongUNet`` that make each family.
FAMILIES: dict[str, dict[str, Any]] = {
    "ddpm++": {"embedding": "positional", "channel_mult_noise": 1, "encoder": "standard", "decoder": "standard", "taps": (1, 1)},
    "ncsn++": {"embedding": "fourier", "channel_mult_noise": 2, "encoder": "residual", "decoder": "standard", "taps": (1, 3, 3, 1)},
}
AUGMENT = 9  # augmentation labels of EDM's pipeline


@dataclass(frozen=True)
class ImageNet:
    """An image network.

    Args:
        kind: "ddpm++", "ncsn++" (``SongUNet`` inside ``Preconditioned``) or "ddpm" (``DDPMUNet``, indexed by timestep).
        resolution, channels: of the images. label_dim: classes, 0 for none. augment_dim: augmentation labels, 0 for none.
        width, mult, blocks, attention, dropout: as in the networks. precondition, sigma_data: of ``Preconditioned``.
        options: further options of ``SongUNet``, over those of the family.
    """

    kind: str
    resolution: int
    channels: int
    label_dim: int = 0
    augment_dim: int = 0
    width: int = 128
    mult: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.0
    precondition: str = "edm"
    sigma_data: float = 0.5
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in (*FAMILIES, "ddpm"):
            raise ValueError(f"given network {self.kind!r}, expected one of {', '.join((*FAMILIES, 'ddpm'))}")
        if self.kind == "ddpm" and (self.label_dim or self.augment_dim):
            raise ValueError("given labels for a ddpm network, expected none; use ddpm++ or ncsn++")

    @staticmethod
    def of(values: Mapping[str, Any]) -> "ImageNet":
        """From its fields as JSON values."""
        return ImageNet(**{**values, **{key: tuple(values[key]) for key in ("mult", "attention")}})

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.resolution, self.resolution

    def build(self, checkpointing: bool = False) -> nn.Module:
        """A fresh network, initialised from the global random stream."""
        if self.kind == "ddpm":
            return DDPMUNet(self.resolution, self.channels, self.width, self.mult, self.blocks, self.attention, self.dropout, checkpointing)
        model = SongUNet(
            self.resolution, self.channels, label_dim=self.label_dim, augment_dim=self.augment_dim, model_channels=self.width, channel_mult=self.mult,
            num_blocks=self.blocks, attention=self.attention, dropout=self.dropout, checkpointing=checkpointing, **{**FAMILIES[self.kind], **self.options},
        )  # fmt: skip
        return Preconditioned(model, self.precondition, self.sigma_data)
