"""Parity with diffusers' schedulers: whole trajectories on one deterministic denoiser, with the same noise.

Their tables are put in float64 for the exact comparison; in float32 they are left as they are.
"""

import math

import pytest
import torch

from contrastive_diffusion import channel, schedules, solvers
from contrastive_diffusion.denoisers import from_timesteps
from contrastive_diffusion.sampling import walk
from contrastive_diffusion.solvers import StepMap

diffusers = pytest.importorskip("diffusers", reason="pip install 'contrastive-diffusion[diffusers]'")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs, of numpy

PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
precise = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
SHAPE = (4, 3, 5, 2)
DDPM = schedules.ddpm()
BASE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def _net(z, t):
    """Some smooth function of state and timestep, of unit scale."""
    t = torch.as_tensor(t, dtype=z.dtype).reshape(-1, *[1] * (z.dim() - 1))
    return torch.tanh(0.6 * z + 0.3 * torch.roll(z, 1, -1)) * (0.8 + 0.2 * torch.cos(t / 300)) + 0.1 * torch.sin(z - t / 500)


def _draws(steps, dtype):
    generator = torch.Generator().manual_seed(1)
    start, *noises = torch.randn(steps + 1, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return start, noises


class _Wide:
    """torch with float32 turned into float64, for schedulers that cast to float32 in the middle of a step."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def _widened(monkeypatch, module, dtype):
    if dtype == torch.float64:
        monkeypatch.setattr(module, "torch", _Wide())


def _double(scheduler, dtype, names):
    """Their betas are float32 numbers; ours are not. In float64 both get ours."""
    if dtype == torch.float64:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        bar = (1 - betas).cumprod(0)
        for name, value in {
            "betas": betas,
            "alphas": 1 - betas,
            "alphas_cumprod": bar,
            "final_alpha_cumprod": torch.tensor(1.0, dtype=torch.float64),
        }.items():
            if name in names:
                setattr(scheduler, name, value)
    return scheduler


def _ours(solver, denoiser, grid, start, noises):
    return [start, *walk(StepMap(solver, denoiser, grid), start, lambda i: noises[i])]


def _compare(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        scale = max(1.0, float(other.abs().max()))
        assert float((mine - other).abs().max()) < tolerance * scale


def _inject(monkeypatch, module, noises):
    """Their noise is drawn where they need it: hand them ours in turn."""
    queue = iter(noises)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(queue))


@precise
@pytest.mark.parametrize("steps", [50, 30, 7])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("variance", "theirs"), [("posterior", "fixed_small"), ("beta", "fixed_large"), ("learned", "learned_range")])
def test_ddpm(variance, theirs, spacing, steps, dtype, tolerance, monkeypatch):
    scheduler = diffusers.DDPMScheduler(**BASE, variance_type=theirs, clip_sample=False, timestep_spacing=spacing)
    _double(scheduler, dtype, ("betas", "alphas", "alphas_cumprod")).set_timesteps(steps)
    scheduler.one = torch.tensor(1.0, dtype=dtype)
    start, noises = _draws(steps, dtype)
    learned = variance == "learned"
    net = (lambda z, t: torch.cat([_net(z, t), torch.sin(3 * z)], 1)) if learned else _net
    grid = schedules.spaced(DDPM, steps, spacing)
    timesteps = torch.searchsorted(-DDPM.logsnrs, -grid[:-1])
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    ours = _ours(solvers.ddpm(variance), from_timesteps(net, DDPM, rounded=True, learned=learned), grid, start, noises)
    _inject(monkeypatch, diffusers.schedulers.scheduling_ddpm, noises)
    z, path = start, [start]
    for t in scheduler.timesteps:
        if t == scheduler.timesteps[-1] and t > 0:
            break  # they add noise on a last step to the clean end that does not start at t = 0; the clean end has none
        z = scheduler.step(net(z, t.expand(len(z))), t, z).prev_sample
        path.append(z)
    assert len(path) == steps + (spacing != "trailing")
    _compare(ours[: len(path)], path, tolerance)


@precise
@pytest.mark.parametrize("clip", [0.0, 0.7])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 50), ("leading", 30), ("trailing", 50)])
def test_ddim(spacing, steps, eta, clip, dtype, tolerance):
    """Trailing where the steps divide 1000; elsewhere their stride is not that of their timesteps (see the next test)."""
    from contrastive_diffusion.combinators import clamped

    scheduler = diffusers.DDIMScheduler(**BASE, clip_sample=clip > 0, clip_sample_range=clip, timestep_spacing=spacing, set_alpha_to_one=True)
    _double(scheduler, dtype, ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod")).set_timesteps(steps)
    start, noises = _draws(steps, dtype)
    denoiser = from_timesteps(_net, DDPM, rounded=True)
    ours = _ours(solvers.ddim(eta), clamped(denoiser, clip) if clip else denoiser, schedules.spaced(DDPM, steps, spacing), start, noises)
    z, path = start, [start]
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        out = scheduler.step(_net(z, t.expand(len(z))), t, z, eta=eta, variance_noise=noise if eta else None, use_clipped_model_output=True)
        z = out.prev_sample
        path.append(z)
    _compare(ours, path, tolerance)


def test_ddim_of_theirs_strides_past_its_own_timesteps():
    """Why the parity above leaves out linspace and uneven trailing: their step from t goes to t - 1000 // steps, not to the next timestep."""
    scheduler = diffusers.DDIMScheduler(**BASE, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(30)
    t, following = scheduler.timesteps[1:3].tolist()
    assert following != t - 1000 // 30
    start, _ = _draws(1, torch.float32)
    eps_hat = _net(start, torch.tensor(t))
    theirs = scheduler.step(eps_hat, t, start).prev_sample
    for target, same in ((t - 1000 // 30, True), (following, False)):
        grid = torch.stack([DDPM.logsnrs[t], DDPM.logsnrs[target]])
        ours = StepMap(solvers.ddim(), lambda z, a: eps_hat, grid)(start, 0, start)
        assert (float((ours - theirs).abs().max()) < 1e-5) == same


@precise
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_thresholding(spacing, dtype, tolerance, monkeypatch):
    from contrastive_diffusion.combinators import thresholded

    scheduler = diffusers.DDPMScheduler(
        **BASE, variance_type="fixed_small", clip_sample=False, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5, timestep_spacing=spacing
    )  # fmt: skip
    _double(scheduler, dtype, ("betas", "alphas", "alphas_cumprod")).set_timesteps(20)
    scheduler.one = torch.tensor(1.0, dtype=dtype)
    start, noises = _draws(20, dtype)
    ours = _ours(solvers.ddpm(), thresholded(from_timesteps(_net, DDPM, rounded=True), 0.9, 1.5), schedules.spaced(DDPM, 20, spacing), start, noises)
    _inject(monkeypatch, diffusers.schedulers.scheduling_ddpm, noises)
    z, path = start, [start]
    for t in scheduler.timesteps[:-1]:
        z = scheduler.step(_net(z, t.expand(len(z))), t, z).prev_sample
        path.append(z)
    _compare(ours[:-1], path, tolerance)


def _edm_denoiser(z, logsnr):
    """eps_hat of the same net, read as EDM reads it: the timestep is sigma's."""
    return _net(z, 100 * channel.sigma_of_logsnr(logsnr).log())


def _in_sigma(grid, ours):
    """Our states as the variance-exploding ones of EDM's schedulers."""
    return [z / channel.signal(level).to(z.dtype) for z, level in zip(ours, grid, strict=True)]


def _sigmas(scheduler, grid, dtype):
    """Theirs are float32; in float64 they get ours."""
    if dtype == torch.float64:
        scheduler.sigmas = torch.cat([channel.sigma_of_logsnr(grid[:-1]), torch.zeros(1, dtype=torch.float64)])


@precise
@pytest.mark.parametrize("churn", [0.0, 6.0])
@pytest.mark.parametrize("steps", [18, 40])
def test_edm_euler(steps, churn, dtype, tolerance, monkeypatch):
    _widened(monkeypatch, diffusers.schedulers.scheduling_edm_euler, dtype)
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(steps)
    grid = schedules.grid(schedules.karras(), steps)
    _sigmas(scheduler, grid, dtype)
    start, noises = _draws(steps, dtype)
    gammas = min(churn / steps, math.sqrt(2) - 1)
    ours = _ours(solvers.edm(churn, 0.05, 50.0, 1.007, second=False), _edm_denoiser, grid, start, noises)
    y, path = start / channel.signal(grid[0]).to(dtype), []
    path.append(y)
    for t, sigma, noise in zip(scheduler.timesteps, scheduler.sigmas[:-1], noises, strict=True):
        gamma = gammas if 0.05 <= sigma <= 50.0 else 0.0
        hat = sigma.to(torch.float64) * (1 + gamma)
        monkeypatch.setattr(diffusers.schedulers.scheduling_edm_euler, "randn_tensor", lambda *_, n=noise, **__: n)
        level = channel.logsnr_of_sigma(hat).expand(len(y))
        raised = y + noise * 1.007 * (hat**2 - sigma**2).sqrt().to(dtype) if gamma else y
        denoised = raised - hat.to(dtype) * _edm_denoiser(raised * channel.signal(level[0]).to(dtype), level.to(dtype))
        # Their step takes the network's raw output; invert the preconditioning, c_skip y + c_out F.
        c_skip, c_out = 0.25 / (hat**2 + 0.25), hat * 0.5 / (hat**2 + 0.25).sqrt()
        output = (denoised - c_skip.to(dtype) * raised) / c_out.to(dtype)
        y = scheduler.step(output, t, y, s_churn=churn, s_tmin=0.05, s_tmax=50.0, s_noise=1.007).prev_sample
        path.append(y)
    _compare(_in_sigma(grid, ours)[:-1], path[:-1], tolerance)
    _compare([ours[-1]], [path[-1]], tolerance)


@precise
@pytest.mark.parametrize("steps", [18, 40])
def test_heun(steps, dtype, tolerance, monkeypatch):
    _widened(monkeypatch, diffusers.schedulers.scheduling_heun_discrete, dtype)
    scheduler = diffusers.HeunDiscreteScheduler(**BASE, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    low, high = float(scheduler.sigmas[-2]), float(scheduler.sigmas[0])
    grid = schedules.grid(schedules.karras(low, high, 7.0), steps)
    if dtype == torch.float64:
        sigma = channel.sigma_of_logsnr(grid[:-1])
        scheduler.sigmas = torch.cat([sigma[:1], sigma[1:].repeat_interleave(2), torch.zeros(1, dtype=torch.float64)])
    start, _ = _draws(steps, dtype)
    ours = _ours(solvers.heun(), _edm_denoiser, grid, start, [start] * steps)
    y = start / channel.signal(grid[0]).to(dtype)
    for k in range(2 * steps - 1):
        sigma = scheduler.sigmas[k].double()  # of the state they returned last, in either stage
        level = channel.logsnr_of_sigma(sigma)
        eps_hat = _edm_denoiser(y * channel.signal(level).to(dtype), level.to(dtype).expand(len(y)))
        y = scheduler.step(eps_hat, scheduler.timesteps[k], y).prev_sample
    _compare([ours[-1]], [y], tolerance)


@precise
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_dpm_solver(algorithm, spacing, steps, dtype, tolerance, monkeypatch):
    _widened(monkeypatch, diffusers.schedulers.scheduling_dpmsolver_multistep, dtype)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BASE, algorithm_type=algorithm, solver_order=2, solver_type="midpoint", timestep_spacing=spacing, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    grid = schedules.to_clean(DDPM.logsnrs[timesteps])
    if dtype == torch.float64:
        scheduler.sigmas = torch.cat([channel.sigma_of_logsnr(grid[:-1]), torch.zeros(1, dtype=torch.float64)])
    start, noises = _draws(steps, dtype)
    stochastic = algorithm.startswith("sde")
    ours = _ours(solvers.dpmpp(stochastic), from_timesteps(_net, DDPM, rounded=True), grid, start, noises)
    z, path = start, [start]
    for t, noise in zip(timesteps, noises, strict=True):
        z = scheduler.step(_net(z, t.expand(len(z))), t, z, variance_noise=noise).prev_sample
        path.append(z)
    _compare(ours, path, tolerance)


@precise
def test_edm_dpm_solver(dtype, tolerance, monkeypatch):
    _widened(monkeypatch, diffusers.schedulers.scheduling_edm_dpmsolver_multistep, dtype)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0, solver_order=2)
    scheduler.set_timesteps(20)
    grid = schedules.grid(schedules.karras(), 20)
    _sigmas(scheduler, grid, dtype)
    start, noises = _draws(20, dtype)
    ours = _ours(solvers.dpmpp(), _edm_denoiser, grid, start, noises)
    y = start / channel.signal(grid[0]).to(dtype)
    for t, sigma, level in zip(scheduler.timesteps, scheduler.sigmas[:-1].double(), grid[:-1], strict=True):
        denoised = y - sigma.to(dtype) * _edm_denoiser(y * channel.signal(level).to(dtype), level.to(dtype).expand(len(y)))
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
        y = scheduler.step((denoised - c_skip.to(dtype) * y) / c_out.to(dtype), t, y).prev_sample
    _compare([ours[-1]], [y], tolerance)
