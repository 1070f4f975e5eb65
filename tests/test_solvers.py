"""Step maps against closed forms: coefficients, and the order of the error on the exact flow of a Gaussian."""

import math

import pytest
import torch

from contrastive_diffusion import channel, schedules, solvers
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.denoisers import Counted
from contrastive_diffusion.solvers import SOLVERS, StepMap

FAMILY = {
    "ddpm-posterior": solvers.ddpm(),
    "ddpm-beta": solvers.ddpm("beta"),
    "ddim-0": solvers.ddim(),
    "ddim-0.5": solvers.ddim(0.5),
    "ddim-1": solvers.ddim(1.0),
    "euler": solvers.euler(),
    "heun": solvers.heun(),
}
every = pytest.mark.parametrize("solver", FAMILY.values(), ids=FAMILY)
STD = 0.6


def _law() -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, 1), STD)


def test_the_family_is_the_registry():
    assert {name.split("-")[0] for name in FAMILY} == set(SOLVERS)
    assert all(getattr(solver, "name", "") == name for name, solver in FAMILY.items())


def _variance_error(solver, steps: int) -> float:
    """Variance of what the solver makes of exact draws of p at the first level, against the law's at the last: no sampling.

    The denoiser of a Gaussian is linear, so one step is z' = m z + c n, and variances multiply.
    """
    law, variance = _law(), 0.0
    grid = torch.linspace(-4, 6, steps + 1, dtype=torch.float64)
    at = lambda a: float(channel.signal(a)) ** 2 * STD**2 + float(channel.noise(a)) ** 2  # noqa: E731
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    variance = at(grid[0])
    for a, b in zip(grid[:-1], grid[1:], strict=True):
        m = solver.step(law, one, a[None], b[None], zero)
        c = solver.step(law, zero, a[None], b[None], one)
        variance = float(m) ** 2 * variance + float(c) ** 2
    return abs(variance / at(grid[-1]) - 1)


@every
def test_measured_order_is_the_declared_one(solver):
    coarse, fine = _variance_error(solver, 200), _variance_error(solver, 400)
    assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.15)
    assert fine < (1e-4 if solver.order == 2 else 0.06)


@every
def test_the_step_to_infinity_returns_the_denoised_x(solver, generator):
    law = _law()
    z, a = torch.randn(4, 1, generator=generator, dtype=torch.float64), torch.linspace(-3, 5, 4, dtype=torch.float64)
    out = solver.step(law, z, a, torch.full((4,), math.inf, dtype=torch.float64), torch.ones_like(z))
    torch.testing.assert_close(out, channel.x_from_eps(z, a, law(z, a)))


@every
def test_rows_are_their_own_steps(solver, generator):
    """One batch of mixed steps, one of them the last, is the steps one by one."""
    law = _law()
    z, n = torch.randn(2, 5, 1, generator=generator, dtype=torch.float64)
    a = torch.tensor([-4.0, -1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    b = torch.tensor([-3.0, 0.5, math.inf, 3.1, 9.0], dtype=torch.float64)
    whole = solver.step(law, z, a, b, n)
    rows = [solver.step(law, z[i : i + 1], a[i : i + 1], b[i : i + 1], n[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(whole, torch.cat(rows), rtol=0, atol=0)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_is_ho_et_al(variance):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    table = schedules.ddpm().logsnrs
    t = torch.tensor([1, 10, 500, 999])
    a, b, c = solvers.ddpm(variance).coefficients(table[t], table[t - 1])
    torch.testing.assert_close(a, (1 - betas[t]).rsqrt())
    torch.testing.assert_close(b, -betas[t] / ((1 - betas[t]).sqrt() * (1 - bar[t]).sqrt()))
    expected = betas[t] * (1 - bar[t - 1]) / (1 - bar[t]) if variance == "posterior" else betas[t]
    torch.testing.assert_close(c.square(), expected)


def test_ddim_at_eta_one_is_ddpm_and_euler_is_ddim_at_zero():
    grid = schedules.grid(schedules.ddpm(), 50)
    for one, other in ((solvers.ddim(1.0), solvers.ddpm()), (solvers.euler(), solvers.ddim(0.0))):
        for u, v in zip(one.coefficients(grid[:-1], grid[1:]), other.coefficients(grid[:-1], grid[1:]), strict=True):
            torch.testing.assert_close(u, v, rtol=1e-9, atol=1e-12)


def test_heun_is_edms_algorithm_1(generator):
    """Written again from the paper, in sigma and y."""
    law, steps = GaussianMixture(torch.tensor([[-1.0], [1.5]]), 0.3), 12
    grid = schedules.grid(schedules.karras(), steps)
    sigma = torch.cat([channel.sigma_of_logsnr(grid[:-1]), torch.zeros(1, dtype=torch.float64)])
    z = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    y = z / float(channel.signal(grid[0]))

    def slope(y, s):
        level = channel.logsnr_of_sigma(s)
        return law(y * float(channel.signal(level)), level.expand(len(y)))

    for s, t in zip(sigma[:-1], sigma[1:], strict=True):
        d = slope(y, s)
        euler = y + (t - s) * d
        y = euler if t == 0 else y + (t - s) * (d + slope(euler, t)) / 2
    counted = Counted(law)
    step = StepMap(solvers.heun(), counted, grid)
    for i in range(steps):
        z = step(z, torch.full((6,), i), torch.zeros_like(z))
    torch.testing.assert_close(z, y)
    assert counted.rows == 6 * (2 * steps - 1)


def test_noise_enters_only_where_the_solver_draws_it():
    grid = schedules.grid(schedules.ddpm(), 10)
    for solver in FAMILY.values():
        if isinstance(solver, solvers.Affine):
            c = solver.coefficients(grid[:-1], grid[1:])[2]
            assert bool((c[:-1] > 0).all()) == solver.noisy
            assert float(c[-1]) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solvers.ddpm("beda"), "did you mean beta"),
        (lambda: solvers.ddim(1.5), "0 <= eta <= 1"),
        (lambda: StepMap(solvers.ddpm(), _law(), torch.tensor([1.0, 0.0])), "increasing"),
        (lambda: StepMap(solvers.ddpm(), _law(), torch.tensor([1.0])), "increasing"),
    ],
)
def test_bad_solvers_are_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
