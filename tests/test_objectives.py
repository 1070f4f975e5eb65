"""The exact denoiser minimises every consistent objective, with the value its closed form says."""

import math

import pytest
import torch

from contrastive_diffusion import channel
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.data.toys import two_modes
from contrastive_diffusion.denoisers import Counted
from contrastive_diffusion.likelihood import llr_points
from contrastive_diffusion.objectives import OBJECTIVES, WEIGHTINGS, Contrastive, Denoising, Likelihood, Weighted
from contrastive_diffusion.schedules import lognormal, uniform

CONTRASTIVE = Contrastive(uniform(-3, 3), points=256, share=0.25)  # many points: the ratio is nearly exact
CONSISTENT = {
    **{f"denoising-{w}": Denoising(uniform(-5, 5), w) for w in WEIGHTINGS},
    "ddpm": Denoising(),
    "edm": Denoising(lognormal(), "edm"),
    "likelihood": Likelihood(),
    "contrastive": CONTRASTIVE,
    **{f"contrastive-{t}": Contrastive(uniform(-3, 3), points=256, share=0.25, through=t) for t in ("clean", "noised")},
    "contrastive-unbalanced": Contrastive(uniform(-3, 3), points=64, share=0.25, clean=0.25),
    "contrastive-removed": Contrastive(uniform(-3, 3), points=64, share=0.25, curvature="removed"),
    "weighted": Weighted({"denoising": (1.0, Denoising()), "contrastive": (0.5, CONTRASTIVE)}),
}


def test_the_registry_names_what_is_tested():
    assert {type(v).__name__.lower() for v in CONSISTENT.values()} >= set(OBJECTIVES)


@pytest.mark.parametrize("objective", CONSISTENT.values(), ids=CONSISTENT)
def test_the_exact_denoiser_is_a_minimum(objective, gaussian, generator):
    """The loss of (1 + s) eps_hat + t z at (s, t): gradient zero within its error, curvature positive."""
    gradients, values = [], []
    for _ in range(30):
        x = gaussian.sample(256, generator)
        s = torch.zeros(2, requires_grad=True)

        def denoiser(z, logsnr, s=s):
            return (1 + s[0]) * gaussian(z, logsnr) + s[1] * z * channel.per_row(channel.noise(logsnr), z)

        seed = int(torch.randint(2**31, (1,), generator=generator))
        loss = objective(denoiser, x, torch.Generator().manual_seed(seed))["loss"]
        gradients.append(torch.autograd.grad(loss, s)[0])
        with torch.no_grad():
            at = [float(objective(denoiser, x, torch.Generator().manual_seed(seed))["loss"])]
            for step in ((0.3, 0.0), (-0.3, 0.0), (0.0, 0.3), (0.0, -0.3)):
                s.data = torch.tensor(step)
                at.append(float(objective(denoiser, x, torch.Generator().manual_seed(seed))["loss"]))
        values.append(torch.tensor(at))
    gradient = torch.stack(gradients)
    # softplus is convex: what noise is left in the ratio pulls the contrastive gradient off a little
    slack = 0.02 if "contrastive" in str(objective).lower() else 0.0
    assert (gradient.mean(0).abs() <= 4 * gradient.std(0) / math.sqrt(30) + slack).all()
    value = torch.stack(values)
    excess = (value[:, 1:] - value[:, :1]).reshape(30, 2, 2).sum(2)  # both signs together: what is left is the curvature
    assert (excess.mean(0) > 3 * excess.std(0) / math.sqrt(30)).all(), excess.mean(0)


def test_input_perturbation_has_its_own_optimum(gaussian, generator):
    """DDPM-IP: eps_hat(z / c, alpha - log g) / sqrt g; the data's own denoiser is not it."""
    objective, g = Denoising(uniform(-4, 4), perturbation=0.7), 1 + 0.7**2

    def optimum(z, logsnr):
        c = (torch.sigmoid(logsnr) + g * torch.sigmoid(-logsnr)).sqrt()
        return gaussian(z / channel.per_row(c, z), logsnr - math.log(g)) / math.sqrt(g)

    for denoiser, stationary in ((optimum, True), (gaussian, False)):
        scale = torch.ones((), requires_grad=True)
        gradients = []
        for _ in range(30):
            loss = objective(lambda z, logsnr, d=denoiser, s=scale: s * d(z, logsnr), gaussian.sample(2000, generator), generator)["loss"]
            gradients.append(torch.autograd.grad(loss, scale)[0])
        gradient = torch.stack(gradients)
        assert (gradient.mean().abs() <= 4 * gradient.std() / math.sqrt(30)) == stationary


@pytest.mark.parametrize("through", ["clean", "noised", "both"])
def test_gradient_passes_through_the_readings_asked_for(through, gaussian, generator):
    x, grads = gaussian.sample(64, generator), []

    def denoiser(z, logsnr):
        out = gaussian(z, logsnr).detach().requires_grad_()
        out.register_hook(grads.append)
        return out

    llr_points(denoiser, x, torch.full((64,), 1.0), 8, generator, through=through).sum().backward()
    clean, noised = grads[0].abs().sum(1).chunk(2)
    assert (float(clean.sum()) == 0) == (through == "noised")
    assert (float(noised.sum()) == 0) == (through == "clean")


def test_removing_the_curvature_takes_the_noise_out_of_the_loss(generator):
    law = two_modes()
    x = law.sample(4000, generator, torch.float64)
    losses = {
        c: float(Contrastive(uniform(0.999, 1.0), 8, 1.0, curvature=c)(law, x, torch.Generator().manual_seed(3))["loss"]) for c in ("kept", "removed")
    }
    exact = float(Contrastive(uniform(0.999, 1.0), 512, 1.0)(law, x, generator)["loss"])
    assert abs(losses["removed"] - exact) < 0.5 * abs(losses["kept"] - exact)


@pytest.mark.parametrize("batch", [2, 8, 16, 17, 32, 48, 96, 224, 512])
def test_the_contrastive_loss_costs_what_it_says_and_no_more_than_the_plain_one(batch, generator, gaussian):
    counted = Counted(gaussian)
    Contrastive()(counted, gaussian.sample(batch, generator), generator)
    assert counted.rows == Contrastive().evals(batch) <= max(16, batch)


@pytest.mark.parametrize("clean", [0.1, 0.25, 0.5, 0.9])
def test_labels_come_in_the_share_asked_for_and_never_alone(clean):
    for rows in (2, 4, 10, 40):
        labels = Contrastive(clean=clean)._labels(rows)
        assert set(labels.tolist()) == {1.0, -1.0}
        assert abs(float((labels > 0).sum()) - clean * rows) < 1


def test_denoising_is_the_mmse(gaussian, generator):
    """At one level the loss is sum_i sigmoid(alpha + lambda_i) / d, times the weight."""
    spectrum, level = torch.tensor([0.3, 2.0]).square().log(), 1.3
    mmse = float(torch.sigmoid(level + spectrum).mean())
    law = uniform(level - 1e-6, level + 1e-6)
    x = gaussian.sample(200_000, generator)
    weights = {"eps": 1.0, "x": math.exp(-level), "v": 1 + math.exp(-level), "edm": 1 + math.exp(-level) / 0.25}
    for name, weight in weights.items():
        loss = Denoising(law, name, 0.5)(gaussian, x, generator)["loss"]
        assert float(loss) == pytest.approx(weight * mmse, rel=0.02), name


def test_edm_weighting_is_edms_loss(gaussian, generator):
    """lambda(sigma) |D - x|^2 with lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
    x, level, sigma_data = gaussian.sample(1000, generator), 2.0, 0.5
    sigma, eps = math.exp(-level / 2), torch.randn(1000, 2, generator=generator)
    z = channel.corrupt(x, level, eps)
    eps_hat = gaussian(z, torch.full((1000,), level))
    d = channel.x_from_eps(z, level, eps_hat)
    edm = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2 * (d - x).square()
    ours = WEIGHTINGS["edm"](torch.tensor(level), sigma_data) * (eps_hat - eps).square()
    torch.testing.assert_close(edm, ours, rtol=1e-4, atol=1e-5)


def test_likelihood_is_the_entropy_of_the_data(generator):
    """Its value at the exact denoiser is the nll of the data, in nats per dimension (Gaussian: 1/2 log 2 pi e s^2)."""
    stds = torch.tensor([0.3, 2.0], dtype=torch.float64)
    law = GaussianMixture(torch.zeros(1, 2), stds[None])
    entropy = float((0.5 * math.log(2 * math.pi * math.e) + stds.log()).mean())
    x = law.sample(1_000_000, generator, torch.float64)
    for spectrum in (2 * stds.log(), None):
        loss = Likelihood(uniform(-12, 12), spectrum)(law, x, generator)["loss"]
        assert float(loss) == pytest.approx(entropy, abs=0.04)


def test_contrastive_is_the_cross_entropy_of_the_bayes_classifier(generator):
    """With enough points its value at the exact denoiser is that of the closed-form ratio, for both labels."""
    law = GaussianMixture(torch.tensor([[-2.0], [2.0]]), 0.5)
    zeta = 0.5
    objective = Contrastive(uniform(zeta - 1e-6, zeta + 1e-6), points=300, share=1.0)
    x = law.sample(4000, generator, torch.float64)
    result = objective(law, x, generator)
    clean, noised = x, channel.corrupt(x, zeta, torch.randn(x.shape, generator=generator, dtype=torch.float64))
    softplus = torch.nn.functional.softplus
    exact = (softplus(law.llr(clean, zeta)).mean() + softplus(-law.llr(noised, zeta)).mean()) / 2
    assert float(result["loss"]) == pytest.approx(float(exact), abs=0.02)
    right = ((law.llr(clean, zeta) < 0).double().mean() + (law.llr(noised, zeta) > 0).double().mean()) / 2
    assert float(result["accuracy"]) == pytest.approx(float(right), abs=0.03)


@pytest.mark.parametrize("objective", CONSISTENT.values(), ids=CONSISTENT)
def test_one_call_of_the_evals_it_declares(objective, gaussian, generator):
    counted = Counted(gaussian)
    objective(counted, gaussian.sample(64, generator), generator)
    assert counted.rows == objective.evals(64)
    assert counted.calls == (2 if isinstance(objective, Weighted) else 1)


def test_contrastive_weight_does_not_depend_on_the_batch(gaussian, generator):
    x = gaussian.sample(20_000, generator)
    losses = [
        float(Contrastive(uniform(0, 3), 8, share)(gaussian, x[:n], generator)["loss"]) for n, share in ((20_000, 1.0), (20_000, 0.2), (4000, 1.0))
    ]
    assert max(losses) - min(losses) < 0.06


def test_weighted_reports_every_term(gaussian, generator):
    objective = Weighted({"a": (2.0, Denoising()), "b": (0.5, Contrastive(share=1.0))})
    out = objective(gaussian, gaussian.sample(32, generator), generator)
    assert set(out) == {"loss", "a.loss", "b.loss", "b.accuracy"}
    assert float(out["loss"]) == pytest.approx(2 * float(out["a.loss"]) + 0.5 * float(out["b.loss"]), rel=1e-5)


def test_pure(gaussian, generator):
    x = two_modes().sample(16, generator)
    for objective in CONSISTENT.values():
        first, second = (float(objective(two_modes(), x, torch.Generator().manual_seed(5))["loss"]) for _ in range(2))
        assert first == second


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Denoising(weighting="epps"), "did you mean eps"),
        (lambda: Denoising(sigma_data=0.0), "sigma_data > 0"),
        (lambda: Contrastive(points=5), "a multiple of four"),
        (lambda: Contrastive(share=0.0), "0 < share <= 1"),
        (lambda: Contrastive(clean=1.0), "0 < clean < 1"),
        (lambda: Contrastive(through="on"), "given through 'on'"),
        (lambda: Contrastive(points=4, curvature="removed"), "points >= 8"),
        (lambda: Denoising(perturbation=-1.0), "std >= 0"),
        (lambda: Contrastive()(two_modes(), torch.zeros(1, 1)), "at least 2 rows"),
        (lambda: Weighted({}), "no terms"),
        (lambda: Likelihood(spectrum=torch.zeros(3))(two_modes(), torch.zeros(2, 1)), "spectrum"),
        (lambda: Denoising()(two_modes(), torch.full((2, 1), math.nan)), "non-finite"),
    ],
)
def test_bad_objectives_are_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
