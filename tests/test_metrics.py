import math

import pytest
import scipy.stats
import torch

from contrastive_diffusion import metrics
from contrastive_diffusion.data.toys import dino, two_modes


def _brute(x, y, bandwidth):
    k = lambda a, b: torch.exp(-0.5 * torch.cdist(a.double(), b.double()).square() / bandwidth**2)  # noqa: E731
    n, m = len(x), len(y)
    xx, yy = k(x, x), k(y, y)
    return float((xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * k(x, y).mean())


def test_mmd_is_its_formula_in_any_chunks(generator, monkeypatch):
    x, y = torch.randn(90, 3, generator=generator), torch.randn(70, 3, generator=generator) + 0.5
    expected = _brute(x, y, 0.7)
    assert metrics.mmd(x, y, 0.7).mean == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(metrics.kernels, "CHUNK", 500)
    assert metrics.mmd(x, y, 0.7).mean == pytest.approx(expected, rel=1e-5)
    assert metrics.mmd(x.reshape(90, 1, 3), y, 0.7).mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.4, 1.5])
def test_mmd_is_unbiased_and_its_error_calibrated(shift, generator):
    """N(0, 1) against N(shift, 1) with bandwidth h: E k = (1 + 2/h^2)^(-1/2) exp(-shift^2 / (2 (h^2 + 2)))."""
    h = 0.8
    kernel = lambda d: (1 + 2 / h**2) ** -0.5 * math.exp(-(d**2) / (2 * (h**2 + 2)))  # noqa: E731
    truth = 2 * kernel(0) - 2 * kernel(shift)
    scores = [metrics.mmd(torch.randn(150, 1, generator=generator) + shift, torch.randn(200, 1, generator=generator), h) for _ in range(200)]
    mean, stderr = torch.tensor([s.mean for s in scores]), torch.tensor([s.stderr for s in scores])
    assert abs(float(mean.mean()) - truth) < 4 * float(mean.std()) / math.sqrt(200)
    # in quadrature: near the null the error of one sample of 150 is itself uncertain
    assert 0.8 < float(mean.std() / stderr.square().mean().sqrt()) < 1.2


def test_bandwidth_scan_peaks_in_the_middle(generator):
    """Data against N(0, I): zero at both ends of the scan, the paper keeps the maximum (Fig. 8)."""
    widths = [0.01, 0.1, 0.5, 2.0, 20.0]
    scores = metrics.bandwidth_scan(dino().sample(800, generator), torch.randn(800, 2, generator=generator), widths)
    assert max(range(5), key=lambda i: scores[i].mean) == 2


def test_frechet_closed_forms(generator):
    mu, a = torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 9.0]))
    assert metrics.frechet(mu, a, mu, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(mu, a, mu + 2, torch.eye(3)) == pytest.approx(12 + 0 + 1 + 4)
    scipy = pytest.importorskip("scipy.linalg")
    roots = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    c1, c2 = (r @ r.T for r in roots)
    expected = float(c1.trace() + c2.trace()) - 2 * scipy.sqrtm((c1 @ c2).numpy()).real.trace()
    assert metrics.frechet(torch.zeros(5), c1, torch.zeros(5), c2) == pytest.approx(expected, rel=1e-9)


def test_denoiser_error_of_a_scaled_denoiser(generator):
    law = two_modes()
    z, level = law.sample(500, generator), 1.0
    score = metrics.denoiser_error(lambda z, a: 1.5 * law(z, a), law, z, level, chunk=100)
    truth = (0.5 * law(z, torch.full((500,), level))).square().sum(1)
    assert score.mean == pytest.approx(float(truth.mean()), rel=1e-5)
    assert score.stderr == pytest.approx(float(truth.std()) / math.sqrt(500), rel=1e-4)
    assert metrics.denoiser_error(law, law, z, level).mean == 0.0


def test_log_density_and_off_support(generator):
    law = dino()
    truth, x = law.sample(20_000, generator), law.sample(20_000, generator)
    log_prob = lambda z: law.log_prob(z, 9.2)  # noqa: E731
    exact = metrics.log_density(log_prob, truth)
    assert abs(exact.mean - float(log_prob(truth).mean())) < 1e-6
    assert metrics.off_support(log_prob, x, truth, 0.01).mean == pytest.approx(0.01, abs=4 * math.sqrt(2 * 0.01 / 20_000))
    assert metrics.off_support(log_prob, x + 3, truth).mean > 0.9


def test_average_is_nan_without_a_spread():
    assert math.isnan(metrics.average([1.0]).stderr)
    assert metrics.average([1.0, 3.0]) == metrics.Score(2.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: metrics.mmd(x, x, 0.0), "positive number"),
        (lambda x: metrics.mmd(x[:1], x, 1.0), r"expected \(n >= 2, 2\)"),
        (lambda x: metrics.mmd(x, x[:1], 1.0), "at least 2"),
        (lambda x: metrics.mmd(x[:, :1], x, 1.0), r"expected \(n >= 2, 2\)"),
    ],
)
def test_bad_metrics_are_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(5, 2))


def test_auroc_is_the_probability_of_a_right_order(generator):
    """Two unit normals a distance delta apart: Phi(delta / sqrt 2)."""
    errors = []
    for _ in range(200):
        score = metrics.auroc(1.0 + torch.randn(200, generator=generator), torch.randn(300, generator=generator))
        errors.append((score.mean - 0.760249939) / score.stderr)
    z = torch.tensor(errors)
    assert abs(float(z.mean())) < 4 / 200**0.5
    assert 0.8 < float(z.std()) < 1.2
    assert metrics.auroc(torch.ones(5), torch.ones(7)).mean == 0.5
    with pytest.raises(ValueError, match="at least 2"):
        metrics.auroc(torch.ones(1), torch.ones(7))


def test_calibration_error_is_zero_for_honest_answers_and_the_shift_for_others(generator):
    said = torch.rand(20_000, generator=generator) * 0.8
    z = []
    for _ in range(100):
        result = metrics.calibration(said, torch.rand(20_000, generator=generator) < said)
        z.append((result.error.mean - result.chance) / result.error.stderr)
    assert abs(sum(z) / 100) < 0.4
    assert 0.8 < float(torch.tensor(z).std()) < 1.2
    shifted = metrics.calibration(said, torch.rand(20_000, generator=generator) < said + 0.1)
    assert shifted.error.mean == pytest.approx(0.1, abs=0.012)
    assert int(shifted.count.sum()) == 20_000
    with pytest.raises(ValueError, match="n >= 30"):
        metrics.calibration(torch.ones(5), torch.ones(5))


@pytest.mark.parametrize("n", [2, 5, 16, 17, 40])
def test_intervals_are_students(n):
    values = torch.arange(n, dtype=torch.float64).square()
    low, high = scipy.stats.t.interval(0.95, n - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    found = metrics.interval(values)
    assert found.low == pytest.approx(low, rel=2e-4, abs=1e-3)
    assert found.high == pytest.approx(high, rel=2e-4)
