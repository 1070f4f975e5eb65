"""Measures of a sample against a reference: closed forms, oracles, and errors that hold."""

import math

import pytest
import torch

from contrastive_diffusion import metrics
from contrastive_diffusion.metrics import bounds


def _normal(n, d, generator, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def _features(n, d, s):
    """Deterministic, half of them rectified to zero, exact in binary: what the stored values below were computed from."""
    i, j = torch.arange(1, n + 1)[:, None], torch.arange(d)[None]
    mixed = ((i * i + 3 * i * j + s * j * j + 7 * i) * 2654435761) % 1000003
    return (mixed - 300000).clamp(min=0).double() / 2**19


# Made with mpmath at 40 digits: means, covariances (n - 1), and the roots of mpmath.eig of their product; the second has no full rank.
STORED = {(60, 50): 0.14120160081432890406, (8, 50): 1.2172240246573685326}


@pytest.mark.parametrize(("n", "m"), STORED)
def test_frechet_agrees_with_a_stored_high_precision_value(n, m):
    x, y = _features(n, 10, 1), _features(m, 10, 5)
    reference = metrics.moments(y)
    to = metrics.Frechet(reference.mean, reference.cov)
    found = metrics.moments(x)
    assert to(found.mean, found.cov) == pytest.approx(STORED[n, m], rel=1e-12)


def test_frechet_without_full_rank():
    """Two planes at an angle: tr (C1 C2)^(1/2) = |cos|, where squared singular values would lose half the digits."""
    angle = 0.3
    u, v = torch.zeros(2, 40, dtype=torch.float64)
    u[0], v[0], v[1] = 1, math.cos(angle), math.sin(angle)
    c1, c2, mu = torch.outer(u, u), torch.outer(v, v), torch.zeros(40)
    assert metrics.frechet(mu, c1, mu, c2) == pytest.approx(2 - 2 * math.cos(angle), rel=1e-13)
    assert metrics.frechet(mu, c1, mu, c1) == pytest.approx(0, abs=1e-14)
    assert metrics.frechet(mu, 0 * c1, mu, c1) == pytest.approx(1)


def test_moments_in_one_pass_are_those_of_the_whole_set_in_any_chunks(generator, monkeypatch):
    x = _normal(500, 7, generator, shift=1e6)

    class Once:
        """Rows that can be read only once each, in order."""

        at = 0

        def __len__(self):
            return len(x)

        def __getitem__(self, part):
            begin, end, _ = part.indices(len(x))
            assert begin == self.at
            self.at = end
            return x[part]

    monkeypatch.setattr(metrics.gaussians, "CHUNK", 7 * 64)
    monkeypatch.setattr(metrics.gaussians, "STRIPE", 3)
    found = metrics.moments(Once(), centre=x[0])
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-15, atol=0)
    torch.testing.assert_close(found.cov, torch.cov(x.T), rtol=1e-9, atol=1e-12)
    rest = found.minus(metrics.moments(x[100:250], found.centre))
    torch.testing.assert_close(rest.cov, torch.cov(torch.cat([x[:100], x[250:]]).T), rtol=1e-9, atol=1e-12)


def _frechet(x, y_mean, y_cov, blocks):
    return metrics.frechet_replicates(x, metrics.Frechet(y_mean, y_cov), blocks)


def test_frechet_bias_is_extrapolated_and_its_interval_covers(generator):
    """N(0.2, 1.3^2 I) against N(0, I) in six dimensions: 6 (0.04 + 0.09); 200 samples add a bias of several standard errors."""
    truth, d, found = 6 * (0.04 + 0.09), 6, []
    for _ in range(200):
        x = _normal(200, d, generator, 0.2, 1.3)
        found.append(_frechet(x, torch.zeros(d), torch.eye(d), bounds(200, 10)))
    raw, better, error = (torch.tensor([f(r) for r in found]) for f in (lambda r: r.value, lambda r: r.extrapolated, lambda r: r.stderr))
    noise = float(better.std()) / math.sqrt(200)
    assert float(raw.mean()) - truth > 5 * noise
    assert abs(float(better.mean()) - truth) < 4 * noise
    assert 0.8 < float(better.std() / error.square().mean().sqrt()) < 1.2
    inside = [r.interval(unbiased=True).low < truth < r.interval(unbiased=True).high for r in found]
    assert 0.90 <= sum(inside) / 200 <= 0.99


@pytest.mark.parametrize("d", [1, 3, 8])
def test_sliced_wasserstein_of_gaussians(d, generator):
    x, y = _normal(4000, d, generator, 0.5, 1.4), _normal(3000, d, generator)
    along = metrics.directions(d, 8 * d)
    found = metrics.sliced_wasserstein(x, y, along, bounds(4000, 10))
    assert abs(found.value - (0.25 + 0.16)) < 5 * found.stderr + 0.01  # bias of both finite sets
    torch.testing.assert_close(along.norm(dim=0), torch.ones(8 * d, dtype=torch.float64))


def test_sliced_wasserstein_is_the_exact_distance_of_two_step_functions(generator):
    """In one dimension, against scipy's optimal matching of every point repeated to a common number."""
    optimise = pytest.importorskip("scipy.optimize")
    x, y = _normal(6, 1, generator), _normal(4, 1, generator)
    many, others = x.repeat(2, 1), y.repeat(3, 1)
    cost = torch.cdist(many, others).square()
    expected = float(cost[optimise.linear_sum_assignment(cost.numpy())].mean())
    found = metrics.sliced_wasserstein(x, y, torch.ones(1, 1, dtype=torch.float64), bounds(6, 3))
    assert found.value == pytest.approx(expected, rel=1e-12)


def test_kid_of_gaussians_is_unbiased_and_its_error_calibrated(generator):
    """Moments of the cubic kernel in one dimension: E(xy + 1)^3 = m3 m3' + 3 m2 m2' + 3 m1 m1' + 1."""
    shift, scale = 0.3, 1.2
    mean = lambda a, b: a[2] * b[2] + 3 * a[1] * b[1] + 3 * a[0] * b[0] + 1  # noqa: E731
    x_moments, y_moments = (shift, shift**2 + scale**2, shift**3 + 3 * shift * scale**2), (0.0, 1.0, 0.0)
    truth = mean(x_moments, x_moments) + mean(y_moments, y_moments) - 2 * mean(x_moments, y_moments)
    scores = [metrics.kid(_normal(400, 1, generator, shift, scale), _normal(500, 1, generator), block=100) for _ in range(200)]
    values, errors = torch.tensor([s.mean for s in scores]), torch.tensor([s.stderr for s in scores])
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(200)
    assert 0.75 < float(values.std() / errors.square().mean().sqrt()) < 1.25


def test_mmd_of_mixtures_is_its_closed_form(generator):
    """Two modes at +-1 against one at 0, std s, bandwidth h: E k of N(a, s^2), N(b, s^2) = (1 + 2 s^2/h^2)^(-1/2) exp(-(a-b)^2 / 2 (h^2 + 2 s^2))."""
    s, h = 0.3, 0.7
    k = lambda a, b: (1 + 2 * s**2 / h**2) ** -0.5 * math.exp(-((a - b) ** 2) / (2 * (h**2 + 2 * s**2)))  # noqa: E731
    truth = 0.5 * k(1, 1) + 0.5 * k(1, -1) + k(0, 0) - 2 * k(1, 0)
    x = _normal(3000, 1, generator, 0, s) + torch.randint(2, (3000, 1), generator=generator) * 2 - 1
    score = metrics.mmd(x, _normal(3000, 1, generator, 0, s), h)
    assert abs(score.mean - truth) < 4 * score.stderr
    assert score.stderr < 0.05 * truth


def _statistics(x, y, blocks):
    """Every measure with replicates."""
    reference = metrics.moments(y)
    found = {"frechet": metrics.frechet_replicates(x, metrics.Frechet(reference.mean, reference.cov), blocks)}
    found |= {"mmd": metrics.MMD(y, 1.0).replicates(x, blocks), "kid": metrics.MMD(y, metrics.polynomial()).replicates(x, blocks)}
    found |= {"sliced": metrics.sliced_wasserstein(x, y, metrics.directions(x.shape[1], 6), blocks)}
    return found | metrics.prdc(x, y, blocks, k=3)


@pytest.mark.parametrize("chunk", [2**22, 400])
def test_leaving_out_a_block_is_leaving_out_its_samples(chunk, generator, monkeypatch):
    for module in (metrics.gaussians, metrics.kernels, metrics.neighbours, metrics.sliced):
        monkeypatch.setattr(module, "CHUNK", chunk)
    x, y, blocks = _normal(43, 3, generator, 0.4), _normal(37, 3, generator), bounds(43, 5)
    whole = _statistics(x, y, blocks)
    for g, (begin, end) in enumerate(blocks):
        rest = torch.cat([x[:begin], x[end:]])
        direct = _statistics(rest, y, bounds(len(rest), 2))
        for name, found in whole.items():
            assert float(found.without[g]) == pytest.approx(direct[name].value, rel=1e-9, abs=1e-12), name


def test_prdc_of_constructed_sets():
    """Reference points 0, 1, .., 9 on a line, whose nearest neighbour is 1 away."""
    y = torch.arange(10.0)[:, None]
    assert {k: v.value for k, v in metrics.prdc(y + 0.1, y, bounds(10, 2), k=1).items()} == {
        "precision": 1.0, "recall": 1.0, "density": pytest.approx(1.9), "coverage": 1.0,
    }  # fmt: skip
    far = metrics.prdc(y + 100, y, bounds(10, 2), k=1)
    assert {k: v.value for k, v in far.items()} == dict.fromkeys(far, 0.0)
    half = metrics.prdc(y / 9 * 4, y, bounds(10, 2), k=1)  # 0 .. 4 in steps of 4/9: inside, and half of the reference
    assert half["precision"].value == 1.0
    assert half["recall"].value == 0.5
    assert half["coverage"].value == 0.5


def test_prdc_agrees_with_its_authors_package(generator, capsys):
    prdc = pytest.importorskip("prdc")
    x, y = _normal(300, 4, generator, 0.3, 1.3), _normal(250, 4, generator)
    expected = prdc.compute_prdc(y.numpy(), x.numpy(), nearest_k=5)
    assert {k: v.value for k, v in metrics.prdc(x, y, bounds(300, 6)).items()} == pytest.approx(expected)


@pytest.mark.parametrize("members", [4096, 60])
def test_nearest_finds_copies(members, generator, monkeypatch):
    monkeypatch.setattr(metrics.neighbours, "MEMBERS", members)
    y = _normal(200, 5, generator)
    x = torch.cat([y[[17, 90]] + 1e-5, _normal(50, 5, generator)])
    found = metrics.nearest(x, y)
    brute = torch.cdist(x, y).sort(1)
    torch.testing.assert_close(found.distance, brute.values[:, 0])
    torch.testing.assert_close(found.second, brute.values[:, 1])
    assert found.index[:2].tolist() == [17, 90]
    assert found.copies()[:2].tolist() == [1, 1]
    assert float(found.copies()[2:].mean()) < 0.1
    own = metrics.nearest(y[:80], y, same=True)
    torch.testing.assert_close(own.distance, torch.cdist(y[:80], y).sort(1).values[:, 1])


def test_torchmetrics_agrees(generator):
    fid, kernel = (pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid"))

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1).float()

    x, y = (_normal(n, 12, generator, s).float().reshape(n, 3, 2, 2) for n, s in ((130, 0.2), (170, 0.0)))
    theirs = fid.FrechetInceptionDistance(Flat(), normalize=True, input_img_size=(3, 2, 2))
    theirs.update(y, real=True)
    theirs.update(x, real=False)
    reference = metrics.moments(y.flatten(1))
    ours = _frechet(x.flatten(1), reference.mean, reference.cov, bounds(130, 5))
    assert ours.value == pytest.approx(float(theirs.compute()), rel=1e-4)
    theirs = kernel.KernelInceptionDistance(Flat(), subsets=1, subset_size=130, normalize=True)
    theirs.update(y[:130], real=True)
    theirs.update(x, real=False)
    assert metrics.kid(x.flatten(1), y[:130].flatten(1)).mean == pytest.approx(float(theirs.compute()[0]), rel=1e-4)


def test_a_paired_difference_is_sharper_than_two_intervals(generator):
    """The same noise in both sets, one shifted a little more: pairing removes what they share."""
    noise = _normal(2000, 2, generator)
    to = metrics.Frechet(torch.zeros(2), torch.eye(2, dtype=torch.float64))
    one, two = (metrics.frechet_replicates(noise * 1.2 + shift, to, bounds(2000, 20)) for shift in (0.10, 0.12))
    assert one.minus(two).interval().high < 0
    assert one.minus(two).stderr < 0.3 * math.hypot(one.stderr, two.stderr)
    with pytest.raises(ValueError, match="expected as many"):
        one.minus(metrics.Replicates(0.0, torch.zeros(3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: bounds(3, 4), "2 .. n"),
        (lambda x: metrics.prdc(x, x, bounds(6, 2), k=5), "1 <= k <= 2"),
        (lambda x: metrics.sliced_wasserstein(x, x[:, :1], x, bounds(6, 2)), "same dimension"),
        (lambda x: metrics.Frechet(x[0], torch.eye(2))(torch.zeros(3), torch.eye(3)), "expected dimension 2"),
        (lambda x: metrics.nearest(x, x[:1]), "at least 2 members"),
        (lambda x: metrics.moments(x[:1]).cov, "at least 2 for a covariance"),
    ],
)
def test_bad_samples_are_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(6, 2))
