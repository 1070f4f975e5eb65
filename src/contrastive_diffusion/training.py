"""One training loop, as a generator that yields after the optimizer step.

Logging, checkpoints and early stopping belong to whoever drives it. Every draw is a function of (seed, step), the rate is a function of the
step, and ``State`` holds all that changes: so a run stopped anywhere and restored from ``State.tensors`` continues with the same bits.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as schema
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from contrastive_diffusion.denoisers import Denoiser, check_data
from contrastive_diffusion.errors import RunError, require
from contrastive_diffusion.objectives import Objective


class Data(Protocol):
    """A law to train on: ``sample(n, generator) -> x`` (n, *S)."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor: ...


class Rows:
    """A finite data set x (N, *S) as a law: rows drawn uniformly with replacement."""

    def __init__(self, x: Tensor):
        self.x = check_data(x, "data")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.x[torch.randint(len(self.x), (n,), generator=generator)]


@schema(config=ConfigDict(extra="forbid"), frozen=True)
class Training:
    """How to train."""

    steps: int = Field(default=6000, ge=1)
    """Optimizer steps."""
    batch: int = Field(default=512, ge=1)
    """Rows of data per step."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate."""
    rate: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine to zero over the steps, or constant."""
    warmup: int = Field(default=200, ge=0)
    """Steps over which the rate rises."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """Update rule."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW (or Adam's L2)."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    ema: float = Field(default=0.999, ge=0, lt=1)
    """Decay per step of the averaged weights, which are the ones to sample with."""
    seed: int = 0
    """Of initialisation, data and noise."""

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        return self.lr * warm * (0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.rate == "cosine" else 1.0)


@dataclass(frozen=True)
class Step:
    """What one step did: ``number`` counts finished optimizer steps, ``scalars`` are the objective's, plus "lr" and "grad_norm"."""

    number: int
    scalars: dict[str, float]


class State:
    """All that training changes: the network, its average, the optimizer, the number of finished steps."""

    def __init__(self, net: nn.Module, config: Training):
        self.net, self.config, self.step = net, config, 0
        self.ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
        self.optimizer = kind(net.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)

    @property
    def averaged(self) -> nn.Module:
        """The network with averaged weights, in the shape of ``net``."""
        return self.ema.module

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors: ``net.*``, ``ema.*``, ``optimizer.INDEX.*``, ``step``."""
        named = {f"net.{k}": v for k, v in self.net.state_dict().items()} | {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
        return {k: v.detach().clone().contiguous() for k, v in named.items()} | {"step": torch.tensor(self.step)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``tensors``; raises ``UsageError`` if they belong to another network."""
        self.net.load_state_dict(_under("net.", tensors, self.net.state_dict()))
        self.ema.load_state_dict(_under("ema.", tensors, self.ema.state_dict()))
        moments: dict[int, dict[str, Tensor]] = {}
        for name in tensors:
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                moments.setdefault(int(index), {})[key] = tensors[name].clone()
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = int(tensors["step"])


def _under(prefix: str, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    wrong = sorted(k for k in found.keys() | expected.keys() if k not in found or k not in expected or found[k].shape != expected[k].shape)
    require(not wrong, f"a checkpoint that differs in {len(wrong)} tensors, first {prefix}{wrong[0] if wrong else ''}", "the same network")
    return found


def stream(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """The random stream of (seed, purpose, index): the same in every process, independent of all others."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def train(state: State, objective: Objective, data: Data, wrap: Callable[[nn.Module], Denoiser] | None = None) -> Iterator[Step]:
    """Trains ``state`` in place until its configured number of steps, yielding after each.

    Args:
        objective: as in ``objectives``. data: the law of x.
        wrap: from the network to the denoiser that the objective sees; the network itself by default.

    Raises:
        RunError: when a loss or gradient is not finite; it names the step and the term, and ``state`` is as after the last good step.
    """
    config, parameters = state.config, list(state.net.parameters())
    denoiser: Denoiser = wrap(state.net) if wrap else state.net
    state.net.train()
    while state.step < config.steps:
        generator = stream(config.seed, "train", state.step)
        lr = config.rate_at(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        scalars = objective(denoiser, data.sample(config.batch, generator).to(parameters[0].device), generator)
        state.optimizer.zero_grad(set_to_none=True)
        scalars["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        values = {k: float(v.detach()) for k, v in scalars.items()} | {"lr": lr, "grad_norm": float(norm)}
        for name, value in values.items():
            if not math.isfinite(value):
                raise RunError(
                    f"given {name} = {value} at step {state.step + 1}, expected finite numbers; lower the learning rate or the weight of that term"
                )
        state.optimizer.step()
        state.ema.update_parameters(state.net)
        state.step += 1
        yield Step(state.step, values)
