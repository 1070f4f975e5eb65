"""Estimates against closed forms. z-scores are pooled over rows and repeats; every bound is in standard errors or nats of the issue's targets."""

import math

import pytest
import scipy.stats
import torch

from contrastive_diffusion import metrics
from contrastive_diffusion.channel import corrupt
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import dino, two_modes
from contrastive_diffusion.denoisers import Counted, noised, unit_noise
from contrastive_diffusion.errors import RunError, UsageError
from contrastive_diffusion.likelihood import (
    control,
    credible_interval,
    densities,
    discrete_nll,
    llr,
    mse_curve,
    nll,
    noise_posterior,
    ood_score,
    points,
)

LAWS = {"dino": dino, "two-modes": two_modes}
ZETAS = (-6.0, 0.0, 6.0, 9.0, 12.0, 15.0)


def _points(law, label: int, zeta: float, n: int, generator) -> torch.Tensor:
    x = law.sample(n, generator, torch.float64)
    return x if label > 0 else noised(x, zeta, generator)


@pytest.mark.parametrize("zeta", ZETAS)
@pytest.mark.parametrize("label", [1, -1])
@pytest.mark.parametrize("name", LAWS)
def test_llr_is_the_closed_form(name, label, zeta, generator):
    law = LAWS[name]()
    x = _points(law, label, zeta, 8, generator).repeat(50, 1)
    result = llr(law, x, zeta, 128, generator)
    truth = law.llr(x, zeta)
    error = result.mean - truth
    assert result.evals == 128
    # the mean over all rows within four of its own standard errors (from the spread over rows, and from the reported errors)
    assert abs(float(error.mean())) <= 4 * float(error.std()) / 20
    assert abs(float(error.mean())) <= 4 * float(result.stderr.square().mean().sqrt()) / 20
    # half of it, or twice it, would not do, where the truth is larger than the noise
    mean, exact, noise = result.mean.reshape(50, 8).mean(0), truth[:8], error.reshape(50, 8).std(0) / math.sqrt(50)
    clear = exact.abs() > 20 * noise
    assert ((mean / exact - 1).abs() < 0.25)[clear].all()
    assert clear.any() or label * zeta in (0.0, 6.0)


@pytest.mark.parametrize("label", [1, -1])
@pytest.mark.parametrize("name", LAWS)
def test_the_standard_error_is_calibrated(name, label, generator):
    """Its square is the mean squared error. (Single z-scores are skewed: what is rare makes both the error and its estimate large.)"""
    law, ratios = LAWS[name](), []
    for zeta in ZETAS:
        x = _points(law, label, zeta, 8, generator).repeat(50, 1)
        result = llr(law, x, zeta, 512, generator)
        ratios.append(float(((result.mean - law.llr(x, zeta)).square().mean() / result.stderr.square().mean()).sqrt()))
    assert all(0.5 < ratio < 1.3 for ratio in ratios), ratios
    assert 0.8 < sum(ratios) / len(ratios) < 1.12, ratios


@pytest.mark.parametrize(("zeta", "bound"), [(9.0, 0.12), (12.0, 0.012), (15.0, 0.0008)])
def test_llr_deviates_little_on_dino(zeta, bound, generator):
    """At 128 evaluations. Independent draws with one law for all zeta deviate by 2, 2 and 2 nats."""
    law = dino()
    x = law.sample(40, generator).repeat(25, 1)
    error = llr(law, x, zeta, 128, generator).mean - law.llr(x, zeta)
    assert float(error.square().mean().sqrt()) <= bound


def test_llr_takes_a_zeta_for_each_row_and_any_shape(generator):
    law = GaussianMixture(torch.zeros(1, 3, 2, 2), 0.5)
    x, zeta = law.sample(300, generator, torch.float64), torch.linspace(-4, 6, 300)
    error = llr(law, x, zeta, 256, generator).mean - law.llr(x, zeta)
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(300)


def test_llr_is_right_wherever_the_plateau_is_put(generator):
    law = dino()
    x = law.sample(10, generator, torch.float64).repeat(60, 1)
    for finest in (4.0, 16.0):
        error = llr(law, x, 6.0, 256, generator, finest=finest).mean - law.llr(x, 6.0)
        assert abs(float(error.mean())) <= 4 * float(error.std()) / math.sqrt(600)


def test_llr_is_differentiable_and_its_gradient_is_that_of_the_ratio(generator):
    """For the denoiser of N(0, s^2) the ratio's derivative in log s is known."""
    x = torch.full((4000, 1), 0.8, dtype=torch.float64)
    log_s = torch.tensor(math.log(0.5), dtype=torch.float64, requires_grad=True)

    def denoiser(z, logsnr):
        signal2, noise2 = torch.sigmoid(logsnr)[:, None], torch.sigmoid(-logsnr)[:, None]
        return noise2.sqrt() * z / (signal2 * torch.exp(2 * log_s) + noise2)

    zeta = 1.0
    (gradient,) = torch.autograd.grad(llr(denoiser, x, zeta, 64, generator, finest=1.4).mean.mean(), log_s)
    with torch.enable_grad():
        s2 = torch.exp(2 * log_s)
        noisy = s2 * torch.sigmoid(torch.tensor(zeta, dtype=torch.float64)) + torch.sigmoid(torch.tensor(-zeta, dtype=torch.float64))
        exact = -0.5 * (noisy.log() + 0.64 / noisy) + 0.5 * (s2.log() + 0.64 / s2)
        (truth,) = torch.autograd.grad(exact, log_s)
    assert float(gradient) == pytest.approx(float(truth), rel=0.06)


@pytest.mark.parametrize("name", LAWS)
def test_nll_is_the_closed_form(name, generator):
    law = LAWS[name]()
    x = law.sample(8, generator, torch.float64).repeat(60, 1)
    spectrum = torch.linalg.eigvalsh(law.covariance()).log()
    for chosen in (None, spectrum):
        result = nll(law, x, 256, generator, spectrum=chosen)
        error = result.mean - law.nll(x)
        assert abs(float(error.mean())) <= 4 * float(error.std()) / math.sqrt(480)
        assert 0.5 < float((error.square().mean() / result.stderr.square().mean()).sqrt()) < 1.3


def test_noise_posterior_is_the_exact_one(generator):
    law, levels = dino(), torch.tensor([-4.0, 0.0, 3.0, 6.0, 9.0])
    x = torch.cat([noised(law.sample(6, generator), float(level), generator) for level in levels])
    exact = torch.stack([law.log_prob(x, float(level)) for level in levels], 1).log_softmax(1)
    estimate = noise_posterior(law, x, levels, 20_000, generator)
    assert estimate.shape == (30, 5)
    torch.testing.assert_close(estimate.exp().sum(1), torch.ones(30))
    assert float((estimate.exp() - exact.exp()).abs().sum(1).mean() / 2) < 0.06


@pytest.mark.parametrize(("name", "bound"), [("two-modes", 0.02), ("mixture", 0.02), ("dino", 0.035)])
def test_noise_posterior_is_close_at_a_thousand_evaluations(name, bound, generator):
    """Total variation; Dino's 142 narrow components are the hard case (docs/findings.md)."""
    law = GaussianMixture(torch.randn(10, 64, generator=generator), 0.3) if name == "mixture" else LAWS[name]()
    levels = torch.linspace(-4, 9, 5)
    x = torch.cat([noised(law.sample(20, generator).float(), float(level), generator) for level in levels])
    exact = torch.stack([law.log_prob(x.double(), float(level)) for level in levels], 1).softmax(1)
    counted = Counted(law)
    estimate = noise_posterior(counted, x, levels, 1024, generator)
    assert counted.rows <= 1024 * len(x)
    assert float((estimate.exp() - exact).abs().sum(1).mean() / 2) < bound


def test_credible_intervals_cover(generator):
    """Levels drawn uniformly from the grid's cells: the exact posterior's interval holds the true level as often as it says."""
    law, grid = dino(), torch.linspace(-4, 10, 57)
    true = grid[0] + (grid[-1] - grid[0]) * torch.rand(2000, generator=generator)
    x = noised(law.sample(2000, generator), true, generator)
    exact = torch.stack([law.log_prob(x, float(level)) for level in grid], 1).log_softmax(1)
    for mass in (0.5, 0.9):
        low, high = credible_interval(exact, grid, mass)
        held = ((low <= true) & (true <= high)).double().mean()
        assert abs(float(held) - mass) < 4 * math.sqrt(mass * (1 - mass) / 2000) + 0.01
    point = torch.full((1, 57), -torch.inf).index_fill(1, torch.tensor([30]), 0.0)
    low, high = credible_interval(point, grid, 0.9)
    assert float(high - low) == pytest.approx(0.9 * 0.25)
    assert float(low) < float(grid[30]) < float(high)


@pytest.mark.parametrize("kind", ["nll", "llr"])
def test_ood_scores_rank_foreign_points_higher(kind, generator):
    law = dino()
    x = law.sample(60, generator)
    shifted = x + 0.1 * torch.randn(x.shape, generator=generator)
    inside, outside = (ood_score(law, rows, kind, 128, generator).mean for rows in (x, shifted))
    assert metrics.auroc(outside, inside).mean > 0.95


def test_discrete_likelihood_is_the_entropy_of_a_discrete_law(generator):
    """Four values with known probabilities: the bound holds on average and is tight; uniform 8-bit values have eight bits, less what rounding adds."""
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    law = GaussianMixture(torch.tensor([[-1.0], [-1 / 3], [1 / 3], [1.0]]), 1e-3, weights)
    values = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0])
    x = values[torch.multinomial(weights, 4000, True, generator=generator)][:, None]
    found = discrete_nll(law, x, 64, generator, levels=4)
    entropy, error = float(-(weights * weights.log()).sum()), float(found.mean.std()) / math.sqrt(4000)
    assert -4 * error < float(found.mean.mean()) - entropy < 0.1 + 4 * error


def test_dequantised_likelihood_of_a_smooth_law_is_its_density_times_the_step(generator):
    """A Gaussian much wider than the grid's step: all three agree with -log(p step) of the Gaussian."""
    law, step = GaussianMixture(torch.zeros(1, 2), 0.25), 2 / 255
    x = ((law.sample(600, generator).clamp(-1, 1) + 1) / step).round() * step - 1
    truth = float((law.nll(x.double()) - 2 * math.log(step)).mean())
    for method in ("continuous", "dequantised", "discrete"):
        found = discrete_nll(law, x, 128, generator, method=method)
        assert abs(float(found.mean.mean()) - truth) < 4 * float(found.mean.std()) / math.sqrt(600) + 0.02, method


def test_mse_curve_is_the_mmse_of_a_gaussian(generator, gaussian):
    x, levels = gaussian.sample(4000, generator, torch.float64), torch.tensor([-3.0, 0.0, 4.0])
    curve = mse_curve(gaussian, x, levels, 24, generator)
    spectrum = torch.tensor([0.3, 2.0], dtype=torch.float64).square().log()
    mmse = torch.sigmoid(levels[:, None].double() + spectrum).sum(1)
    error = curve.mean.mean(0) - mmse
    assert (error.abs() < 4 * curve.mean.std(0) / math.sqrt(4000)).all()
    assert curve.evals == 24


def test_evals_are_what_the_denoiser_saw(generator):
    law = dino()
    x = law.sample(7, generator)
    for evaluate, evals in (
        (lambda d: llr(d, x, 3.0, 65, generator), 64),
        (lambda d: nll(d, x, 33, generator), 32),
        (lambda d: mse_curve(d, x, torch.tensor([0.0, 1.0]), 17, generator), 16),
    ):
        counted = Counted(law)
        assert evaluate(counted).evals == evals
        assert counted.rows == evals * len(x)


def test_memory_is_bounded_by_max_rows(generator):
    law, calls = dino(), []

    def watched(z, logsnr):
        calls.append(len(z))
        return law(z, logsnr)

    x = law.sample(50, generator)
    result = llr(watched, x, 6.0, 64, generator, finest=law.finest, max_rows=200)
    assert max(calls) <= 200
    error = result.mean - law.llr(x, 6.0)
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(50)


@pytest.mark.parametrize("dim", [1, 2, 3, 64, 3072])
def test_the_radius_is_the_chi_quantile(dim):
    quantile = torch.tensor([1e-12, 1e-6, 0.01, 0.3, 0.5, 0.9, 1 - 1e-6, 1 - 1e-12], dtype=torch.float64)
    truth = torch.from_numpy(scipy.stats.chi(dim).ppf(quantile.numpy()))
    torch.testing.assert_close(points.radius(quantile, dim), truth, rtol=1e-9, atol=0)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_noise_comes_in_groups_and_each_point_is_standard_normal(dim, even, generator):
    eps = points.grouped_noise(torch.zeros(5000, dim, dtype=torch.float64), 8, generator, even=even).unflatten(1, (2, 4))
    u, minus_u, v, minus_v = eps.unbind(2)
    for one, other in ((u, minus_u), (v, minus_v)):
        torch.testing.assert_close(one / one.norm(dim=2, keepdim=True), -other / other.norm(dim=2, keepdim=True))
    if dim > 1:
        torch.testing.assert_close((u * v).sum(2), torch.zeros(5000, 2, dtype=torch.float64))
    q = torch.from_numpy(scipy.stats.chi(dim).cdf(eps.norm(dim=3).numpy()))
    rest = [1 - q[..., 0], (q[..., 0] + 0.5) % 1, (0.5 - q[..., 0]) % 1] if even else [q[..., 0], 1 - q[..., 0], 1 - q[..., 0]]
    torch.testing.assert_close(q[..., 1:].sort(dim=2).values, torch.stack(rest, 2).sort(dim=2).values)
    for point in (u, v, minus_v):
        for axis in range(dim):
            assert scipy.stats.kstest(point[:, 0, axis].numpy(), "norm").pvalue > 1e-3
        assert (torch.cov(point[:, 0].T).reshape(dim, dim) - torch.eye(dim, dtype=torch.float64)).abs().max() < 0.09
    assert torch.corrcoef(torch.stack([u[:, 0, 0], u[:, 1, 0]]))[0, 1].abs() < 0.06  # groups are independent


def test_groups_and_equal_spacing_pay(generator, monkeypatch):
    """In 64 dimensions, where no control variate is used, against independent noise at independent points of the same strata."""
    law = GaussianMixture(torch.randn(5, 64, generator=generator), 0.3)
    x = law.sample(200, generator, torch.float64)
    grouped = float((llr(law, x, 6.0, 64, generator).mean - law.llr(x, 6.0)).square().mean())
    monkeypatch.setattr(points, "grouped_noise", lambda x, n, g, spread=False, even=False: unit_noise((len(x), n, *x.shape[1:]), x, g))
    alone = float((llr(law, x, 6.0, 64, generator).mean - law.llr(x, 6.0)).square().mean())
    assert grouped < 0.05 * alone


def test_the_curve_gains_at_fine_levels_too(generator, monkeypatch):
    """On two modes at log-SNR 8, where the error is even in the noise, against independent noise: pairs of equal radii would lose."""
    law, levels = two_modes(), torch.tensor([8.0])
    x = law.sample(20, generator, torch.float64).repeat_interleave(50, 0)
    own = mse_curve(law, x, levels, 32, generator).mean.reshape(20, 50).var(1).mean()
    monkeypatch.setattr(densities, "grouped_noise", lambda x, n, g, even: unit_noise((len(x), n, *x.shape[1:]), x, g))
    assert own < 0.5 * mse_curve(law, x, levels, 32, generator).mean.reshape(20, 50).var(1).mean()


def test_rows_do_not_touch_one_another_beyond_the_control_variate(generator):
    law = GaussianMixture(torch.randn(5, 64, generator=generator), 0.3)
    x = law.sample(4, generator)
    other = torch.cat([x[:2], 5 * x[2:]])
    one, two = (llr(law, rows, 3.0, 32, torch.Generator().manual_seed(1)).mean for rows in (x, other))
    torch.testing.assert_close(one[:2], two[:2])


def test_the_control_variate_has_mean_zero_and_pays(generator, monkeypatch):
    """On few points and one row too: it never biases, and with many rows it takes most of the variance."""
    law = dino()
    one = law.sample(1, generator, torch.float64)
    errors = torch.cat([llr(law, one, 9.0, 64, generator).mean for _ in range(400)]) - law.llr(one, 9.0)
    assert abs(float(errors.mean())) <= 4 * float(errors.std()) / 20
    x = law.sample(400, generator, torch.float64)
    deviation = {}
    for name in ("with", "without"):
        deviation[name] = float((llr(law, x, 9.0, 128, generator).mean - law.llr(x, 9.0)).square().mean())
        monkeypatch.setattr(control, "_features", lambda *_: None)
    assert deviation["with"] < 0.3 * deviation["without"]


def test_rows_without_noise_are_exact_beside_others(generator):
    """A denoiser that says nothing on one half of the line has ratio 0 there, whatever the other rows need."""
    law = dino()
    x = law.sample(40, generator, torch.float64)
    x[:20, 0], x[20:, 0] = -30.0, x[20:, 0].abs() + 30.0  # no point of one half reaches the other where the denoiser speaks

    def half(z, logsnr):
        return torch.where((logsnr > 2)[:, None] & (z[:, :1] > 0), law(z, logsnr).clamp(-5, 5), torch.zeros_like(z))

    result = llr(half, x, 9.0, 128, generator, finest=law.finest)
    assert result.mean.isfinite().all()
    assert (result.mean[:20] == 0).all()
    assert (result.stderr[:20] == 0).all()


def test_both_terms_share_their_draws(generator):
    """The paper's code draws them apart; at zeta = 12 its noise is 25 times the signal."""
    law, seen = dino(), []

    def watched(z, logsnr):
        seen.append(z)
        return law(z, logsnr)

    llr(watched, law.sample(3, generator), 12.0, 32, generator)
    assert len(seen) == 1
    first, second = seen[0].chunk(2)
    assert first.equal(second)


def test_an_infinite_level_is_the_data_itself(generator):
    """zeta beyond what float32 resolves is refused; large ones give a small ratio, never NaN."""
    law = dino()
    x = law.sample(20, generator)
    assert llr(law, x, 29.0, 64, generator).mean.abs().max() < 1e-3
    z = corrupt(x, 0.0, torch.zeros_like(x))
    assert z.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda law, x: llr(law, x, 6.0, 8), "given evals = 8, expected evals >= 16"),
        (lambda law, x: llr(law, x, 6.0, 0), "given evals = 0"),
        (lambda law, x: nll(law, x, 1), "given evals = 1, expected evals >= 8"),
        (lambda law, x: llr(law, x, 31.0), r"given zeta = 31, expected log-SNR within \+-30"),
        (lambda law, x: llr(law, x, math.nan), "zeta that is NaN"),
        (lambda law, x: llr(law, x[:0], 6.0), "at least one row"),
        (lambda law, x: llr(law, x[0], 6.0), "expected a batch"),
        (lambda law, x: llr(law, x.long(), 6.0), "int64"),
        (lambda law, x: llr(law, x / 0, 6.0), "non-finite"),
        (lambda law, x: nll(law, x, 8, spectrum=torch.zeros(3)), r"expected \(2,\)"),
        (lambda law, x: noise_posterior(law, x, torch.zeros(4)), "logsnrs that do not increase"),
        (lambda law, x: discrete_nll(law, 0 * x + 0.3), "values off the grid of 256 levels"),
        (lambda law, x: discrete_nll(law, 0 * x + 7), r"values from 7 to 7, expected values in \[-1, 1\]"),
        (lambda law, x: discrete_nll(law, 0 * x - 1, method="soft"), "given method 'soft'"),
        (lambda law, x: llr(lambda z, logsnr: z / 0, x, 6.0), "non-finite estimates in 4 of 4 rows"),
        (lambda law, x: ood_score(law, x, "entropy"), "given kind 'entropy'"),
        (lambda law, x: credible_interval(torch.zeros(4, 3), torch.arange(3.0), 1.0), "given mass = 1.0"),
        (lambda law, x: noise_posterior(law, x, torch.arange(4.0), 3), "given evals = 3, expected evals >= 16"),
    ],
)
def test_bad_input_is_one_line(call, message, generator):
    law = dino()
    with pytest.raises((UsageError, RunError), match=message) as caught:
        call(law, law.sample(4, generator))
    assert "\n" not in str(caught.value)
