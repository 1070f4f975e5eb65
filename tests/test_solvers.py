"""Step maps against closed forms: coefficients, and the order of the error on the exact flow of a Gaussian."""

import dataclasses
import math

import pytest
import torch

from contrastive_diffusion import channel, schedules, solvers
from contrastive_diffusion.data.mixtures import GaussianMixture
from contrastive_diffusion.denoisers import Counted
from contrastive_diffusion.sampling import Sequential, normal, walk
from contrastive_diffusion.solvers import SOLVERS, StepMap

FAMILY = {
    "ddpm-posterior": solvers.ddpm(),
    "ddpm-beta": solvers.ddpm("beta"),
    "ddim-0": solvers.ddim(),
    "ddim-0.5": solvers.ddim(0.5),
    "ddim-1": solvers.ddim(1.0),
    "euler": solvers.euler(),
    "heun": solvers.heun(),
    "dpmpp": solvers.dpmpp(),
    "dpmpp-sde": solvers.dpmpp(stochastic=True),
    "eab2": solvers.eab(2),
    "eab3": solvers.eab(3),
    "gradient": solvers.gradient(),
    "ddim2": solvers.ddim2(),
    "ddpm2": solvers.ddpm2(),
    "edm": solvers.edm(churn=5.0),
    "edm-euler": solvers.edm(churn=5.0, second=False),
    "euler-maruyama-vp": solvers.euler_maruyama(),
    "euler-maruyama-ve": solvers.euler_maruyama("ve"),
    "pc-vp": solvers.predictor_corrector(snr=0.01),
    "pc-ve": solvers.predictor_corrector("ve", snr=0.01, corrections=2),
    "sde-heun": solvers.sde_heun(),
}
every = pytest.mark.parametrize("solver", FAMILY.values(), ids=FAMILY)
STD = 0.6


def _law() -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, 1), STD)


def test_the_family_is_the_registry():
    """The one called adaptive has tests of its own: its steps are not those of a grid."""
    assert {name for name in SOLVERS if not any(member == name or member.startswith(f"{name}-") for member in FAMILY)} == {"adaptive"}
    assert all(solver.name == name for name, solver in FAMILY.items())
    assert all(make().name.startswith(name) for name, make in SOLVERS.items())


def _variance(level) -> float:
    return float(channel.signal(level)) ** 2 * STD**2 + float(channel.noise(level)) ** 2


def _response(solver, grid) -> torch.Tensor:
    """What the solver makes of the start and of each unit noise, one by one: the denoiser of a Gaussian is linear, so is the walk.

    Row 0 starts at 1 without noise; every other row starts at 0 and draws a single 1. (1 + T * draws,) float64.
    """
    step, count = StepMap(solver, _law(), grid), (len(grid) - 1) * solver.draws
    unit = torch.eye(1 + count, dtype=torch.float64)[1:].reshape(-1, solver.draws, 1 + count, 1)
    noises = unit.transpose(1, 2) if solver.draws > 1 else unit[:, 0]
    start = torch.eye(1 + count, 1, dtype=torch.float64)
    *_, last = walk(step, start, lambda i: noises[i])
    return last[:, 0]


def _variance_error(solver, grid) -> float:
    """Relative error of the variance of what the solver makes of exact draws at the first level: exact, no sampling."""
    start, *noises = _response(solver, grid).square()
    return float(abs((start * _variance(grid[0]) + sum(noises)) / _variance(grid[-1]) - 1))


def _graded(low: float, high: float, steps: int) -> torch.Tensor:
    """A grid whose first steps shrink faster than the others, so that the lower order of a multistep solver's start does not show."""
    return low + (high - low) * torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.5


@every
def test_measured_order_is_the_declared_one_on_a_gaussian(solver):
    coarse, fine = (_variance_error(solver, _graded(-4, 6, steps)) for steps in (200, 400))
    assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.15)
    assert fine < {1: 0.1, 2: 1e-3, 3: 1e-5}[solver.order]


@pytest.mark.parametrize("snr", [0.16, 0.3])
def test_langevin_corrections_leave_the_bias_that_theory_gives(snr):
    """Stationary variance of z + d S(z) + sqrt(2 d) n on a Gaussian of variance v: v / (1 - d / 2 v), d = 2 (snr noise)^2."""
    solver = solvers.predictor_corrector(snr=snr, corrections=2000)
    grid = torch.tensor([-1.0, 0.0], dtype=torch.float64)
    v, d = _variance(0.0), 2 * snr**2 * 0.5
    assert _variance_error(solver, grid) == pytest.approx(1 / (1 - d / (2 * v)) - 1, rel=1e-6)


def _flow_error(solver, steps: int) -> float:
    """Largest error against the exact flow of a mixture on a line, which carries every quantile to the same quantile."""
    law = GaussianMixture(torch.tensor([[-1.0], [0.8]]), torch.tensor([0.3, 0.5]), torch.tensor([0.4, 0.6]))
    grid = _graded(-4, 4, steps)
    quantiles = torch.linspace(0.03, 0.97, 33, dtype=torch.float64)
    *_, last = walk(StepMap(solver, law, grid), _at_quantiles(law, grid[0], quantiles), lambda i: torch.zeros(33, 1))
    return float((last - _at_quantiles(law, grid[-1], quantiles)).abs().max())


def _at_quantiles(law: GaussianMixture, level, quantiles: torch.Tensor) -> torch.Tensor:
    """The quantiles (n,) of the law of z at ``level``, (n, 1), by bisection."""
    means = channel.signal(level) * law.means[:, 0]
    stds = (channel.signal(level).square() * law.stds[:, 0].square() + channel.noise(level).square()).sqrt()
    low, high = torch.full_like(quantiles, -20), torch.full_like(quantiles, 20)
    for _ in range(80):
        middle = (low + high) / 2
        mass = (law.log_weights.exp() * torch.special.ndtr((middle[:, None] - means) / stds)).sum(1)
        low, high = torch.where(mass < quantiles, middle, low), torch.where(mass < quantiles, high, middle)
    return low[:, None]


@pytest.mark.parametrize("solver", [s for s in FAMILY.values() if not s.noisy], ids=[n for n, s in FAMILY.items() if not s.noisy])
def test_measured_order_is_the_declared_one_on_the_flow_of_a_mixture(solver):
    coarse, fine = _flow_error(solver, 400), _flow_error(solver, 800)
    assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.15)
    assert fine < {1: 0.02, 2: 2e-4, 3: 2e-6}[solver.order]


@every
def test_the_step_to_infinity_returns_the_denoised_x(solver, generator):
    """Whatever was remembered, and whatever the noise; churn, which comes before the reading, ends above this level."""
    solver = dataclasses.replace(solver, s_min=0.5) if isinstance(solver, solvers.Churned) else solver
    law, grid = _law(), torch.tensor([-3.0, 0.0, 2.0, math.inf], dtype=torch.float64)
    noises = torch.randn(3, 4, solver.draws, 1, generator=generator, dtype=torch.float64).squeeze(2)
    start = torch.randn(4, 1, generator=generator, dtype=torch.float64)
    *_, before, last = walk(StepMap(solver, law, grid), start, lambda i: noises[i])
    level = torch.full((4,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(last, channel.x_from_eps(before, level, law(before, level)))


@every
def test_rows_are_their_own_steps(solver, generator):
    """One batch of mixed steps, one of them the last, is the steps one by one; and a step by number is the step by rows."""
    law, grid = _law(), torch.tensor([-4.0, -1.0, 2.0, 3.0, 5.0, math.inf], dtype=torch.float64)
    step, rows = StepMap(solver, law, grid), torch.tensor([4, 0, 2, 1, 3, 4])
    z = torch.randn(6, 1, generator=generator, dtype=torch.float32)
    n = torch.randn(6, solver.draws, 1, generator=generator).squeeze(1)
    outputs = torch.randn(step.memory + 1, 6, 1, generator=generator)

    def whole(z, i, n, outputs):
        return step.combine(z, i, (step.read(z, i), *outputs[1:]), n) if step.table else step(z, i, n)

    mixed = whole(z, rows, n, outputs)
    for k, i in enumerate(rows.tolist()):
        one = slice(k, k + 1)
        assert whole(z[one], i, n[one], outputs[:, one]).equal(mixed[one])


@every
def test_float32_follows_float64(solver):
    grid = schedules.grid(schedules.karras(), 40)
    ends = []
    for dtype in (torch.float32, torch.float64):
        noise = (
            normal(3, torch.arange(50), torch.zeros(50, dtype=torch.int64), (40, solver.draws, 1), torch.float64).transpose(0, 1).squeeze(2).to(dtype)
        )
        start = normal(4, torch.arange(50), torch.zeros(50, dtype=torch.int64), (1,), torch.float32).to(dtype)
        *_, last = walk(StepMap(solver, _law(), grid), start, lambda i, noise=noise: noise[i])
        ends.append(last)
    assert float((ends[0] - ends[1]).abs().max()) < 3e-5


def test_multistep_solvers_refuse_a_single_step():
    grid, z = schedules.grid(schedules.karras(), 5), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="remembers 1 outputs"):
        StepMap(solvers.dpmpp(), _law(), grid)(z, 0, z)
    with pytest.raises(ValueError, match="a whole grid"):
        solvers.dpmpp().step(_law(), z, grid[:2], grid[1:3], z)


def test_multistep_tables_start_with_what_they_have():
    for solver in FAMILY.values():
        step = StepMap(solver, _law(), schedules.grid(schedules.ddpm(), 9))
        if step.table is not None:
            b = step.table[1]
            assert b.shape == (9, step.memory + 1)
            assert bool((b.triu(1)[: b.shape[1]] == 0).all())
            assert bool(b.isfinite().all())


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


@pytest.mark.parametrize(("steps", "value"), [(18, 0.527624637), (40, 0.504876865), (256, 0.500095425)])
def test_heun_has_edms_check_values(steps, value):
    """The sampler's published recipe on D = y / (1 + 4 sigma^2) from y = 80, where the exact flow ends at 0.499990235."""
    law, grid = GaussianMixture(torch.zeros(1, 1), 0.5), schedules.grid(schedules.karras(), steps)
    for solver in (solvers.heun(), solvers.edm()):
        *_, last = walk(StepMap(solver, law, grid), 80 * channel.signal(grid[:1, None]), lambda i: torch.zeros(1, 1))
        assert float(last) == pytest.approx(value, abs=1e-9)


def test_churn_is_edms_algorithm_2(generator):
    """Written again from the paper, in sigma and y: gamma's cap, its range, the raised level, S_noise, Heun from there."""
    law, steps, churn, s_min, s_max, s_noise = GaussianMixture(torch.tensor([[-1.0], [1.5]]), 0.3), 12, 4.0, 0.05, 50.0, 1.007
    grid = schedules.grid(schedules.karras(), steps)
    sigma = torch.cat([channel.sigma_of_logsnr(grid[:-1]), torch.zeros(1, dtype=torch.float64)])
    z, noises = torch.randn(6, 1, generator=generator, dtype=torch.float64), torch.randn(steps, 6, 1, generator=generator, dtype=torch.float64)
    y = z / float(channel.signal(grid[0]))

    def denoised(y, s):
        level = channel.logsnr_of_sigma(s)
        return y - s * law(y * float(channel.signal(level)), level.expand(len(y)))

    raised = 0
    for s, t, n in zip(sigma[:-1], sigma[1:], noises, strict=True):
        gamma = min(churn / steps, math.sqrt(2) - 1) if s_min <= s <= s_max else 0.0
        raised += gamma > 0
        hat = s * (1 + gamma)
        y = y + (hat**2 - s**2).sqrt() * s_noise * n
        d = (y - denoised(y, hat)) / hat
        euler = y + (t - hat) * d
        y = euler if t == 0 else y + (t - hat) * (d + (euler - denoised(euler, t)) / t) / 2
    assert 0 < raised < steps
    *_, last = walk(StepMap(solvers.edm(churn, s_min, s_max, s_noise), law, grid), z, lambda i: noises[i])
    torch.testing.assert_close(last, y, rtol=1e-11, atol=1e-11)


def test_gradient_estimation_and_adams_bashforth_of_one_value_are_ddim(generator):
    grid = schedules.grid(schedules.karras(), 9)
    a, b, _ = solvers.gradient(gamma=1.0).table(grid)
    expected = solvers.ddim().coefficients(grid[:-1], grid[1:])
    torch.testing.assert_close((a, b[:, 0]), expected[:2])
    assert bool((b[:, 1] == 0).all())


def test_adams_bashforth_is_exact_for_polynomials_in_the_log_snr():
    """x_hat = lambda^(order - 1) along the path: the integral in closed form, on an uneven grid."""
    grid = torch.tensor([-3.0, -2.5, -1.0, 0.5, 1.2, 3.0, 4.1], dtype=torch.float64)
    for order in (2, 3):
        _, b, _ = solvers.eab(order).table(grid)
        for i in range(order - 1, len(grid) - 1):
            lam, h = grid / 2, float(grid[i + 1] - grid[i]) / 2
            x = lam ** (order - 1)
            nodes = torch.linspace(0, h, 20001, dtype=torch.float64)
            exact = torch.trapezoid(torch.exp(nodes - h) * (lam[i] + nodes) ** (order - 1), nodes) * channel.signal(grid[i + 1])
            got = sum(b[i, j] * x[i - j] for j in range(order))
            assert float(got) == pytest.approx(float(exact), rel=1e-7)


@pytest.mark.parametrize("solver", [s for s in FAMILY.values() if s.noisy] + [solvers.adaptive(0.02, 0.002)], ids=lambda s: s.name)
def test_samples_have_the_mean_and_covariance_of_the_law(solver):
    """Against the closed form of a mixture, within the error of sampling."""
    law = GaussianMixture(torch.tensor([[-1.0, 0.5], [0.8, -0.6]]), torch.tensor([[0.3, 0.6], [0.5, 0.2]]), torch.tensor([0.35, 0.65]))
    n, grid = 2000, schedules.grid(schedules.uniform(-9.0, 9.0), {1: 900, 2: 150}[solver.order])
    x = Sequential(solver)(law, grid, (n, 2), seed=5).x.double()
    w = law.log_weights.exp()[:, None]
    mean = (w * law.means).sum(0)
    cov = (w * law.stds.square()).sum(0).diag() + (w * (law.means - mean)).T @ (law.means - mean)
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert bool(((x.mean(0) - mean).abs() < 4.5 * x.std(0) / n**0.5).all())
    assert bool(((products.mean(0) - cov).abs() < 4.5 * products.std(0) / n**0.5).all())


def test_learned_variance_lies_between_the_fixed_ones(generator):
    grid, law = schedules.spaced(schedules.ddpm(), 10), _law()
    z, n = torch.randn(2, 4, 1, generator=generator, dtype=torch.float64)

    class Net:
        def __init__(self, v):
            self.v = v

        def __call__(self, z, logsnr):
            return law(z, logsnr)

        def ranged(self, z, logsnr):
            return law(z, logsnr), torch.full_like(z, self.v)

    def spread(solver, denoiser, i):
        step = StepMap(solver, denoiser, grid)
        return (step(z, i, n) - step(z, i, torch.zeros_like(n))) / n

    for i in (0, 5, 8):
        small, large = (spread(solvers.ddpm(v), law, i) for v in ("posterior", "beta"))
        torch.testing.assert_close(spread(solvers.ddpm("learned"), Net(-1.0), i), small)
        torch.testing.assert_close(spread(solvers.ddpm("learned"), Net(1.0), i), large)
        torch.testing.assert_close(spread(solvers.ddpm("learned"), Net(0.0), i), (small * large).sqrt())
    torch.testing.assert_close(spread(solvers.ddpm("learned"), Net(1.0), 9), torch.zeros_like(z))
    drawn = Sequential(solvers.ddpm("learned"), max_rows=3)(Net(0.3), grid, (7, 1))
    assert (drawn.evals, drawn.rounds) == (70, 10)
    with pytest.raises(ValueError, match="without a learned variance"):
        Sequential(solvers.ddpm("learned"))(law, grid, (2, 1))


@pytest.mark.parametrize(
    ("spec", "name", "field", "value"),
    [("heun", "heun", "evals", 2), ("ddim:eta=0.5", "ddim-0.5", "noisy", True), ("edm:churn=40,s_noise=1.007,second=false", "edm-euler", "s_noise", 1.007),
     ("pc:sde=ve,corrections=2", "pc-ve", "corrections", 2), ("ddpm:variance=beta", "ddpm-beta", "noisy", True)],
)  # fmt: skip
def test_solvers_by_name_with_options(spec, name, field, value):
    solver = solvers.solver(spec)
    assert solver.name == name
    assert getattr(solver, field) == value


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("huen", "did you mean heun"),
        ("heun:order=2", "without options"),
        ("ddim:etta=1", "did you mean eta"),
        ("ddim:eta=big", r"given eta of ddim = 'big', expected a number \(float\)"),
        ("ddim:eta=2", "0 <= eta <= 1"),
        ("pc:corrections=1.5", r"a number \(int\)"),
        ("edm:second=maybe", "true or false"),
        ("edm:churn=-1", "a finite churn >= 0"),
        ("edm:s_min=2,s_max=1", "0 <= s_min <= s_max"),
        ("edm:s_noise=0", "s_noise > 0"),
        ("pc:snr=1.5", "0 < snr < 1"),
        ("gradient:gamma=0.5", "1 <= gamma <= 3"),
        ("adaptive:relative=0", "both > 0"),
        ("euler-maruyama:sde=vpp", "did you mean vp"),
        ("ddpm:variance=learnt", "did you mean learned"),
    ],
)
def test_bad_specs_are_one_line(spec, message):
    with pytest.raises(ValueError, match=message):
        solvers.solver(spec)


@pytest.mark.parametrize("evals", [1, 2, 5, 18, 35, 36])
@every
def test_steps_for_spends_what_it_is_given(solver, evals):
    steps = solvers.steps_for(solver, evals)
    counted = Counted(_law())
    Sequential(solver)(counted, schedules.grid(schedules.karras(), steps), (1, 1))
    assert counted.rows <= max(evals, 1)
    more = Counted(_law())
    Sequential(solver)(more, schedules.grid(schedules.karras(), steps + 1), (1, 1))
    assert more.rows > evals or solver.name == "ddim2"  # whose first step has one evaluation too


def test_evals_do_not_decide_the_steps_of_the_adaptive_solver():
    with pytest.raises(ValueError, match="its tolerances"):
        solvers.steps_for(solvers.adaptive(), 100)
