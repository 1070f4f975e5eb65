"""Who trains: this process alone, or one of several started by torchrun (or anything that sets the same variables, as accelerate does)."""

import datetime
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from contrastive_diffusion.errors import RunError, require


@dataclass(frozen=True)
class Processes:
    """This process (``rank`` of ``world``) and its device."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over processes of named numbers."""
        if self.world == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        with self.watched():
            dist.all_reduce(total)
        return dict(zip(values, (total / self.world).tolist(), strict=True))

    def wait(self) -> None:
        """For all processes to come here."""
        if self.world > 1:
            with self.watched():
                dist.barrier()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns the failure of another process into one line."""
        try:
            yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            lost = isinstance(error, dist.DistError) or any(w in text for w in ("gloo", "Gloo", "NCCL", "Connection closed", "Connection reset"))
            if self.world == 1 or not lost:
                raise
            todo = "start the same command again to continue from the last checkpoint"
            raise RunError(
                f"given {self.world} processes, expected all alive, but process {self.rank} lost another ({text[:100]}); {todo}"
            ) from error


ALONE = Processes()


def join(device: str = "cpu", timeout: float = 1800.0) -> Processes:
    """Joins the other processes if torchrun's variables say that there are some; ``device`` "cuda" means this process's own.

    Raises ``UsageError`` when the variables and the group disagree, as when a launcher started fewer processes than it was told.
    """
    world, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
    cuda = device.startswith("cuda")
    require(not cuda or torch.cuda.is_available(), f"device {device}", "cpu: torch sees no GPU here", "set device to cpu")
    where = torch.device("cuda", local) if cuda and world > 1 else torch.device(device)
    if world > 1 and not dist.is_initialized():
        warnings.filterwarnings("ignore", "Grad strides do not match")  # 1 x 1 convolutions have two layouts with the same strides
        if cuda:
            torch.cuda.set_device(where)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout))
    found = dist.get_world_size() if dist.is_initialized() else 1
    require(found == world, f"{found} processes in the group", f"{world}, as WORLD_SIZE says", "start with torchrun --nproc-per-node N")
    return Processes(rank, world, where)


def leave() -> None:
    """Ends the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
