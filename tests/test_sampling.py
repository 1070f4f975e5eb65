"""Noise from counters, the sequential sampler, and the parallel one that must equal it to the bit."""

import math

import pytest
import torch

from contrastive_diffusion import schedules, solvers
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import dino, two_modes
from contrastive_diffusion.denoisers import Counted, from_timesteps
from contrastive_diffusion.errors import RunError
from contrastive_diffusion.parallel import Paradigms, Parallel
from contrastive_diffusion.sampling import START, Sequential, in_batches, normal
from contrastive_diffusion.sampling.noise import MASK, philox

STEPS = {
    "ddpm-posterior": solvers.ddpm(),
    "ddpm-beta": solvers.ddpm("beta"),
    "ddim-0": solvers.ddim(),
    "ddim-0.5": solvers.ddim(0.5),
    "euler": solvers.euler(),
    "heun": solvers.heun(),
}
every = pytest.mark.parametrize("solver", STEPS.values(), ids=STEPS)
GRID = schedules.grid(schedules.ddpm(), 60)


def _words(value: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    w = torch.full((1,), value, dtype=torch.int64)
    return w, w, w, w


def test_philox_known_answers():
    """Random123's test vectors."""
    assert [int(v) for v in philox(_words(0), (0, 0))] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(v) for v in philox(_words(MASK), (MASK, MASK))] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_few_values_are_philox_and_box_muller():
    """Up to four are those of the words themselves, in either precision."""
    w = [int(v) for v in philox(tuple(torch.tensor([v]) for v in (0, 6, 3, 1)), (9, 0))]
    radius, turn = ([-2 * math.log((w[k] + 0.5) / 2**32) for k in (0, 2)], [2 * math.pi * (w[k] + 0.5) / 2**32 for k in (1, 3)])
    expected = [math.sqrt(r) * f(a) for r, a in zip(radius, turn, strict=True) for f in (math.cos, math.sin)]
    for size in (1, 2, 3, 4):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            assert normal(9, torch.tensor([3 + 2**32]), torch.tensor([5]), (size,), dtype)[0].tolist() == pytest.approx(
                expected[:size], abs=tolerance
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lag", [(0, 1), (1, 0), (5, 7)])
def test_many_values_are_independent(lag, dtype):
    """Pairs of values near one another in the row, or in rows of neighbouring samples: their joint histogram in quantiles is flat."""
    values = normal(11, torch.arange(300), torch.full((300,), 3), (3, 32, 32), dtype).flatten(1).double()
    bins = (128 * (1 + torch.erf(values / math.sqrt(2)))).long().clamp(0, 255)
    first, second = bins[lag[0] :, lag[1] :].flatten(), bins[: len(bins) - lag[0], : bins.shape[1] - lag[1]].flatten()
    counts = torch.bincount(256 * first + second, minlength=2**16).double()
    excess = ((counts - counts.mean()).square() / counts.mean()).sum() - (2**16 - 1)
    assert abs(float(excess)) < 4.5 * math.sqrt(2 * 2**16)


def test_the_tails_are_those_of_a_normal_law():
    n, values = 3072 * 2000, normal(2, torch.arange(2000), torch.zeros(2000, dtype=torch.int64), (3072,)).double()
    for edge in (3.0, 4.0, 4.5):
        expected = n * math.erfc(edge / math.sqrt(2))
        assert abs(int((values.abs() > edge).sum()) - expected) < 4.5 * math.sqrt(expected)
    assert float(values.abs().max()) < 7


@pytest.mark.parametrize("shape", [(5,), (2,), (3,), (2, 32)])
def test_noise_is_standard_normal_and_uncorrelated(shape):
    n = 100_000
    values = normal(7, torch.arange(n), torch.full((n,), 3), shape).flatten(1)[:, :5].double()
    se = 1 / math.sqrt(n)
    assert values.mean(0).abs().max() < 4.5 * se
    assert (values.var(0) - 1).abs().max() < 4.5 * se * math.sqrt(2)
    assert (values.pow(4).mean(0) - 3).abs().max() < 4.5 * se * math.sqrt(96)
    assert (values.T.cov() - torch.diag(values.var(0))).abs().max() < 4.5 * se
    for other in (normal(7, torch.arange(n), torch.full((n,), 4), shape), normal(8, torch.arange(n), torch.full((n,), 3), shape)):
        assert (values * other.flatten(1)[:, :5].double()).mean(0).abs().max() < 4.5 * se


def test_noise_is_a_function_of_seed_sample_and_step_only():
    ids, steps = torch.arange(10), torch.tensor([START, 0, 1, 999, 5, 6, 7, 8, 9, 10])
    whole = normal(1, ids, steps, (3, 2))
    order = torch.randperm(10)
    assert normal(1, ids[order], steps[order], (3, 2)).equal(whole[order])
    assert normal(1, ids[3:4], steps[3:4], (3, 2)).equal(whole[3:4])
    assert not normal(2, ids, steps, (3, 2)).equal(whole)
    assert not normal(1, ids + 2**32, steps, (3, 2)).equal(whole)


@pytest.mark.parametrize("solver", [*STEPS.values(), solvers.dpmpp(), solvers.dpmpp(stochastic=True)], ids=lambda s: s.name)
def test_sequential_does_not_depend_on_the_batch(solver):
    whole = Sequential(solver)(dino(), GRID, (7, 2), seed=3).x
    assert Sequential(solver, max_rows=2)(dino(), GRID, (3, 2), seed=3, first=2).x.equal(whole[2:5])


@pytest.mark.parametrize(("solver", "tolerance"), [(solvers.ddpm(), 0.03), (solvers.ddim(), 0.03), (solvers.heun(), 0.03)])
def test_samples_follow_the_law(solver, tolerance):
    """Two unequal modes: their shares, means and spreads."""
    law = GaussianMixture(torch.tensor([[-1.5], [1.0]]), torch.tensor([0.2, 0.5]), torch.tensor([0.3, 0.7]))
    grid = schedules.grid(schedules.ddpm() if solver.noisy else schedules.karras(), 200)
    x = Sequential(solver)(law, grid, (4000, 1), seed=0).x
    low = x < -0.6
    assert float(low.float().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))
    assert float(x[low].mean()) == pytest.approx(-1.5, abs=0.04)
    assert float(x[~low].std()) == pytest.approx(0.5, abs=tolerance)


@pytest.mark.parametrize(
    "sampler", [Sequential(solvers.ddpm()), Parallel(solvers.ddpm()), Parallel(solvers.ddpm(), window=9), Paradigms(solvers.ddpm())]
)
def test_evals_and_rounds_are_what_happened(sampler):
    counted, seen = Counted(two_modes()), []
    drawn = sampler(counted, GRID, (6, 1), watch=seen.append)
    assert (drawn.evals, drawn.rounds) == (counted.rows, len(seen))


def test_heun_counts_two_rounds_a_step_and_one_at_the_last():
    drawn = Sequential(solvers.heun())(two_modes(), schedules.grid(schedules.karras(), 18), (3, 1))
    assert (drawn.evals, drawn.rounds) == (3 * 35, 35)


@pytest.mark.parametrize(
    "solver", [solvers.ddpm(), solvers.heun(), solvers.dpmpp(), solvers.ddpm2(), solvers.predictor_corrector()], ids=lambda s: s.name
)
def test_iterating_is_the_path(solver):
    drawn = Sequential(solver)(dino(), GRID, (3, 2), seed=4, path=True)
    states = list(Sequential(solver).iterate(dino(), GRID, (3, 2), seed=4))
    assert drawn.path is not None
    assert torch.stack([s.z for s in states]).equal(drawn.path[1:])
    assert [s.number for s in states] == list(range(1, 61))
    assert states[-1].progress == 1.0
    assert torch.stack([s.logsnr[0] for s in states]).equal(GRID[1:])


def test_iterating_can_be_left_and_leaks_no_mode():
    """Stopping early costs what was done; gradients are on again between states, and off inside."""
    counted = Counted(lambda z, a: z * float(not torch.is_grad_enabled()))
    for state in Sequential(solvers.heun()).iterate(counted, GRID, (2, 2)):
        assert torch.is_grad_enabled()
        assert not state.z.requires_grad
        if state.number == 5:
            break
    assert counted.rows == 2 * 10


def test_iterating_checks_before_the_first_state():
    with pytest.raises(ValueError, match="every size >= 1"):
        Sequential(solvers.ddpm()).iterate(dino(), GRID, (0, 2))


def test_batches_are_the_samples_of_one_batch():
    whole = Sequential(solvers.ddpm())(dino(), GRID, (7, 2), seed=2)
    parts = in_batches(Sequential(solvers.ddpm()), dino(), GRID, (7, 2), seed=2, batch=3)
    assert parts.x.equal(whole.x)
    assert (parts.evals, parts.rounds) == (whole.evals, 3 * whole.rounds)
    with pytest.raises(ValueError, match="batch >= 1"):
        in_batches(Sequential(solvers.ddpm()), dino(), GRID, (7, 2), batch=0)


@pytest.mark.parametrize(("calls", "rows"), [(150, 6), (61, 3), (30, None)])
def test_ctrl_c_gives_back_what_is_finished(calls, rows):
    def interrupted(z, logsnr):
        interrupted.count += 1
        if interrupted.count > calls:
            raise KeyboardInterrupt
        return dino()(z, logsnr)

    interrupted.count = 0
    task = lambda: in_batches(Sequential(solvers.ddim()), interrupted, GRID, (9, 2), seed=2, batch=3)  # noqa: E731
    if rows is None:
        with pytest.raises(KeyboardInterrupt):
            task()
    else:
        assert task().x.equal(Sequential(solvers.ddim())(dino(), GRID, (rows, 2), seed=2).x)


@pytest.mark.parametrize(
    ("solver", "grid", "message"),
    [
        (solvers.heun(), schedules.grid(schedules.karras(0.02, 80.0), 10), "between its timesteps"),
        (solvers.edm(churn=5.0), schedules.spaced(schedules.ddpm(), 10), "a solver that reads the grid's levels only"),
        (solvers.adaptive(), schedules.spaced(schedules.ddpm(), 10), "a solver that reads the grid's levels only"),
    ],
)
def test_a_timestep_network_without_interpolation_is_read_at_its_timesteps_only(solver, grid, message):
    net = lambda z, t: torch.zeros_like(z)  # noqa: E731
    rounded, smooth = (from_timesteps(net, schedules.ddpm(), rounded=r) for r in (True, False))
    with pytest.raises(ValueError, match=message):
        Sequential(solver)(rounded, grid, (2, 2))
    Sequential(solver)(smooth, grid, (2, 2))
    Sequential(solvers.heun())(rounded, schedules.spaced(schedules.ddpm(), 10), (2, 2))


def test_watching_is_not_timed():
    import time

    drawn = Sequential(solvers.ddim())(two_modes(), schedules.grid(schedules.ddpm(), 5), (1, 1), watch=lambda _: time.sleep(0.2))
    assert drawn.seconds < 0.5


@pytest.mark.parametrize("sampler", [Sequential(solvers.ddpm()), Parallel(solvers.ddpm()), Paradigms(solvers.ddpm())])
def test_the_type_of_the_state_is_kept(sampler):
    assert sampler(two_modes(), GRID, (2, 1), dtype=torch.float64).x.dtype == torch.float64
    assert sampler(lambda z, a: two_modes()(z.flatten(1), a).reshape(z.shape), GRID, (2, 1, 1, 1)).x.shape == (2, 1, 1, 1)


@pytest.mark.parametrize(
    "sampler", [Sequential(solvers.ddpm()), Parallel(solvers.ddpm()), Parallel(solvers.ddpm(), window=8), Paradigms(solvers.ddpm(), 8)]
)
def test_a_nan_stops_and_says_where(sampler):
    def broken(z, logsnr):
        return torch.where((logsnr > 3)[:, None] & (z > 0), math.nan, two_modes()(z, logsnr))

    with pytest.raises(RunError, match=r"non-finite state of sample \d+ at step \d+, round \d+"):
        sampler(broken, GRID, (8, 1), first=100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sequential(solvers.ddpm())(dino(), GRID, (0, 2)), "every size >= 1"),
        (lambda: Sequential(solvers.ddpm())(dino(), GRID, (3,)), r"expected \(B, \*S\)"),
        (lambda: Sequential(solvers.ddpm())(dino(), GRID, (3, 2), seed=-1), "both >= 0"),
        (lambda: Sequential(solvers.ddpm())(dino(), GRID.flip(0), (3, 2)), "increasing"),
        (lambda: Sequential(solvers.ddpm())(dino(), GRID, (3, 5)), r"expected a floating-point batch \(B, 2\)"),
    ],
)
def test_bad_sampling_is_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
