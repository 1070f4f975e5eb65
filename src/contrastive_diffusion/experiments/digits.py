"""Two image networks on 8 x 8 digits, fine-tuned plain and contrastive, sampled in sequence and in parallel.

A small DDPM++ (EDM's preconditioning and loss) and a small U-Net of Ho et al. (DDPM's loss) are trained on scikit-learn's digits, then
continued in two branches at equal denoiser evaluations. Held-out digits tell the denoising error over log-SNR, the nll and how well the
network tells noise levels apart.
"""

from pathlib import Path

from pydantic import Field
from pydantic.dataclasses import dataclass as schema

from contrastive_diffusion.experiments._images import study
from contrastive_diffusion.recipes import STRICT, Images, Loss, Net
from contrastive_diffusion.training import Training


@schema(config=STRICT, frozen=True)
class Config:
    """Digits: DDPM++ and DDPM, plain and contrastive."""

    out: str = "runs/digits"
    """The run folder; the same command continues it."""
    edm: Net = Field(default_factory=lambda: Net(kind="ddpm++", width=16, blocks=1, mult=(1, 2), attention=(4,), sigma_data=0.75))
    """The network trained with EDM's loss."""
    ddpm: Net = Field(default_factory=lambda: Net(kind="ddpm", width=32, blocks=1, mult=(1, 1), attention=()))
    """The network trained with DDPM's loss."""
    images: Images = Field(default_factory=lambda: Images(holdout=297))
    base: Training = Field(default_factory=lambda: Training(steps=1200, batch=128, lr=2e-3, warmup=100, ema=0.995))
    """Training of the common start."""
    branch: Training = Field(default_factory=lambda: Training(steps=300, batch=128, lr=5e-4, warmup=30, ema=0.99, seed=1))
    """Training of the contrastive branch; the plain one gets the steps that make the evaluations equal."""
    loss: Loss = Field(default_factory=lambda: Loss(contrastive=0.02))
    """Objective of the contrastive branch; its denoising part is that of the network."""
    rows: int = Field(default=200, ge=2)
    """Held-out images that are measured."""
    evals: int = Field(default=64, ge=16)
    """Denoiser evaluations for each nll and each ratio."""
    steps: int = Field(default=100, ge=2)
    """DDPM steps."""
    samples: int = Field(default=128, ge=2)
    """Samples for each seed."""
    seeds: int = Field(default=2, ge=2)
    """Sampling seeds."""
    tolerance: float = Field(default=0.05, ge=0)
    """Of the parallel sampler."""
    device: str = "cpu"
    """cpu or cuda."""
    jobs: int = Field(default=2, ge=1)
    """Processes, one thread each."""


def run(config: Config) -> Path:
    """Trains, measures, samples; returns the run folder."""
    nets = {"ddpm++": (config.edm, "edm"), "ddpm": (config.ddpm, "ddpm")}
    return study(config, "digits", "Digits: two image networks, plain and contrastive", "digits", nets)  # pyright: ignore[reportArgumentType]
