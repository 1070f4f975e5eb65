"""Denoiser in, denoiser out: each against a closed form."""

import math

import pytest
import torch

from contrastive_diffusion import channel, schedules, solvers
from contrastive_diffusion.combinators import (
    aligned_levels,
    calibrated,
    clamped,
    guided,
    inpaint,
    likely_levels,
    mean_outputs,
    relevelled,
    thresholded,
)
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import dino
from contrastive_diffusion.denoisers import Counted, evaluate, finest_of, from_timesteps, noised
from contrastive_diffusion.likelihood import mse_curve
from contrastive_diffusion.parallel import Parallel
from contrastive_diffusion.sampling import Sequential

LEVELS = torch.tensor([-6.0, -2.0, 0.0, 3.0, 7.0], dtype=torch.float64)


def _gaussian(covariance: torch.Tensor, mean: torch.Tensor):
    """The exact denoiser of N(mean, covariance)."""

    def denoiser(z, logsnr):
        s, n = channel.signal(logsnr)[:, None, None], channel.noise(logsnr)[:, None, None]
        total = (s**2 * covariance + n**2 * torch.eye(len(covariance), dtype=z.dtype)).to(z.dtype)
        return (n * torch.linalg.solve(total, (z - s[:, 0] * mean.to(z.dtype))[..., None]))[..., 0]

    return denoiser


COVARIANCE = torch.tensor([[1.0, 0.8, -0.3], [0.8, 1.2, 0.1], [-0.3, 0.1, 0.5]], dtype=torch.float64)
MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)


def _conditional(mask: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of N(MEAN, COVARIANCE) given the masked coordinates."""
    gain = COVARIANCE[:, mask] @ torch.linalg.inv(COVARIANCE[mask][:, mask])
    return MEAN + gain @ (y[mask] - MEAN[mask]), COVARIANCE - gain @ COVARIANCE[mask]


@pytest.mark.parametrize("mask", [[True, False, False], [True, False, True]])
def test_inpainting_is_the_exact_denoiser_of_the_conditional_gaussian(mask, generator):
    mask, y = torch.tensor(mask), torch.tensor([1.5, 0.0, -0.7], dtype=torch.float64)
    mean, covariance = _conditional(mask, y)
    z = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    ours = inpaint(_gaussian(COVARIANCE, MEAN), y, mask, iterations=int(mask.sum()))(z, LEVELS)
    torch.testing.assert_close(ours, _gaussian(covariance, mean)(z, LEVELS), rtol=1e-8, atol=1e-8)
    replaced = inpaint(_gaussian(COVARIANCE, MEAN), y, mask, iterations=0)(z, LEVELS)
    torch.testing.assert_close(replaced[:, mask], ours[:, mask])
    assert float((replaced - ours).abs().max()) > 0.05


@pytest.mark.parametrize("solver", [solvers.heun(), solvers.ddpm2(), solvers.dpmpp(True)], ids=lambda s: s.name)
def test_inpainted_samples_follow_the_conditional_law(solver):
    mask, y, n = torch.tensor([True, False, False]), torch.tensor([1.5, 0.0, 0.0]), 1500
    mean, covariance = _conditional(mask, y.double())
    grid = schedules.grid(schedules.uniform(-9, 9), 60)
    x = Sequential(solver)(inpaint(_gaussian(COVARIANCE, MEAN), y, mask, 1), grid, (n, 3), seed=2).x.double()
    torch.testing.assert_close(x[:, 0], torch.full((n,), 1.5, dtype=torch.float64), rtol=0, atol=1e-5)
    free = (x - mean)[:, 1:]
    products = free[:, :, None] * free[:, None, :]
    assert bool((free.mean(0).abs() < 4.5 * free.std(0) / n**0.5).all())
    assert bool(((products.mean(0) - covariance[1:, 1:]).abs() < 4.5 * products.std(0) / n**0.5).all())


def test_inpainting_keeps_rows_independent_and_takes_values_per_row(generator):
    mask = torch.tensor([True, False, False])
    z, known = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    base = _gaussian(COVARIANCE, MEAN)
    whole = inpaint(base, known, mask, 3)(z, LEVELS)
    for k in range(5):
        torch.testing.assert_close(inpaint(base, known[k], mask, 3)(z[k : k + 1], LEVELS[k : k + 1])[0], whole[k])


def test_guidance_of_two_gaussians_is_the_gaussian_between_or_beyond_them(generator):
    """N(m, 1) against N(0, 1): weight w is the exact denoiser of N(w m, 1)."""
    one, free = GaussianMixture(torch.tensor([[1.0, -0.5]]), 1.0), GaussianMixture(torch.zeros(1, 2), 1.0)
    z = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    for weight in (0.0, 0.4, 1.0, 3.0):
        expected = GaussianMixture(torch.tensor([[1.0, -0.5]]) * weight, 1.0)
        torch.testing.assert_close(guided(one, free, weight)(z, LEVELS), expected(z, LEVELS))
    x = Sequential(solvers.heun())(guided(one, free, 2.0), schedules.grid(schedules.uniform(-12, 9), 40), (2000, 2)).x
    assert x.mean(0).tolist() == pytest.approx([2.0, -1.0], abs=4.5 / 2000**0.5)
    assert x.var(0).tolist() == pytest.approx([1.0, 1.0], abs=4.5 * (2 / 2000) ** 0.5)


class _PerRow:
    """A denoiser bound to a mean for each row, as one with labels is."""

    def __init__(self, means):
        self.means = means

    def take(self, index):
        return _PerRow(self.means[index])

    def __call__(self, z, logsnr):
        assert len(z) == len(self.means)
        s, n = channel.per_row(channel.signal(logsnr), z), channel.per_row(channel.noise(logsnr), z)
        return n * (z - s * self.means)


def test_combinators_keep_the_labels_of_rows_in_chunks(generator):
    """In calls of two rows each row meets its own label, and its own known values."""
    z, means, known = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    base, mask = _PerRow(means), torch.tensor([True, False])
    levels = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    for denoiser in (
        base, clamped(base, 0.5), guided(base, _PerRow(0 * means), 2.0, (-3.0, 1.0)), inpaint(base, known, mask, 2),
        relevelled(base, levels, levels + 0.5), calibrated(base, levels, torch.ones(2, 2, dtype=torch.float64)),
    ):  # fmt: skip
        torch.testing.assert_close(evaluate(denoiser, z, LEVELS, 2), evaluate(denoiser, z, LEVELS))


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_every_solver_keeps_the_labels_of_rows(name, generator):
    """Five rows, five labels, calls of two rows: as each row on its own."""
    means = torch.randn(5, 2, generator=generator)
    grid, solver = schedules.grid(schedules.uniform(-6, 6), 6), solvers.SOLVERS[name]()
    whole = Sequential(solver, max_rows=2)(_PerRow(means), grid, (5, 2), seed=1)
    rows = [Sequential(solver)(_PerRow(means[k : k + 1]), grid, (1, 2), seed=1, first=k) for k in range(5)]
    torch.testing.assert_close(whole.x, torch.cat([r.x for r in rows]))
    assert whole.evals == sum(r.evals for r in rows)
    if not solver.alone:
        shared = Parallel(solver, window=4, tolerance=0.0, lanes=3, max_rows=2)(_PerRow(means), grid, (5, 2), seed=1, verify=True)
        torch.testing.assert_close(shared.x, whole.x)
        assert shared.defect is not None
        assert float(shared.defect.max()) < 1e-3


def test_guidance_on_an_interval_is_conditional_outside_and_costs_two_inside(generator):
    one, free = Counted(GaussianMixture(torch.tensor([[1.0]]), 1.0)), Counted(GaussianMixture(torch.zeros(1, 1), 1.0))
    z = torch.randn(5, 1, generator=generator, dtype=torch.float64)
    out = guided(one, free, 3.0, (-3.0, 1.0))(z, LEVELS)
    torch.testing.assert_close(out[[0, 3, 4]], one.denoiser(z, LEVELS)[[0, 3, 4]])
    torch.testing.assert_close(out[[1, 2]], guided(one.denoiser, free.denoiser, 3.0)(z, LEVELS)[[1, 2]])
    assert (one.rows, free.rows) == (7, 2)
    guided(one, free, 1.0)(z, LEVELS)
    assert free.rows == 2


def test_clamping_acts_on_x_hat(generator):
    law = dino()
    z = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    for limit in (0.3, 50.0):
        x = channel.x_from_eps(z, LEVELS, clamped(law, limit)(z, LEVELS))
        torch.testing.assert_close(x, channel.x_from_eps(z, LEVELS, law(z, LEVELS)).clamp(-limit, limit))
    assert finest_of(clamped(law)) == finest_of(law)


def test_clamping_keeps_a_learned_variance():
    denoiser = from_timesteps(lambda z, t: torch.cat([z, torch.sin(z)], 1), schedules.ddpm(), learned=True)
    z, level = torch.linspace(-3, 3, 5, dtype=torch.float64)[:, None], torch.zeros(5, dtype=torch.float64)
    eps_hat, v = clamped(denoiser, 0.1).ranged(z, level)  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(eps_hat, clamped(denoiser, 0.1)(z, level))
    torch.testing.assert_close(v, torch.sin(z))


def test_relevelling_reads_another_level_and_interpolates_the_shift(generator):
    law, z = dino(), torch.randn(5, 2, generator=generator, dtype=torch.float64)
    nominal, fed = torch.tensor([-2.0, 0.0, 4.0]), torch.tensor([-1.0, 0.0, 2.0])
    shift = torch.tensor([1.0, 1.0, 0.0, -1.5, -2.0], dtype=torch.float64)
    torch.testing.assert_close(relevelled(law, nominal, fed)(z, LEVELS), law(z, LEVELS + shift))
    torch.testing.assert_close(relevelled(law, nominal[:1], fed[:1])(z, LEVELS), law(z, LEVELS + 1.0))


def test_likely_levels_find_how_noisy_points_are(generator):
    """States that claim to be at their nominal level, and are not: the level found is the true one."""
    law = GaussianMixture(torch.randn(4, 32, generator=generator), 0.3)
    nominal, truth = torch.tensor([-1.0, 1.0, 4.0], dtype=torch.float64), torch.tensor([-0.4, 1.0, 2.8], dtype=torch.float64)
    states = torch.stack([noised(law.sample(64, generator), float(level), generator) for level in truth])
    found = likely_levels(law, states, nominal, evals=9 * 32, generator=generator)
    assert found.tolist() == pytest.approx(truth.tolist(), abs=0.15)


@pytest.mark.parametrize("std", [0.3, 2.0])
def test_aligned_levels_make_large_steps_exact_for_a_gaussian(std):
    """Four points with exactly the variance of the law: after DDIM's steps at the aligned levels they have it still."""
    law = GaussianMixture(torch.zeros(1, 1), std)
    grid = torch.tensor([-5.0, -3.0, -1.0, 1.0, 3.0, 5.0], dtype=torch.float64)
    scale = (channel.signal(grid).square() * std**2 + channel.noise(grid).square()).sqrt()
    start = scale[0] * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    fed = aligned_levels(law, solvers.ddim(), grid, start, std**2)
    plain, corrected = (
        list(_steps(denoiser, grid, start)) for denoiser in (law, relevelled(law, grid[:-1], fed))
    )  # fmt: skip
    torch.testing.assert_close(torch.stack([z[0, 0] for z in corrected]), scale[1:], rtol=1e-9, atol=1e-9)
    assert abs(float(plain[-1][0, 0] / scale[-1]) - 1) > 0.05


def _steps(denoiser, grid, start):
    from contrastive_diffusion.sampling import walk
    from contrastive_diffusion.solvers import StepMap

    return walk(StepMap(solvers.ddim(), denoiser, grid), start, lambda i: start)


def test_calibration_takes_out_a_bias_and_lowers_the_error_by_its_square(generator):
    law = dino()
    bias = lambda a: torch.stack([0.3 + 0.1 * a, 0.05 * a], 1)  # noqa: E731
    biased = lambda z, a: law(z, a) + bias(a).to(z.dtype)  # noqa: E731
    x, levels = law.sample(4000, generator, torch.float64), torch.tensor([-6.0, 0.0, 8.0], dtype=torch.float64)
    means = mean_outputs(biased, x, levels, evals=4, generator=generator)
    error = 4.5 / (4000 * 2) ** 0.5  # eps_hat has variance at most 1; the pairs' mean less
    assert float((means - bias(levels)).abs().max()) < error
    repaired = calibrated(biased, levels, means)
    at = torch.tensor([-3.0, 4.0], dtype=torch.float64)
    before, after, best = (
        mse_curve(d, x[:500], at, 64, torch.Generator().manual_seed(3)).mean.mean(0) for d in (biased, repaired, law)
    )  # fmt: skip
    torch.testing.assert_close(before - after, bias(at).square().sum(1), rtol=0.1, atol=0.02)
    torch.testing.assert_close(after, best, rtol=0.02, atol=0.005)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clamped(dino(), 0.0), "limit > 0"),
        (lambda: thresholded(dino(), 1.5), "0 < ratio <= 1"),
        (lambda: thresholded(dino())(torch.zeros(2, 2), torch.zeros(2)), r"given thresholding of rows of shape \(2,\), expected images"),
        (lambda: guided(dino(), dino(), -1.0), "weight >= 0"),
        (lambda: guided(dino(), dino(), 2.0, (3.0, 1.0)), "low < high"),
        (lambda: inpaint(dino(), torch.zeros(2), torch.zeros(2, dtype=torch.bool)), "a bool mask with some True"),
        (lambda: inpaint(dino(), torch.zeros(3), torch.tensor([True, False])), r"known \(\*S\) or \(B, \*S\)"),
        (lambda: inpaint(dino(), torch.tensor([math.nan, 0.0]), torch.tensor([True, False])), "finite values where the mask is True"),
        (lambda: inpaint(dino(), torch.zeros(3), torch.tensor([True, False, True]))(torch.zeros(2, 2), torch.zeros(2)), "the shape of z's rows"),
        (lambda: relevelled(dino(), torch.tensor([1.0, 0.0]), torch.zeros(2)), "increasing log-SNRs"),
        (lambda: likely_levels(dino(), torch.zeros(2, 4, 2), torch.zeros(3)), "L levels"),
        (lambda: aligned_levels(dino(), solvers.heun(), torch.arange(3.0), torch.zeros(2, 2), 1.0), "a one-step affine solver"),  # pyright: ignore
        (lambda: calibrated(dino(), torch.zeros(2), torch.zeros(2, 2)), "increasing levels"),
        (lambda: mean_outputs(dino(), torch.zeros(2, 2), torch.zeros(1), evals=3), "an even number"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
