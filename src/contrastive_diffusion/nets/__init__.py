"""Networks; they import nothing of the package.

Those for vectors are ``net(z, logsnr) -> eps_hat``. Those for images keep the conventions of their published checkpoints and become
denoisers through ``denoisers.from_edm`` (``SongUNet`` inside ``Preconditioned``) and ``denoisers.from_timesteps`` (``DDPMUNet``).
"""

from collections.abc import Callable

from torch import nn

from .ddpm_unet import DDPMUNet
from .mlp import MLP, PlainMLP
from .preconditioning import Preconditioned
from .song_unet import SongUNet

__all__ = ["MLP", "NETS", "DDPMUNet", "PlainMLP", "Preconditioned", "SongUNet"]

NETS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "plain-mlp": PlainMLP}
