"""A DDPM++ of CIFAR-10's shape on 32 x 32 patches of photographs, fine-tuned plain and contrastive; wants a GPU.

The same questions as for digits, on colour images of CIFAR-10's size cut from ten photographs. `quick` shows on a CPU that it works.
"""

from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass as schema

from contrastive_diffusion.experiments._images import study
from contrastive_diffusion.recipes import STRICT, Images, Loss, Net
from contrastive_diffusion.training import Training


@schema(config=STRICT, frozen=True)
class Config:
    """Photo patches: DDPM++, plain and contrastive."""

    out: str = "runs/patches"
    """The run folder; the same command continues it."""
    edm: Net = Field(default_factory=lambda: Net(kind="ddpm++", width=64, blocks=2, mult=(2, 2, 2), attention=(16,), sigma_data=0.5, dropout=0.1))
    """The network, trained with EDM's loss."""
    images: Images = Field(default_factory=lambda: Images(holdout=512, flip=True))
    base: Training = Field(default_factory=lambda: Training(steps=20000, batch=256, lr=5e-4, warmup=1000, ema=0.999, precision="bfloat16"))
    """Training of the common start."""
    branch: Training = Field(default_factory=lambda: Training(steps=2000, batch=256, lr=2e-4, warmup=200, ema=0.999, seed=1, precision="bfloat16"))
    """Training of the contrastive branch; the plain one gets the steps that make the evaluations equal."""
    loss: Loss = Field(default_factory=lambda: Loss(contrastive=0.001))
    """Objective of the contrastive branch."""
    rows: int = Field(default=256, ge=2)
    """Held-out images that are measured."""
    evals: int = Field(default=64, ge=16)
    """Denoiser evaluations for each nll and each ratio."""
    steps: int = Field(default=200, ge=2)
    """DDPM steps."""
    samples: int = Field(default=256, ge=2)
    """Samples for each seed."""
    seeds: int = Field(default=2, ge=2)
    """Sampling seeds."""
    tolerance: float = Field(default=0.05, ge=0)
    """Of the parallel sampler."""
    device: str = "cuda"
    """cpu or cuda."""
    jobs: int = Field(default=1, ge=1)
    """Processes, one thread each."""


def run(config: Config) -> Path:
    """Trains, measures, samples; returns the run folder."""
    return study(config, "patches", "Photo patches: plain and contrastive", "patches", {"ddpm++": (config.edm, "edm")})
