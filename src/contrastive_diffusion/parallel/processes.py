"""Who evaluates the rows of a round: one process in chunks, or every process of a group its even share.

The state is replicated and every process does the same arithmetic on it, so one all-gather of the denoiser's outputs is all that is ever
sent. The processes must have been given the same task, which is checked once, and a failure in one of them stops all of them.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contrastive_diffusion.denoisers import Denoiser, binds_rows, ranged, take
from contrastive_diffusion.errors import RunError, UsageError, require

Call = Callable[[Denoiser, Tensor, Tensor], Tensor]


class Evaluator:
    """A denoiser that counts the ``rows`` and the ``reads`` (batches that had to wait for one another), and calls the real one in chunks.

    Args:
        max_rows: rows per call and process.
        fixed: pad every call to this many rows, for compiled or captured networks; 0 leaves calls as they are.
        dtype: what the network is called in; outputs are taken back to the dtype of z.
        group: processes that share the rows; None is this process alone.

    ``index`` (R,), set before a round: of which samples its rows are, for a denoiser that is bound to samples (one with a label for each).
    """

    def __init__(self, denoiser: Denoiser, max_rows: int, fixed: int = 0, dtype: torch.dtype | None = None, group: Any = None):
        self.denoiser, self.max_rows, self.fixed, self.dtype, self.group = denoiser, max_rows, fixed, dtype, group
        self.size, self.rank = (dist.get_world_size(group), dist.get_rank(group)) if group is not None else (1, 0)
        self.rows, self.reads = 0, 0
        self.bound = binds_rows(denoiser)
        self.index: Tensor | None = None
        self.error: Exception | None = None
        self.status: Tensor | None = None

    def __call__(self, z: Tensor, logsnr: Tensor) -> Tensor:
        return self.read(z, logsnr, self.index)

    def take(self, rows: Tensor) -> Denoiser:
        """The same for some rows of the round."""
        if not self.bound:
            return self
        index = self.index
        return lambda z, logsnr: self.read(z, logsnr, None if index is None else index[rows])

    def read(self, z: Tensor, logsnr: Tensor, index: Tensor | None) -> Tensor:
        self.rows, self.reads = self.rows + len(z), self.reads + 1
        return self._everyone(z, logsnr, self._eps, index)[:, 0]

    def ranged(self, z: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """eps_hat and the share of a learned variance, of a denoiser that has one."""
        self.rows, self.reads = self.rows + len(z), self.reads + 1
        eps_hat, v = self._everyone(z, logsnr, self._eps_and_range, self.index).unbind(1)
        return eps_hat, v

    def _eps(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor) -> Tensor:
        eps_hat = denoiser(z, logsnr)
        require(eps_hat.shape == z.shape, f"a denoiser that returns {tuple(eps_hat.shape)}", f"the shape of z, {tuple(z.shape)}")
        return eps_hat[:, None]

    def _eps_and_range(self, denoiser: Denoiser, z: Tensor, logsnr: Tensor) -> Tensor:
        return torch.stack(ranged(denoiser, z, logsnr), 1)

    def _everyone(self, z: Tensor, logsnr: Tensor, call: Call, index: Tensor | None) -> Tensor:
        index = torch.zeros(len(z), dtype=torch.long, device=z.device) if index is None else index
        return self._local(z, logsnr, call, index) if self.size == 1 else self._shared(z, logsnr, call, index)

    def _local(self, z: Tensor, logsnr: Tensor, call: Call, index: Tensor) -> Tensor:
        """Outputs (N, k, *S) of these rows, in chunks."""
        chunk = min(self.max_rows, self.fixed or self.max_rows)
        parts = [self._chunk(zs, ls, chunk, call, at) for zs, ls, at in zip(z.split(chunk), logsnr.split(chunk), index.split(chunk), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chunk(self, z: Tensor, logsnr: Tensor, chunk: int, call: Call, index: Tensor) -> Tensor:
        rows = len(z)
        if self.fixed and rows < chunk:
            z, logsnr, index = (torch.cat([v, v[:1].expand(chunk - rows, *v.shape[1:])]) for v in (z, logsnr, index))
        denoiser = take(self.denoiser, index) if self.bound else self.denoiser
        return call(denoiser, z.to(self.dtype or z.dtype), logsnr.to(self.dtype or logsnr.dtype))[:rows].to(z.dtype)

    def _shared(self, z: Tensor, logsnr: Tensor, call: Call, index: Tensor) -> Tensor:
        """This process's share, then everyone's. The last number of each share is 1 where it failed."""
        shares = [len(z) * k // self.size for k in range(self.size + 1)]
        outputs = 1 if call == self._eps else 2
        most, numel = -(-len(z) // self.size), outputs * z[0].numel()
        mine = z.new_zeros(most * numel + 1)
        low, high = shares[self.rank], shares[self.rank + 1]
        try:
            if high > low and self.error is None:
                mine[: (high - low) * numel] = self._local(z[low:high], logsnr[low:high], call, index[low:high]).flatten()
        except Exception as error:
            self.error = error
        if self.error is not None:
            mine[-1] = 1
        everyone = mine.new_empty(self.size * len(mine))
        _gather(everyone, mine, self.group)
        everyone = everyone.view(self.size, -1)
        self._check(everyone[:, -1])
        parts = [everyone[k, : (b - a) * numel] for k, (a, b) in enumerate(zip(shares, shares[1:], strict=False))]
        return torch.cat(parts).view(len(z), outputs, *z.shape[1:])

    def _check(self, status: Tensor) -> None:
        """Stops all processes if one failed: at once on a CPU; on a GPU after the next round, so that no round waits for its own status."""
        lagged = self.status if status.is_cuda else status
        self.status = status
        if lagged is not None:
            self.stop_if(lagged)

    def stop_if(self, status: Tensor | None) -> None:
        if status is None or not bool(status.any()):
            return
        if self.error is not None:
            raise self.error
        failed = ", ".join(str(k) for k, v in enumerate(status.tolist()) if v)
        raise RunError(f"given a denoiser that failed in process {failed}, expected outputs from all {self.size}; its own error is printed there")

    def finish(self) -> None:
        """The check that the lag left open."""
        if self.size > 1:
            self.stop_if(self.status)


def _gather(everyone: Tensor, mine: Tensor, group: Any) -> None:
    """All-gather of one tensor. torch 2.13 renamed it, and warns at the old name in every round."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, mine, group=group)


def same_task(group: Any, task: dict[str, Any]) -> None:
    """Stops if the processes of ``group`` were not given the same task: a name of what differs, and the values."""
    if group is None:
        return
    found: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(found, task, group=group)
    for key in task:
        values = [str(other.get(key)) for other in found]
        if len(set(values)) > 1:
            raise UsageError(f"given processes with different {key} ({'; '.join(sorted(set(values)))}), expected the same in all {len(found)}")


def world(device: str) -> Any:
    """The group of all processes that torchrun started, joined here if need be; None where this is the only one."""
    if not dist.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    if not dist.is_initialized():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return dist.group.WORLD


def agreed(group: Any, value: Any) -> Any:
    """The value of the first process, in all of them."""
    if group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def first_process(group: Any) -> bool:
    """Whether this is the process that writes files and prints."""
    return group is None or dist.get_rank(group) == 0
