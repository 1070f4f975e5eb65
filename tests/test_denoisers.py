import math
import warnings

import pytest
import torch

from contrastive_diffusion import channel, denoisers, schedules
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import dino, two_modes
from contrastive_diffusion.denoisers import Bounded, Counted, at_noise, check_denoiser, evaluate, from_edm, from_timesteps, to_edm, to_timesteps

LEVELS = torch.tensor([-6.0, -1.0, 2.0, 5.0, 8.0], dtype=torch.float64)


@pytest.fixture(params=["dino", "two-modes"])
def law(request):
    return {"dino": dino, "two-modes": two_modes}[request.param]()


@pytest.fixture
def z(law, generator):
    return denoisers.noised(law.sample(5, generator, torch.float64), LEVELS, generator)


def test_at_noise_is_the_denoiser_of_the_noised_law(law, z):
    zeta = 1.5
    scale, variance = float(channel.signal(zeta)), float(channel.noise(zeta)) ** 2
    noised = GaussianMixture(law.means * scale, (law.stds.square() * scale**2 + variance).sqrt())
    torch.testing.assert_close(at_noise(law, zeta)(z, LEVELS), noised(z, LEVELS))


def test_at_noise_composes(law, z):
    zeta = float(channel.compose(2.0, 0.5)[0])
    torch.testing.assert_close(at_noise(at_noise(law, 2.0), 0.5)(z, LEVELS), at_noise(law, zeta)(z, LEVELS))
    torch.testing.assert_close(at_noise(law, math.inf)(z, LEVELS), law(z, LEVELS))


def test_at_noise_takes_a_level_for_each_row(law, z):
    zeta = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    rows = [at_noise(law, float(zeta[i]))(z[i : i + 1], LEVELS[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(at_noise(law, zeta)(z, LEVELS), torch.cat(rows))


def test_edm_there_and_back(law, z):
    torch.testing.assert_close(from_edm(to_edm(law))(z, LEVELS), law(z, LEVELS))


def test_edm_labels_are_closed_over_and_sigma_min_is_the_finest_level(law, z):
    class Net:
        sigma_min = 0.002

        def __call__(self, y, sigma, labels):
            assert labels.shape == (len(y), 3)
            return to_edm(law)(y, sigma)

    denoiser = from_edm(Net(), torch.zeros(1, 3))
    torch.testing.assert_close(denoiser(z, LEVELS), law(z, LEVELS))
    assert denoisers.finest_of(denoiser) == pytest.approx(12.4292, abs=1e-4)


@pytest.mark.parametrize("predicts", ["eps", "x", "v"])
def test_timesteps_there_and_back(law, z, predicts):
    table = schedules.ddpm()
    denoiser = from_timesteps(to_timesteps(law, table, predicts), table, predicts)
    torch.testing.assert_close(denoiser(z, LEVELS), law(z, LEVELS), rtol=1e-6, atol=1e-8)


def test_timesteps_are_exact_at_integers_and_rounded_only_on_request():
    table, seen = schedules.ddpm(), []

    def net(z, t):
        seen.append(t)
        return type("Output", (), {"sample": z})()

    levels = torch.stack([table.logsnrs[500], (table.logsnrs[20] + table.logsnrs[21]) / 2])
    z = torch.zeros(2, 3, dtype=torch.float64)
    from_timesteps(net, table.logsnrs)(z, levels)
    from_timesteps(net, table, rounded=True)(z, levels + torch.tensor([0.0, 1e-3]))
    assert seen[0].tolist() == pytest.approx([500.0, 20.5])
    assert seen[1].dtype == torch.int64
    assert seen[1].tolist() == [500, 20]


def test_timesteps_warn_once_when_clamped():
    denoiser = from_timesteps(lambda z, t: z, schedules.ddpm())
    z = torch.zeros(1, 2)
    with pytest.warns(UserWarning, match="outside the timestep table"):
        denoiser(z, torch.tensor([12.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoiser(z, torch.tensor([-20.0]))
        from_timesteps(lambda z, t: z, schedules.ddpm())(z, schedules.ddpm().logsnrs[:1].float())


def test_unknown_prediction_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean eps"):
        from_timesteps(lambda z, t: z, schedules.ddpm(), "epss")  # pyright: ignore[reportArgumentType]


def test_bounded_changes_nothing_inside_and_continues_the_score_outside(law, generator):
    bounded = Bounded(law, -4.0, 6.0)
    x = law.sample(4, generator, torch.float64)
    for level in (-4.0, 0.0, 6.0):
        z, a = denoisers.noised(x, level, generator), torch.full((4,), level, dtype=torch.float64)
        torch.testing.assert_close(bounded(z, a), law(z, a))
    for edge, out in ((6.0, 6.0 + 1e-7), (-4.0, -4.0 - 1e-7)):
        z = denoisers.noised(x, edge, generator)
        inside, outside = (bounded(z, torch.full((4,), v, dtype=torch.float64)) for v in (edge, out))
        torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-5)
    # above: the score of y = z / signal is that of the edge
    y, high = x + 0.1, torch.full((4,), 11.0, dtype=torch.float64)
    edge = torch.full((4,), 6.0, dtype=torch.float64)
    scores = [
        (channel.score_from_eps(a, bounded(y * channel.per_row(channel.signal(a), y), a)) * channel.per_row(channel.signal(a), y))
        for a in (high, edge)
    ]
    torch.testing.assert_close(scores[0], scores[1])
    # below: x_hat is that of the edge
    z, low = torch.randn(4, 2 if x.shape[1] == 2 else 1, dtype=torch.float64), torch.full((4,), -9.0, dtype=torch.float64)
    edge = torch.full((4,), -4.0, dtype=torch.float64)
    torch.testing.assert_close(channel.x_from_eps(z, low, bounded(z, low)), channel.x_from_eps(z, edge, law(z, edge)))


def test_evaluate_chunks_without_changing_a_bit(law, generator):
    z, a = denoisers.noised(law.sample(37, generator), 2.0, generator), torch.full((37,), 2.0)
    counted = Counted(law)
    assert evaluate(counted, z, a, 10).equal(law(z, a))
    assert (counted.rows, counted.calls) == (37, 4)


def test_evaluate_checks_the_contract():
    with pytest.raises(ValueError, match=r"returns \(3, 1\), expected the shape of z"):
        evaluate(lambda z, a: z[:, :1], torch.zeros(3, 2), torch.zeros(3))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), r"given x of shape \(3,\), expected a batch"),
        (torch.zeros(3, 2, dtype=torch.int64), "int64, expected a floating-point tensor; x.float()"),
        (torch.zeros(0, 2), "at least one row"),
        (torch.tensor([[math.nan, 1.0]]), "1 non-finite"),
        ([[1.0]], "type list"),
    ],
)
def test_bad_data_is_one_line(x, message):
    with pytest.raises(ValueError, match=message):
        denoisers.check_data(x)


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (lambda z, logsnr: z[:, :1], "a denoiser that returns"),
        (lambda z, logsnr: z.double(), "returns torch.float64"),
        (lambda z, logsnr: torch.where(logsnr[:, None] > 5, z / 0, z), "non-finite numbers in 20 of 20 rows at log-SNR 8"),
        (lambda z, logsnr: z - z.mean(0), "whose rows change by"),
    ],
)
def test_a_denoiser_that_breaks_the_contract_is_told_in_one_line(denoiser, message, generator):
    x = dino().sample(20, generator)
    check_denoiser(dino(), x, generator)
    with pytest.raises(ValueError, match=message):
        check_denoiser(denoiser, x, generator)
