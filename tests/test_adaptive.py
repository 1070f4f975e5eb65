"""Step control: a Brownian path that rejections do not bend, tolerance for evaluations, samples that are their own."""

import math

import pytest
import torch

from contrastive_diffusion import schedules, solvers
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import dino
from contrastive_diffusion.errors import RunError
from contrastive_diffusion.parallel import Parallel
from contrastive_diffusion.sampling import Sequential
from contrastive_diffusion.solvers.adaptive import _clock, _Walker

GRID = schedules.grid(schedules.uniform(-8.0, 9.0), 20)


def test_pieces_of_the_path_are_brownian_however_they_are_cut(generator):
    """Increments over [0, 1], revealed at once, in halves, or after rejections at 0.6, 0.3 and 0.1: variance = time, independent, and adding up."""
    n = 40_000
    walker = _Walker(solvers.adaptive(), torch.zeros(n, 1, dtype=torch.float64), 0.0, 1.0)
    rows, start = torch.arange(n), torch.zeros(n, dtype=torch.float64)
    for cut in (1.0, 0.6, 0.3, 0.1):
        walker._reveal(rows, start, torch.full((n,), cut, dtype=torch.float64), torch.randn(n, 1, generator=generator, dtype=torch.float64))
    edges = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    pieces = walker.pieces[:4, :, 0].flip(0)
    expected = _clock(edges[:-1], edges[1:])
    assert bool((walker.depth == 4).all())
    torch.testing.assert_close(walker.targets[:4, 0].flip(0), edges[1:])
    error = 4.5 * expected * math.sqrt(2 / n)
    assert bool(((pieces.square().mean(1) - expected).abs() < error).all())
    normed = pieces / expected.sqrt()[:, None]
    assert float((normed @ normed.T / n - torch.eye(4, dtype=torch.float64)).abs().triu(1).max()) < 4.5 / n**0.5


def test_a_step_never_passes_a_known_point(generator):
    walker = _Walker(solvers.adaptive(), torch.zeros(3, 1), 0.0, 1.0)
    rows, start = torch.arange(3), torch.zeros(3, dtype=torch.float64)
    stop = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    noise = torch.randn(3, 1, generator=generator)
    assert walker._reveal(rows, start, stop, noise).equal(stop)
    before = walker.pieces[0].clone()
    assert walker._reveal(rows, start, 2 * stop, noise).equal(stop)
    assert walker.pieces[0].equal(before)
    assert walker.depth.tolist() == [1, 1, 1]


def test_tighter_tolerances_cost_more_and_are_nearer_the_truth():
    """Variance of N(0, 0.3^2) from 6000 samples; the loosest is off, the tightest within sampling error."""
    law, evals, errors = GaussianMixture(torch.zeros(1, 1), 0.3), [], []
    for relative in (0.5, 0.05, 0.01):
        drawn = Sequential(solvers.adaptive(relative, relative / 5))(law, GRID, (6000, 1), seed=1)
        evals.append(drawn.evals)
        errors.append(abs(float(drawn.x.double().square().mean()) / 0.09 - 1))
    assert evals == sorted(evals)
    assert errors[0] > 3 * errors[2]
    assert errors[2] < 4.5 * math.sqrt(2 / 6000)


def test_every_sample_is_its_own():
    solver = Sequential(solvers.adaptive())
    whole = solver(dino(), GRID, (6, 2), seed=3)
    parts = [solver(dino(), GRID, (1, 2), seed=3, first=k) for k in range(6)]
    assert torch.cat([p.x for p in parts]).equal(whole.x)
    assert sum(p.evals for p in parts) == whole.evals
    assert whole.rounds == max(p.rounds for p in parts)
    assert len({p.evals for p in parts}) > 1


def test_progress_rises_to_one_and_the_last_state_is_the_sample():
    states = list(Sequential(solvers.adaptive()).iterate(dino(), GRID, (3, 2), seed=3))
    progress = [s.progress for s in states]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    assert states[-1].z.equal(Sequential(solvers.adaptive())(dino(), GRID, (3, 2), seed=3).x)
    assert bool(torch.stack([s.logsnr for s in states]).diff(dim=0).min() >= 0)


def test_a_broken_denoiser_stops_it():
    with pytest.raises(RunError, match="non-finite"):
        Sequential(solvers.adaptive())(lambda z, a: z * math.nan, GRID, (2, 1))
    with pytest.raises(RunError, match="a smooth denoiser"):
        Sequential(solvers.adaptive())(lambda z, a: torch.sin(1e9 * z) * 1e6, GRID, (2, 1), dtype=torch.float64)


def test_parallel_says_why_not():
    with pytest.raises(ValueError, match="each sample chooses its own steps"):
        Parallel(solvers.adaptive())
