r"""A schedule is a quantile function: t in [0, 1] -> log-SNR, strictly decreasing, in float64.

Read at random t it is a training law of noise levels, whose importance weight is its slope :math:`-d\alpha/dt` (one over its density,
so that :math:`E[w f(\alpha)]=\int f\,d\alpha`); read at stratified t it is a quadrature; read at equispaced t it is a sampling grid.
Any callable with that property is a schedule: nothing here needs a base class, and slopes are taken by differentiation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive_diffusion.channel import logsnr_of_sigma
from contrastive_diffusion.errors import call_named, choose, require

Schedule = Callable[[Tensor], Tensor]


def slope(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log-SNR and weight :math:`-d\alpha/dt` at t (any shape), float64."""
    with torch.enable_grad():
        t = t.detach().double().requires_grad_()
        logsnr = schedule(t)
        (derivative,) = torch.autograd.grad(logsnr.sum(), t)
    return logsnr.detach(), -derivative


def draw(schedule: Schedule, n: int, generator: torch.Generator | None = None, stratified: bool = True) -> tuple[Tensor, Tensor]:
    r"""``n`` log-SNRs of the law and their weights, float64 (n,), so that ``(weight * f(logsnr)).mean()`` estimates :math:`\int f\,d\alpha`.

    Stratified draws put one point in each n-th of the law, in random order, and leave the mean unbiased.
    """
    require(n >= 1, f"n = {n}", "n >= 1")
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    if stratified:
        u = (torch.randperm(n, generator=generator) + u) / n
    return slope(schedule, u.clamp(1e-12, 1 - 1e-12))


def grid(schedule: Schedule, steps: int) -> Tensor:
    """The sampling grid of ``steps`` steps: increasing log-SNRs (steps + 1,), float64, from the schedule's noisy end to +inf (clean)."""
    require(steps >= 1, f"steps = {steps}", "steps >= 1")
    # From t = 1 down to t = 0; a single step starts at the noisy end.
    t = 1 - torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    with torch.no_grad():
        logsnrs = torch.cat([schedule(t), torch.tensor([math.inf], dtype=torch.float64)])
    require(bool((logsnrs.diff() > 0).all()), "a schedule that is not strictly decreasing", "t -> log-SNR, strictly decreasing")
    require(bool(logsnrs[:-1].isfinite().all()), "a schedule with an infinite end", "finite log-SNR at t = 0 and t = 1", "truncate the law")
    return logsnrs


def ends(schedule: Schedule) -> tuple[float, float]:
    """The lowest and highest log-SNR of a schedule, nats."""
    with torch.no_grad():
        low, high = schedule(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
    return low, high


@dataclass(frozen=True, eq=False)
class Table:
    """Piecewise-linear through a strictly decreasing table of log-SNRs, exact at t = i / (T - 1). ``inverse`` gives fractional indices."""

    logsnrs: Tensor

    def __post_init__(self):
        require(self.logsnrs.dim() == 1 and len(self.logsnrs) >= 2, f"a table of shape {tuple(self.logsnrs.shape)}", "(T,) with T >= 2")
        require(bool((self.logsnrs.diff() < 0).all()), "a table that is not strictly decreasing", "log-SNR falling with the timestep")

    def __call__(self, t: Tensor) -> Tensor:
        table = self.logsnrs.to(t.device, torch.float64)
        position = t.double() * (len(table) - 1)
        left = position.detach().floor().long().clamp(0, len(table) - 2)
        return table[left] + (position - left) * (table[left + 1] - table[left])

    def inverse(self, logsnr: Tensor) -> Tensor:
        """The fractional index i in [0, T - 1] at which the table takes ``logsnr`` (any shape); clamped at the ends."""
        rising = self.logsnrs.to(logsnr.device, torch.float64).flip(0)
        logsnr = logsnr.double().clamp(rising[0], rising[-1])
        right = torch.searchsorted(rising, logsnr.contiguous()).clamp(1, len(rising) - 1)
        low, high = rising[right - 1], rising[right]
        return (len(rising) - 1) - (right - 1 + (logsnr - low) / (high - low))


def ddpm(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Table:
    """Ho et al. 2020: linear betas, log-SNR of their cumulative product; ``grid(ddpm(T), T)`` is the table itself."""
    require(steps >= 2, f"steps = {steps}", "steps >= 2")
    require(0 < beta_start <= beta_end < 1, f"betas {beta_start} to {beta_end}", "0 < beta_start <= beta_end < 1")
    log_bar = torch.log1p(-torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)).cumsum(0)
    return Table(log_bar - torch.log(-torch.expm1(log_bar)))


@dataclass(frozen=True)
class Cosine:
    """Nichol & Dhariwal 2021 in its continuous form, log-SNR = -2 ln tan(pi t / 2), cut to [low, high]."""

    low: float
    high: float

    def __call__(self, t: Tensor) -> Tensor:
        first, last = math.atan(math.exp(-self.high / 2)), math.atan(math.exp(-self.low / 2))
        return -2 * torch.log(torch.tan(first + t.double() * (last - first)))


@dataclass(frozen=True)
class Karras:
    """Karras et al. 2022, Eq. 5: sigma^(1/rho) linear in t from ``sigma_min`` (t = 0) to ``sigma_max`` (t = 1)."""

    sigma_min: float
    sigma_max: float
    rho: float

    def __call__(self, t: Tensor) -> Tensor:
        first, last = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return logsnr_of_sigma((first + t.double() * (last - first)) ** self.rho)


@dataclass(frozen=True)
class Uniform:
    """log-SNR uniform on [low, high]."""

    low: float
    high: float

    def __call__(self, t: Tensor) -> Tensor:
        return self.high + t.double() * (self.low - self.high)


@dataclass(frozen=True)
class Logistic:
    """Logistic law around ``loc`` with ``scale``, cut at ``loc +- clip * scale`` (Kong et al. 2023)."""

    loc: float
    scale: float
    clip: float

    def __call__(self, t: Tensor) -> Tensor:
        low, high = 1 / (1 + math.exp(self.clip)), 1 / (1 + math.exp(-self.clip))
        return self.loc - self.scale * torch.logit(low + t.double() * (high - low))


@dataclass(frozen=True)
class Normal:
    """Normal law with mean ``loc`` and std ``scale``, cut at ``loc +- clip * scale``."""

    loc: float
    scale: float
    clip: float

    def __call__(self, t: Tensor) -> Tensor:
        edge = math.erf(self.clip / math.sqrt(2))
        return self.loc - self.scale * math.sqrt(2) * torch.erfinv(edge * (2 * t.double() - 1))


@dataclass(frozen=True)
class VP:
    r"""The VP SDE (Song et al. 2021), :math:`\sigma^2=\exp(\frac12\beta_dt^2+\beta_{min}t)-1`, from ``first`` (t = 0 here) to 1."""

    beta_d: float
    beta_min: float
    first: float

    def __call__(self, t: Tensor) -> Tensor:
        t = self.first + t.double() * (1 - self.first)
        return -torch.expm1(0.5 * self.beta_d * t.square() + self.beta_min * t).log()


@dataclass(frozen=True)
class Plateau:
    r"""Uniform on [low, high] with exponential tails of scale ``tail`` on both sides: a law of the whole line.

    The law of likelihood integrals: their integrands fall like :math:`e^{-|\alpha|}` outside a core, so a tail of scale 2 keeps the
    estimate unbiased whatever the core, with finite variance. ``low`` and ``high`` may be tensors that broadcast with t.
    """

    low: Tensor | float
    high: Tensor | float
    tail: float = 2.0

    def __call__(self, t: Tensor) -> Tensor:
        t = t.double()
        length = self.high - self.low + 2 * self.tail
        position = t * length  # distance in plateau units from the clean end
        upper = self.high - self.tail * torch.log((position / self.tail).clamp(max=1.0))
        lower = self.low + self.tail * torch.log(((length - position) / self.tail).clamp(max=1.0))
        return torch.where(position < self.tail, upper, torch.where(length - position < self.tail, lower, self.high + self.tail - position))


def cosine(low: float = -10.0, high: float = 10.0) -> Cosine:
    """The cosine schedule between two log-SNRs (nats)."""
    return Cosine(*_rising(low, high))


def karras(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Karras:
    """EDM's sampling grid in the noise std ``sigma`` of data with unit scale."""
    require(0 < sigma_min < sigma_max, f"sigmas {sigma_min} to {sigma_max}", "0 < sigma_min < sigma_max")
    require(rho > 0, f"rho = {rho}", "rho > 0")
    return Karras(sigma_min, sigma_max, rho)


def uniform(low: float, high: float) -> Uniform:
    """log-SNR uniform on [low, high], low < high (nats)."""
    return Uniform(*_rising(low, high))


def logistic(loc: float = 0.0, scale: float = 3.0, clip: float = 4.0) -> Logistic:
    """The integration law of ITD: logistic(loc, scale) cut at ``clip`` scales."""
    require(scale > 0 and clip > 0, f"scale {scale}, clip {clip}", "both > 0")
    return Logistic(loc, scale, clip)


def lognormal(mean: float = -1.2, std: float = 1.2, clip: float = 5.0) -> Normal:
    """EDM's training law: ln sigma ~ N(mean, std^2), so log-SNR ~ N(-2 mean, 4 std^2), cut at ``clip`` stds (mass outside: 6e-7)."""
    require(std > 0 and clip > 0, f"std {std}, clip {clip}", "both > 0")
    return Normal(-2 * mean, 2 * std, clip)


def vp(beta_d: float = 19.9, beta_min: float = 0.1, first: float = 1e-5) -> VP:
    """The training law of Song et al.'s VP SDE: uniform time from ``first`` to 1."""
    require(beta_d > 0 and beta_min > 0, f"betas {beta_d} and {beta_min}", "both > 0")
    require(0 < first < 1, f"first = {first}", "0 < first < 1")
    return VP(beta_d, beta_min, first)


def ve(sigma_min: float = 0.02, sigma_max: float = 100.0) -> Uniform:
    """The training law of Song et al.'s VE SDE: ln sigma, so log-SNR, uniform."""
    require(0 < sigma_min < sigma_max, f"sigmas {sigma_min} to {sigma_max}", "0 < sigma_min < sigma_max")
    return uniform(-2 * math.log(sigma_max), -2 * math.log(sigma_min))


def iddpm(steps: int = 1000, offset: float = 0.008) -> Table:
    """Nichol & Dhariwal 2021: cosine cumulative products with betas of at most 0.999, uniform timestep."""
    require(steps >= 2, f"steps = {steps}", "steps >= 2")
    bar = torch.cos(0.5 * math.pi * (torch.arange(steps + 1, dtype=torch.float64) / steps + offset) / (1 + offset)).square()
    log_bar = (bar[1:] / bar[:-1]).clamp(min=0.001).log().cumsum(0)
    return Table(log_bar - torch.log(-torch.expm1(log_bar)))


def _rising(low: float, high: float) -> tuple[float, float]:
    require(math.isfinite(low) and math.isfinite(high) and low < high, f"log-SNR from {low} to {high}", "finite, low < high")
    return low, high


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "ddpm": ddpm,
    "cosine": cosine,
    "iddpm": iddpm,
    "karras": karras,
    "logistic": logistic,
    "lognormal": lognormal,
    "uniform": uniform,
    "ve": ve,
    "vp": vp,
}


def spaced(table: Table, steps: int, spacing: str = "leading", offset: int = 0) -> Tensor:
    r"""The grid of ``steps`` integer timesteps of a ``table`` (T,): increasing log-SNRs (steps + 1,), float64, ending in +inf.

    Args:
        spacing: "leading" t = k floor(T / steps) + ``offset``, which starts below T - 1; "trailing" t = round(k T / steps) - 1, which
            starts at T - 1; "linspace", round of evenly spaced from 0 to T - 1. Every step goes to the true next timestep.
        offset: of "leading" only (Stable Diffusion's configurations have 1).
    """
    choose(spacing, SPACINGS, "spacing")
    total = len(table.logsnrs)
    require(1 <= steps <= total, f"steps = {steps}", f"1 to {total}, the timesteps of the table")
    require(offset >= 0 and (offset == 0 or spacing == "leading"), f"offset {offset} of spacing {spacing}", "an offset >= 0, of leading only")
    timesteps = SPACINGS[spacing](total, steps) + offset
    require(int(timesteps.max()) < total, f"timesteps up to {int(timesteps.max())}", f"timesteps under {total}", "choose a smaller offset")
    return to_clean(table.logsnrs[timesteps])


# Rising timesteps from (T, steps). "linspace" rounds half to even, as numpy and torch do; its single step is the noisiest one.
SPACINGS: dict[str, Callable[[int, int], Tensor]] = {
    "leading": lambda total, steps: torch.arange(steps) * (total // steps),
    "linspace": lambda total, steps: torch.linspace(0 if steps > 1 else total - 1, total - 1, steps, dtype=torch.float64).round().long(),
    "trailing": lambda total, steps: torch.arange(total, 0, -total / steps, dtype=torch.float64)[:steps].round().long().flip(0) - 1,
}


def to_clean(logsnrs: Tensor) -> Tensor:
    """The grid through ``logsnrs`` (T,) of any order, then +inf: (T + 1,), float64."""
    logsnrs = torch.as_tensor(logsnrs, dtype=torch.float64)
    return torch.cat([logsnrs.sort().values, torch.tensor([math.inf], dtype=torch.float64)])


def named_grid(spec: str, steps: int | None = None) -> Tensor:
    """The grid of a name in ``GRIDS`` with options ("karras:rho=5,sigma_max=20"), or of the increasing log-SNRs listed in ``spec`` ("-8,-2,0,4,inf").

    A list that does not end in "inf" gets it; its ``steps`` may be left out, a name's may not.
    """
    if spec[:1].isdigit() or spec[:1] in ("-", "+", "."):
        return _listed(spec, steps)
    require(steps is not None, f"grid {spec!r} without steps", "a number of steps")
    return call_named(spec, GRIDS, "grid", steps=steps)


def _listed(spec: str, steps: int | None) -> Tensor:
    try:
        levels = torch.tensor([float(v) for v in spec.split(",")], dtype=torch.float64)
    except ValueError:
        levels = torch.tensor([math.nan])
    require(not levels.isnan().any(), f"grid {spec!r}", "a grid's name, or log-SNRs separated by commas")
    require(bool((levels.diff() > 0).all()), f"grid {spec!r}", "increasing log-SNRs (noisy to clean)", "sigmas and timesteps fall, log-SNR rises")
    levels = levels if bool(levels[-1].isinf()) else to_clean(levels)
    require(
        steps in (None, len(levels) - 1), f"a grid of {len(levels) - 1} steps", f"{steps} steps", "leave --steps and --evals out, or list as many"
    )
    return levels


# steps -> increasing log-SNRs (steps + 1,), from noise to +inf.
GRIDS: dict[str, Callable[..., Tensor]] = {
    "cosine": lambda steps, low=-10.0, high=10.0: grid(cosine(low, high), steps),
    "ddpm": lambda steps, timesteps=1000: grid(ddpm(timesteps), steps),
    "karras": lambda steps, sigma_min=0.002, sigma_max=80.0, rho=7.0: grid(karras(sigma_min, sigma_max, rho), steps),
    "leading": lambda steps, timesteps=1000, offset=0: spaced(ddpm(timesteps), steps, "leading", offset),
    "linspace": lambda steps, timesteps=1000: spaced(ddpm(timesteps), steps, "linspace"),
    "trailing": lambda steps, timesteps=1000: spaced(ddpm(timesteps), steps, "trailing"),
    "uniform": lambda steps, low=-10.0, high=10.0: grid(uniform(low, high), steps),
}
