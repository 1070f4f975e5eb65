"""How to train, as a recipe's section."""

import math
from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as schema

from contrastive_diffusion.errors import require


@schema(config=ConfigDict(extra="forbid"), frozen=True)
class Training:
    """How to train."""

    steps: int = Field(default=6000, ge=1)
    """Optimizer steps."""
    batch: int = Field(default=512, ge=1)
    """Rows of data per step, over all processes."""
    micro: int | None = Field(default=None, ge=1)
    """Rows per pass; a step averages batch / micro passes, which processes share evenly: the result depends on micro, not on how many there are. None: the batch."""
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
    ema_half_life: float | None = Field(default=None, gt=0)
    """Half-life of the average in images, in place of ema."""
    ema_rampup: float | None = Field(default=0.05, gt=0)
    """With ema_half_life: it is at most this share of the images seen so far; None for the full half-life from the start."""
    label_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of rows whose class label is replaced by none, so that the network can be guided."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's matrix products and convolutions."""
    compile: bool = False
    """Compile the network (for GPUs: no gain on a CPU)."""
    channels_last: bool = False
    """Memory layout of image networks (for GPUs)."""
    shard: bool = False
    """Share out parameters, average and optimizer over the processes (FSDP), for networks too large for one."""
    workers: int = Field(default=0, ge=0)
    """Processes that read and decode images ahead; 0 reads them in between."""
    seed: int = 0
    """Of initialisation, data and noise."""

    def __post_init__(self):
        require(self.batch % self.rows == 0, f"a batch of {self.batch} in passes of {self.rows} rows", "micro to divide batch")
        require(not (self.shard and self.channels_last), "channels_last with shard", "one of the two", "parts of a tensor have no memory format")

    @property
    def rows(self) -> int:
        """Rows per pass."""
        return self.micro or self.batch

    @property
    def passes(self) -> int:
        """Passes per step, over all processes."""
        return self.batch // self.rows

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        return self.lr * warm * (0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.rate == "cosine" else 1.0)

    def decay_at(self, step: int) -> float:
        """Decay of the average after step 0, 1, ...: 0.5^(batch / half-life), the half-life ramped up with the images seen before."""
        if self.ema_half_life is None:
            return self.ema
        seen = step * self.batch
        half_life = self.ema_half_life if self.ema_rampup is None else min(self.ema_half_life, self.ema_rampup * seen)
        return 0.5 ** (self.batch / max(half_life, 1e-8))
