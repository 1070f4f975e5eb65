import math

import pytest
import torch

from contrastive_diffusion import channel
from contrastive_diffusion.data import mixtures, toys
from contrastive_diffusion.data.mixtures import GaussianMixture


def _random_mixture(generator, shape=(2,), components=5):
    means = torch.randn(components, *shape, generator=generator, dtype=torch.float64)
    stds = torch.rand(components, *shape, generator=generator, dtype=torch.float64) + 0.1
    return GaussianMixture(means, stds, torch.rand(components, generator=generator) + 0.1)


@pytest.mark.parametrize("logsnr", [-5.0, 0.0, 3.0, 9.0])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3, 2)])
def test_eps_hat_is_minus_noise_times_score(generator, shape, logsnr):
    law = _random_mixture(generator, shape)
    z = torch.randn(6, *shape, generator=generator, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(law.log_prob(z, logsnr).sum(), z)
    level = torch.full((6,), logsnr, dtype=torch.float64)
    torch.testing.assert_close(law(z, level), -gradient * channel.noise(logsnr))


@pytest.mark.parametrize("logsnr", [None, 4.0, 0.0, -3.0])
def test_density_integrates_to_one(logsnr):
    law = GaussianMixture(torch.tensor([[-1.0], [2.0]]), torch.tensor([0.3, 0.7]), torch.tensor([1.0, 3.0]))
    x = torch.linspace(-12, 12, 40_001, dtype=torch.float64)[:, None]
    assert float(law.log_prob(x, logsnr).exp().sum() * (x[1, 0] - x[0, 0])) == pytest.approx(1, abs=1e-6)


def test_the_noised_law_has_variance_signal_times_s_squared(generator):
    """App. A.3 prints sigma(alpha) s; the variance needs s squared."""
    law = GaussianMixture(torch.zeros(1, 1), 2.0)
    a = 0.7
    variance = float(channel.signal(a)) ** 2 * 4 + float(channel.noise(a)) ** 2
    assert float(law.log_prob(torch.zeros(1, 1, dtype=torch.float64), a)) == pytest.approx(-0.5 * math.log(2 * math.pi * variance))
    eps_hat = law(torch.ones(1, 1, dtype=torch.float64), torch.tensor([a], dtype=torch.float64))
    assert float(eps_hat) == pytest.approx(float(channel.noise(a)) / variance)


def test_nll_and_llr_follow_from_log_prob(generator):
    law = _random_mixture(generator)
    x, zeta = law.sample(7, generator, torch.float64), torch.linspace(-6, 12, 7)
    torch.testing.assert_close(law.nll(x), -law.log_prob(x))
    torch.testing.assert_close(law.llr(x, zeta), law.log_prob(x, zeta) - law.log_prob(x))


def test_samples_have_the_moments(generator):
    law = _random_mixture(generator)
    x = law.sample(200_000, generator, torch.float64)
    torch.testing.assert_close(x.mean(0), law.mean(), atol=0.02, rtol=0)
    torch.testing.assert_close(x.T.cov(), law.covariance(), atol=0.03, rtol=0)


def test_float32_input_gives_float64_accuracy(generator):
    law = toys.dino()
    z = law.sample(50, generator)
    level = torch.full((50,), 9.0)
    assert law(z, level).dtype == torch.float32
    torch.testing.assert_close(law(z, level).double(), law(z.double(), level.double()), rtol=1e-6, atol=1e-6)


def test_rows_do_not_influence_each_other_in_the_last_bit(generator, monkeypatch):
    law = toys.dino()
    z, level = law.sample(64, generator), torch.linspace(-8, 9, 64)
    whole = law(z, level)
    assert torch.cat([law(z[i : i + 1], level[i : i + 1]) for i in range(64)]).equal(whole)
    monkeypatch.setattr(mixtures, "CHUNK", 1000)
    assert law(z, level).equal(whole)


def test_zero_stds_are_the_ideal_denoiser_of_a_finite_data_set(generator):
    x = torch.randn(30, 1, 4, 4, generator=generator, dtype=torch.float64)
    law = GaussianMixture(x, 0.0)
    level = torch.full((30,), 12.0, dtype=torch.float64)
    eps = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(law(channel.corrupt(x, level, eps), level), eps)  # so near the data that it knows which one it is
    torch.testing.assert_close(law(eps, torch.full((30,), -60.0)), eps)  # pure noise
    with pytest.raises(ValueError, match="a finite data set has no density"):
        law.log_prob(x)


def test_ten_thousand_components_in_bounded_memory(generator, monkeypatch):
    law = GaussianMixture(torch.randn(10_000, 1, 8, 8, generator=generator), torch.rand(10_000, generator=generator) + 0.1)
    z, level = torch.randn(40, 1, 8, 8, generator=generator), torch.linspace(-4, 8, 40)
    sizes = []
    original = GaussianMixture._axes

    def watched(self, z, logsnr):
        for distance, variance in original(self, z, logsnr):
            sizes.append(max(distance.numel(), variance.numel()))
            yield distance, variance

    monkeypatch.setattr(GaussianMixture, "_axes", watched)
    assert law(z, level).isfinite().all()
    assert law.log_prob(z, level).isfinite().all()
    assert max(sizes) <= mixtures.CHUNK


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture(torch.zeros(3), 1.0), r"\(K, \*S\), not empty"),
        (lambda: GaussianMixture(torch.zeros(0, 2), 1.0), "not empty"),
        (lambda: GaussianMixture(torch.zeros(3, 2), -1.0), "negative or non-finite std"),
        (lambda: GaussianMixture(torch.zeros(3, 2), 1.0, torch.tensor([1.0, 0.0, 1.0])), "positive weights"),
        (lambda: GaussianMixture(torch.full((1, 2), math.inf), 1.0), "non-finite means"),
        (lambda: toys.dino()(torch.zeros(3, 3), torch.zeros(3)), r"expected a floating-point batch \(B, 2\)"),
        (lambda: toys.dino()(torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3)), "int32"),
        (lambda: toys.dino().sample(-1), "n >= 0"),
    ],
)
def test_bad_mixtures_are_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dino_is_the_published_law(generator):
    law = toys.dino()
    assert law.means.shape == (142, 2)
    assert law.stds[0].tolist() == pytest.approx([0.00898, 0.00559], abs=5e-6)
    torch.testing.assert_close(law.mean(), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(law.covariance().diag(), torch.ones(2, dtype=torch.float64))
    z = channel.corrupt(law.sample(20_000, generator), 9.2, torch.randn(20_000, 2, generator=generator))
    assert float(law.log_prob(z, 9.2).mean()) == pytest.approx(0.97, abs=0.04)


@pytest.mark.parametrize("name", toys.TOYS)
def test_every_toy_samples_its_shape_at_about_unit_scale(name, generator):
    x = toys.toy(name).sample(20_000, generator)
    assert x.shape == (20_000, 1 if name == "two-modes" else 2)
    assert x.dtype == torch.float32
    if name != "two-modes":
        assert x.mean(0).abs().max() < 0.1
        assert ((x.var(0) > 0.7) & (x.var(0) < 1.35)).all(), x.var(0)
    assert toys.toy(name).sample(5, torch.Generator().manual_seed(3)).equal(toys.toy(name).sample(5, torch.Generator().manual_seed(3)))


def test_checkerboard_is_the_dark_squares(generator):
    x = toys.checkerboard().sample(20_000, generator, torch.float64)
    cell = ((x / math.sqrt(3) + 1) * 2).floor()
    assert ((cell.sum(1) % 2) == 0).all()
    assert len(cell.unique(dim=0)) == 8


def test_unknown_toy_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean dino"):
        toys.toy("dinno")
