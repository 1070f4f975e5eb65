"""Networks. Each is ``net(z, logsnr) -> eps_hat`` and imports nothing of the package."""

from collections.abc import Callable

from torch import nn

from .mlp import MLP, PlainMLP

NETS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "plain-mlp": PlainMLP}
