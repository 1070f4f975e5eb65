"""A network shared out over the processes (FSDP): each keeps a part of every tensor, and blocks are put together while they compute.

Everything that leaves the processes is whole: checkpoints do not show how many there were, and one may go on where many stopped.
"""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def shard(net: nn.Module) -> None:
    """Shares out the parameters of ``net`` in place, block by block; the processes must hold the same ones. Buffers stay whole."""
    device = next(net.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in _blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _blocks(net: nn.Module) -> Iterator[nn.Module]:
    """Members of lists that are not lists of blocks themselves."""
    for group in net.modules():
        for child in group.children() if isinstance(group, CONTAINERS) else ():
            if any(True for _ in child.parameters()) and not any(isinstance(m, CONTAINERS) for m in child.modules()):
                yield child


def synchronize(module: nn.Module, on: bool) -> None:
    """Whether the next backward pass exchanges gradients, where ``module`` holds shared-out networks."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(on, recurse=False)


def whole(value: Tensor) -> Tensor:
    """All of a tensor, on every process, which all must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Any) -> Any:
    """This process's part, for elementwise arithmetic in place."""
    return value.to_local() if isinstance(value, DTensor) else value


def shared_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the parts of ``like``, if that has any and the same shape."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
