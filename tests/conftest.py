"""One thread, before torch is imported: two threads beside a busy process slow it a hundredfold."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

from contrastive_diffusion.data.mixtures import GaussianMixture

settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")
torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def gaussian() -> GaussianMixture:
    """N(0, 0.3^2) and N(0, 2^2) in two dimensions: everything about it is a one-line formula."""
    return GaussianMixture(torch.zeros(1, 2), torch.tensor([[0.3, 2.0]]))
