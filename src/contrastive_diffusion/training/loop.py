"""One training loop, as a generator that yields after the optimizer step.

Logging, checkpoints and early stopping belong to whoever drives it. Every draw is a function of (seed, pass), the rate is a function of the
step, and ``State`` holds all that changes: so a run stopped anywhere and restored from ``State.tensors`` continues with the same bits.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from contrastive_diffusion.denoisers import Denoiser, take
from contrastive_diffusion.errors import RunError, require
from contrastive_diffusion.objectives import Objective
from contrastive_diffusion.training.config import Training
from contrastive_diffusion.training.feed import Batch, Data, Feed, seed_of
from contrastive_diffusion.training.processes import ALONE, Processes
from contrastive_diffusion.training.sharding import local, shard, shared_as, synchronize, whole

Wrap = Callable[..., Denoiser]  # (net) or (net, class_labels, augment_labels) -> the denoiser that the objective sees


@dataclass(frozen=True)
class Step:
    """What one step did: ``number`` counts finished optimizer steps, ``scalars`` are the objective's, plus "lr" and "grad_norm".

    ``seconds`` it took, ``waited`` of them for data.
    """

    number: int
    scalars: dict[str, float]
    seconds: float = 0.0
    waited: float = 0.0


class State:
    """All that training changes: the network, its average, the optimizer, the number of finished steps."""

    def __init__(self, net: nn.Module, config: Training, processes: Processes = ALONE):
        self.net, self.config, self.step = net, config, 0
        self.ema = AveragedModel(net, multi_avg_fn=self._mix, use_buffers=True)
        self.sharded = config.shard and processes.world > 1
        if self.sharded:
            self._empty = copy.deepcopy(net).to("meta")
            shard(net)
            shard(self.ema.module)
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
        self.optimizer = kind(net.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def average(self) -> None:
        """Moves the average towards the weights of the step just done."""
        self.ema.update_parameters(self.net)

    @torch.no_grad()
    def _mix(self, averaged: Any, current: Any, _: Any) -> None:
        torch._foreach_lerp_([local(v) for v in averaged], [local(v) for v in current], 1 - self.config.decay_at(self.step))

    @property
    def averaged(self) -> nn.Module:
        """The network with averaged weights; if shared out, a whole copy, which all processes must ask for."""
        if not self.sharded:
            return self.ema.module
        net = copy.deepcopy(self._empty).to_empty(device=next(self.net.parameters()).device)
        net.load_state_dict({k: whole(v) for k, v in self.ema.module.state_dict().items()})
        return net

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named whole tensors: ``net.*``, ``ema.*``, ``optimizer.INDEX.*``, ``step``. If shared out, all processes must ask for them."""
        named = {f"net.{k}": v for k, v in self.net.state_dict().items()} | {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
        return {k: whole(v.detach()).clone().contiguous() for k, v in named.items()} | {"step": torch.tensor(self.step)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``tensors``; raises ``UsageError`` if they belong to another network."""
        self.net.load_state_dict(_under("net.", tensors, self.net.state_dict()))
        self.ema.load_state_dict(_under("ema.", tensors, self.ema.state_dict()))
        parameters = list(self.net.parameters())
        moments: dict[int, dict[str, Tensor]] = {}
        for name in tensors:
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                moments.setdefault(int(index), {})[key] = shared_as(tensors[name].clone(), parameters[int(index)])
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = int(tensors["step"])


def _under(prefix: str, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    wrong = sorted(k for k in found.keys() | expected.keys() if k not in found or k not in expected or found[k].shape != expected[k].shape)
    require(not wrong, f"a checkpoint that differs in {len(wrong)} tensors, first {prefix}{wrong[0] if wrong else ''}", "the same network")
    return {k: shared_as(v, expected[k]) for k, v in found.items()}


class Autocast:
    """A denoiser whose network computes in ``dtype`` where that is safe; its result has the dtype of z."""

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype):
        self.denoiser, self.dtype = denoiser, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self.denoiser, name)

    def take(self, index: Tensor) -> "Autocast":
        return Autocast(take(self.denoiser, index), self.dtype)

    def __call__(self, z: Tensor, logsnr: Tensor) -> Tensor:
        with torch.autocast(z.device.type, self.dtype):
            return self.denoiser(z, logsnr).to(z.dtype)


class Loss(nn.Module):
    """The objective of one pass as a module, which is what distributed wrappers want: a network may be called many times in it."""

    def __init__(self, net: nn.Module, objective: Objective, wrap: Wrap | None, config: Training):
        super().__init__()
        self.net, self.objective, self.wrap, self.config = net, objective, wrap, config

    def denoiser(self, batch: Batch) -> Denoiser:
        augment = batch.augment_labels
        dim = getattr(getattr(self.net, "model", None), "augment_dim", 0)
        if dim and augment is None:  # every parameter must take part, or processes wait for its gradient
            augment = batch.x.new_zeros(1, dim)
        labels = () if batch.class_labels is None and augment is None else (batch.class_labels, augment)
        denoiser: Denoiser = self.wrap(self.net, *labels) if self.wrap else self.net
        return denoiser if self.config.precision == "float32" else Autocast(denoiser, torch.bfloat16)

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        return self.objective(self.denoiser(batch), batch.x, generator)


def train(state: State, objective: Objective, data: Data | Feed, wrap: Wrap | None = None, processes: Processes = ALONE) -> Iterator[Step]:
    """Trains ``state`` in place until its configured number of steps, yielding after each.

    Args:
        objective: as in ``objectives``. data: the law of x, or a feed of it with flips or augmentation.
        wrap: from the network (and labels, where the data has them) to the denoiser that the objective sees; the network itself by default.
        processes: those that share the passes of each step; their number divides ``config.passes``.

    Raises:
        RunError: when a loss or gradient is not finite; it names the step and the term, and ``state`` is as after the last good step.
            When memory runs out, naming what to lower. When another process is lost.
    """
    config, parameters = state.config, list(state.net.parameters())
    mine = _share(config, processes)
    feed = data if isinstance(data, Feed) else Feed(data, config)
    loss: nn.Module = Loss(state.net, objective, wrap, config)
    if processes.world > 1 and not state.sharded:
        loss = DistributedDataParallel(loss, broadcast_buffers=False)
    if config.compile:
        state.net.compile()
    if config.channels_last:
        state.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    state.net.train()
    passes = feed.passes([step * config.passes + k for step in range(state.step, config.steps) for k in mine])
    while state.step < config.steps:
        start, waited = time.perf_counter(), 0.0
        lr = config.rate_at(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.zero_grad(set_to_none=True)
        total: dict[str, float] = {}
        for k in mine:
            before = time.perf_counter()
            batch, generator = next(passes)
            batch = batch.to(parameters[0].device)
            waited += time.perf_counter() - before
            number = state.step * config.passes + k
            with processes.watched(), _memory(config), _dropout(seed_of(config.seed, "dropout", number), parameters[0].device):
                scalars = _backward(loss, batch, generator, len(mine), last=k == mine[-1])
            total = {name: total.get(name, 0.0) + value / len(mine) for name, value in scalars.items()}
        with processes.watched():
            norm = whole(nn.utils.clip_grad_norm_(parameters, config.clip))
        values = processes.mean(total) | {"lr": lr, "grad_norm": float(norm)}
        _check(values, state.step)
        state.optimizer.step()
        state.average()
        state.step += 1
        yield Step(state.step, values, time.perf_counter() - start, waited)


def _share(config: Training, processes: Processes) -> list[int]:
    """The passes of each step that are this process's."""
    passes, world = config.passes, processes.world
    todo = f"set training.micro to {config.batch // world}" if config.batch % world == 0 else "choose a batch that they divide"
    require(passes % world == 0, f"{passes} passes of {config.rows} rows for {world} processes", f"a multiple of {world} passes", todo)
    return list(range(processes.rank, passes, world))


def _backward(loss: nn.Module, batch: Batch, generator: torch.Generator, passes: int, last: bool) -> dict[str, float]:
    """Adds the gradient of one pass; processes exchange theirs in the last."""
    synchronize(loss, last)
    with loss.no_sync() if isinstance(loss, DistributedDataParallel) and not last else nullcontext():
        scalars = loss(batch, generator)
        (scalars["loss"] / passes).backward()
    return {name: float(value.detach()) for name, value in scalars.items()}


def _check(values: dict[str, float], step: int) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise RunError(f"given {name} = {value} at step {step + 1}, expected finite numbers; lower the learning rate or the weight of that term")


class _dropout:
    """Masks of a pass are a function of its number: the global streams are seeded for it, and put back."""

    def __init__(self, seed: int, device: torch.device):
        self.fork = torch.random.fork_rng([device] if device.type == "cuda" else [])
        self.seed = seed

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)


class _memory:
    """Turns running out of memory into one line that says which knob to turn."""

    def __init__(self, config: Training):
        self.config = config

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        out = isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
        if out or isinstance(error, MemoryError):
            knobs = "lower training.micro, or set net.checkpointing, or training.precision to bfloat16"
            raise RunError(f"given passes of {self.config.rows} rows, expected them to fit into memory; {knobs}") from error
