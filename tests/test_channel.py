import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contrastive_diffusion import channel

LOGSNR = st.floats(-15, 18)


def _exact_beta(a: float, z: float) -> float:
    return -math.log(math.exp(-a) + math.exp(-z) + math.exp(-a - z))


@given(LOGSNR, LOGSNR)
def test_compose_is_the_second_channel_after_the_first(a, z):
    beta, b = channel.compose(a, z)
    assert float(beta) == pytest.approx(_exact_beta(a, z), abs=1e-12)
    noise = 1 / (1 + math.exp(a)), 1 / (1 + math.exp(float(beta)))
    assert float(b) ** 2 == pytest.approx(noise[0] / noise[1], rel=1e-12)
    # signal scales multiply, and beta lies below both levels
    assert float(channel.signal(beta)) == pytest.approx(float(channel.signal(a) * channel.signal(z)), rel=1e-12)
    assert float(beta) <= min(a, z)


@pytest.mark.parametrize("level", [12.0, 15.0, 17.0, 25.0])
def test_compose_keeps_its_digits_in_float32(level):
    beta, b = channel.compose(torch.tensor(level), torch.tensor(level))
    assert beta.dtype == torch.float32
    assert float(beta) == pytest.approx(_exact_beta(level, level), abs=2e-6)
    assert float(b) == pytest.approx(math.sqrt(0.5), abs=1e-5)


def test_compose_at_infinity():
    inf = torch.tensor(math.inf)
    assert [float(v) for v in channel.compose(inf, torch.tensor(3.0))] == [3.0, 0.0]
    assert [float(v) for v in channel.compose(torch.tensor(3.0), inf)] == [3.0, 1.0]


@given(LOGSNR)
def test_scales_are_a_rotation(a):
    assert float(channel.signal(a) ** 2 + channel.noise(a) ** 2) == pytest.approx(1)
    assert float(channel.sigma_of_logsnr(a)) == pytest.approx(float(channel.noise(a) / channel.signal(a)))
    assert float(channel.logsnr_of_sigma(channel.sigma_of_logsnr(a))) == pytest.approx(a, abs=1e-9)


def test_conversions_agree_and_invert(generator):
    x, eps = torch.randn(2, 6, 3, 2, generator=generator, dtype=torch.float64)
    logsnr = torch.linspace(-6, 8, 6, dtype=torch.float64)
    z = channel.corrupt(x, logsnr, eps)
    signal, noise = (channel.per_row(v(logsnr), x) for v in (channel.signal, channel.noise))
    torch.testing.assert_close(channel.x_from_eps(z, logsnr, eps), x)
    torch.testing.assert_close(channel.eps_from_x(z, logsnr, x), eps)
    torch.testing.assert_close(channel.v_from_eps(z, logsnr, eps), signal * eps - noise * x)
    torch.testing.assert_close(channel.eps_from_v(z, logsnr, signal * eps - noise * x), eps)


def test_the_score_is_the_gradient_of_the_log_density(gaussian):
    z = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gaussian.log_prob(z, 1.5).sum(), z)
    level = torch.full((5,), 1.5, dtype=torch.float64)
    torch.testing.assert_close(channel.score_from_eps(level, gaussian(z, level)), gradient)


def test_bad_levels_are_one_line():
    with pytest.raises(ValueError, match="given logsnr that is NaN, expected"):
        channel.as_logsnr(math.nan, 3)
    with pytest.raises(ValueError, match=r"expected a number or shape \(3,\)"):
        channel.as_logsnr(torch.zeros(2), 3)
