import math

import pytest
import torch

from contrastive_diffusion import channel, schedules

FAMILY = {
    "iddpm": schedules.iddpm(),
    "ve": schedules.ve(),
    "vp": schedules.vp(first=0.01),  # nearer to 0 the weights drown the integral too
    "ddpm": schedules.ddpm(),
    "cosine": schedules.cosine(),
    "karras": schedules.karras(),
    "logistic": schedules.logistic(1.0, 2.0),
    "lognormal": schedules.lognormal(clip=3.0),  # the weights of five stds would drown the integral
    "uniform": schedules.uniform(-4, 10),
}
every = pytest.mark.parametrize("schedule", FAMILY.values(), ids=FAMILY)


def test_the_family_is_the_registry():
    assert set(FAMILY) == set(schedules.SCHEDULES)


@every
def test_strictly_decreasing(schedule):
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert (schedule(t).diff() < 0).all()


@every
def test_the_weight_of_a_law_is_its_slope(schedule):
    t = torch.tensor([0.1003, 0.3007, 0.5501, 0.9003], dtype=torch.float64)
    _, weight = schedules.slope(schedule, t)
    h = 1e-6
    torch.testing.assert_close(weight, -(schedule(t + h) - schedule(t - h)) / (2 * h), rtol=1e-5, atol=1e-6)


@every
def test_draws_integrate_over_the_range(schedule, generator):
    low, high = schedules.ends(schedule)
    logsnr, weight = schedules.draw(schedule, 200_000, generator)
    assert float(weight.mean()) == pytest.approx(high - low, rel=2e-3)
    bump = lambda a: torch.exp(-0.5 * a.square())  # noqa: E731
    assert float((weight * bump(logsnr)).mean()) == pytest.approx(math.sqrt(2 * math.pi), rel=5e-3)


def test_stratified_draws_are_unbiased_and_tighter(generator):
    schedule = schedules.uniform(-4, 4)
    means = {}
    for stratified in (True, False):
        draws = torch.stack(
            [(lambda a: (a[1] * torch.sigmoid(a[0])).mean())(schedules.draw(schedule, 16, generator, stratified)) for _ in range(400)]
        )
        means[stratified] = draws
        assert float(draws.mean()) == pytest.approx(4.0, abs=4 * float(draws.std()) / 20)
    assert means[True].std() < 0.2 * means[False].std()


@every
def test_grid_rises_to_infinity(schedule):
    grid = schedules.grid(schedule, 40)
    assert grid.shape == (41,)
    assert grid.dtype == torch.float64
    assert (grid.diff() > 0).all()
    assert float(grid[-1]) == math.inf
    assert [float(grid[0]), float(grid[-2])] == pytest.approx(schedules.ends(schedule))


def test_ddpm_table():
    table = schedules.ddpm().logsnrs
    assert [float(table[i]) for i in (0, 1, 10, 100, 500, 999)] == pytest.approx([9.2102, 8.4221, 6.1201, 2.1444, -2.4727, -10.1177], abs=1e-4)
    torch.testing.assert_close(schedules.grid(schedules.ddpm(), 1000)[:-1].flip(0), table)


def test_table_inverse_is_exact_at_integers_and_linear_between():
    table = schedules.ddpm()
    index = torch.tensor([0.0, 1.0, 499.0, 998.0, 999.0], dtype=torch.float64)
    torch.testing.assert_close(table.inverse(table.logsnrs[index.long()]), index)
    middle = (table.logsnrs[10] + table.logsnrs[11]) / 2
    assert float(table.inverse(middle)) == pytest.approx(10.5)
    assert table.inverse(torch.tensor([50.0, -50.0])).tolist() == [0.0, 999.0]


def test_karras_grid_is_edms():
    steps, rho, low, high = 18, 7.0, 0.002, 80.0
    i = torch.arange(steps, dtype=torch.float64)
    sigma = (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    torch.testing.assert_close(schedules.grid(schedules.karras(), steps)[:-1], -2 * sigma.log())


def test_truncated_logistic_weight():
    """The slope is the importance weight s tanh(c/2) / [sigmoid(v) sigmoid(-v)] of Kong et al."""
    loc, scale, clip = 6.261363983154297, 3.0976245403289795, 4.0
    t = torch.tensor([0.2, 0.5, 0.77], dtype=torch.float64)
    logsnr, weight = schedules.slope(schedules.logistic(loc, scale, clip), t)
    v = (logsnr - loc) / scale
    torch.testing.assert_close(weight, scale * math.tanh(clip / 2) / (v.sigmoid() * (-v).sigmoid()))


def test_plateau_covers_the_line(generator):
    law = schedules.Plateau(-1.0, 3.0, 2.0)
    u = torch.linspace(1e-9, 1 - 1e-9, 10_001, dtype=torch.float64)
    logsnr = law(u)
    assert (logsnr.diff() < 0).all()
    density = 1 / schedules.slope(law, u)[1]
    core = (logsnr > -1) & (logsnr < 3)
    torch.testing.assert_close(density[core], torch.full_like(density[core], 1 / 8))
    torch.testing.assert_close(density[logsnr > 3], torch.exp(-(logsnr[logsnr > 3] - 3) / 2) / 8)
    torch.testing.assert_close(density[logsnr < -1], torch.exp((logsnr[logsnr < -1] + 1) / 2) / 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.uniform(3, 1), "low < high"),
        (lambda: schedules.karras(0.0), "0 < sigma_min"),
        (lambda: schedules.ddpm(1), "steps >= 2"),
        (lambda: schedules.Table(torch.tensor([1.0, 2.0])), "strictly decreasing"),
        (lambda: schedules.grid(schedules.ddpm(), 0), "steps >= 1"),
        (lambda: schedules.grid(lambda t: t, 5), "strictly decreasing"),
        (lambda: schedules.grid(schedules.Plateau(0, 1), 5), "infinite end|strictly decreasing"),
        (lambda: schedules.draw(schedules.ddpm(), 0), "n >= 1"),
    ],
)
def test_bad_schedules_are_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
@pytest.mark.parametrize("name", schedules.GRIDS)
def test_grids_by_name_rise_from_noise_to_the_clean_end(name, steps):
    grid = schedules.named_grid(name, steps)
    assert grid.dtype == torch.float64
    assert len(grid) == steps + 1
    assert bool((grid.diff() > 0).all())
    assert float(grid[-1]) == math.inf
    assert float(grid[0]) < (-8 if name != "leading" else 10)


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [("leading", [0, 142, 284, 426, 568, 710, 852]), ("trailing", [142, 285, 428, 570, 713, 856, 999]), ("linspace", [0, 166, 333, 500, 666, 832, 999])],
)  # fmt: skip
def test_spacings_are_those_of_the_field(spacing, timesteps):
    """Seven steps of a thousand; the step from each goes to the next of them, the last to the clean end."""
    table = schedules.ddpm()
    grid = schedules.spaced(table, 7, spacing)
    assert grid[:-1].flip(0).equal(table.logsnrs[timesteps])
    if spacing == "leading":
        assert schedules.spaced(table, 7, spacing, offset=1)[:-1].flip(0).equal(table.logsnrs[[t + 1 for t in timesteps]])


def test_grids_take_options_and_lists():
    assert schedules.named_grid("karras:rho=5,sigma_max=20", 9).equal(schedules.grid(schedules.karras(sigma_max=20.0, rho=5.0), 9))
    assert schedules.named_grid("-8,-2.5,0,4").tolist() == [-8.0, -2.5, 0.0, 4.0, math.inf]
    assert schedules.named_grid("-8,inf", 1).tolist() == [-8.0, math.inf]


@pytest.mark.parametrize(
    ("spec", "steps", "message"),
    [
        ("karas", 5, "did you mean karras"),
        ("karras:rh=3", 5, "did you mean rho"),
        ("karras:rho=0", 5, "rho > 0"),
        ("karras", None, "a number of steps"),
        ("ddpm", 0, "steps >= 1"),
        ("leading", 0, "1 to 1000"),
        ("trailing", 1001, "1 to 1000"),
        ("leading:offset=200", 7, "choose a smaller offset"),
        ("3,1,0", None, "increasing log-SNRs"),
        ("-3,one", None, "log-SNRs separated by commas"),
        ("-3,0,3", 5, "given a grid of 3 steps, expected 5 steps"),
        ("uniform:low=3,high=1", 5, "low < high"),
    ],
)
def test_bad_grids_are_one_line(spec, steps, message):
    with pytest.raises(ValueError, match=message):
        schedules.named_grid(spec, steps)


def test_the_vp_and_iddpm_laws_are_those_of_their_preconditioning():
    from contrastive_diffusion.nets.preconditioning import EPS_T, iddpm_sigmas, vp_sigma

    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = [-2 * math.log(vp_sigma(EPS_T + (1 - EPS_T) * float(v))) for v in t]
    assert schedules.vp()(t).tolist() == pytest.approx(expected, rel=1e-9)
    table = channel.logsnr_of_sigma(iddpm_sigmas()[:-1].double()).flip(0)
    torch.testing.assert_close(schedules.iddpm().logsnrs, table, rtol=0, atol=1e-3)
