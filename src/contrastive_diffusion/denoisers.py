r"""One protocol, and every convention of the field as an adapter at its edge.

A denoiser is any callable ``denoiser(z, logsnr) -> eps_hat``: z (B, *S) on the variance-preserving channel, logsnr (B,) in nats,
rows independent, eps_hat like z. Its ideal is :math:`\hat\epsilon(z,\alpha)=E[\epsilon|z]` (Wu et al. 2024, Eq. 1). Conditioning is
closed over, never passed through. The denoiser of the *noised* data :math:`p_\zeta` is the same network read at another level
(``at_noise``, Eq. 3), so everything that takes a denoiser takes a noised one. What this does not assume: that the denoiser is exact.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from contrastive_diffusion.channel import (
    compose,
    corrupt,
    eps_from_v,
    eps_from_x,
    logsnr_of_sigma,
    per_row,
    sigma_of_logsnr,
    signal,
    v_from_eps,
    x_from_eps,
)  # fmt: skip
from contrastive_diffusion.errors import UsageError, choose, require
from contrastive_diffusion.schedules import Table, ddpm

Prediction = Literal["eps", "x", "v"]
FINEST = 12.4  # log-SNR (nats) beyond which data of unknown detail is taken as resolved: EDM's sigma of 0.002


class Denoiser(Protocol):
    """``denoiser(z, logsnr) -> eps_hat``: z (B, *S), logsnr (B,) nats, eps_hat like z. May carry ``finest``, see ``finest_of``."""

    def __call__(self, z: Tensor, logsnr: Tensor, /) -> Tensor: ...


def finest_of(denoiser: Denoiser) -> float:
    """Log-SNR (nats) at which the data's finest detail is resolved: the denoiser's own ``finest`` if it has one, else ``FINEST``.

    It places the points of likelihood integrals and so decides their variance, never their expectation.
    """
    return float(getattr(denoiser, "finest", FINEST))


def ranged(denoiser: Denoiser, z: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """eps_hat and the share v in [-1, 1] of a learned variance, both like z, from a denoiser that carries ``ranged(z, logsnr)``."""
    found = getattr(denoiser, "ranged", None)
    require(found is not None, "a denoiser without a learned variance", "one that carries ranged(z, logsnr)", "from_timesteps(..., learned=True)")
    assert found is not None
    return found(z, logsnr)


class Like:
    """A function as a denoiser that keeps what samplers and estimates read off the one it was made from. See ``like``."""

    def __init__(
        self,
        denoiser: Denoiser,
        function: Callable[[Tensor, Tensor], Tensor],
        rows: Callable[[Tensor], Denoiser],
        change: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    ):
        self.denoiser, self.function, self.rows, self.change = denoiser, function, rows, change
        self.finest, self.levels = finest_of(denoiser), getattr(denoiser, "levels", None)

    def __call__(self, z: Tensor, logsnr: Tensor) -> Tensor:
        return self.function(z, logsnr)

    def take(self, index: Tensor) -> Denoiser:
        return self.rows(index)

    def ranged(self, z: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        eps_hat, v = ranged(self.denoiser, z, logsnr)
        return (self.function(z, logsnr) if self.change is None else self.change(z, logsnr, eps_hat)), v


def like(
    denoiser: Denoiser,
    function: Callable[[Tensor, Tensor], Tensor],
    rows: Callable[[Tensor], Denoiser],
    change: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Like:
    """``function`` as a denoiser with the ``finest``, ``levels`` and learned variance of ``denoiser``.

    ``rows(index)`` is the same for some of the rows it is bound to (see ``take``); ``change(z, logsnr, eps_hat)`` the function's value where
    the denoiser's is known already, which saves an evaluation.
    """
    return Like(denoiser, function, rows, change)


def evaluate(denoiser: Denoiser, z: Tensor, logsnr: Tensor, max_rows: int = 16384) -> Tensor:
    """``denoiser(z, logsnr)`` in calls of at most ``max_rows`` rows (4k to 16k is fastest on a CPU), with the contract checked."""
    logsnr = logsnr.to(z.dtype)
    if len(z) <= max_rows:
        eps_hat = denoiser(z, logsnr)
        if eps_hat.shape != z.shape:
            raise UsageError(f"given a denoiser that returns {tuple(eps_hat.shape)}, expected the shape of z, {tuple(z.shape)}")
        return eps_hat
    rows = torch.arange(len(z), device=z.device)
    parts = zip(z.split(max_rows), logsnr.split(max_rows), rows.split(max_rows), strict=True)
    return torch.cat([evaluate(take(denoiser, index), zs, ls, max_rows) for zs, ls, index in parts])


@torch.no_grad()
def check_denoiser(denoiser: Denoiser, x: Tensor, generator: torch.Generator | None = None, tolerance: float = 1e-3) -> None:
    """Stops with one line at a denoiser that breaks the contract on noised rows of x (B, *S): shape, dtype, finite, rows independent.

    A few evaluations of each row at three levels. Rows are compared with themselves beside other rows, up to ``tolerance`` of their size
    (networks are not batch-invariant to the bit).
    """
    x = check_data(x)[:64]
    for level in (-4.0, 2.0, 8.0):
        logsnr = torch.full((len(x),), level, dtype=x.dtype, device=x.device)
        z = noised(x, logsnr, generator)
        eps_hat = evaluate(denoiser, z, logsnr)
        require(eps_hat.dtype == z.dtype, f"a denoiser that returns {eps_hat.dtype}", f"the dtype of z, {z.dtype}")
        bad = int((~eps_hat.isfinite().flatten(1).all(1)).sum())
        require(not bad, f"a denoiser that returns non-finite numbers in {bad} of {len(x)} rows at log-SNR {level:g}", "finite numbers")
        half = len(x) // 2
        if half:
            others = torch.cat([z[:half], 3 * z[half:].flip(0) + 1])
            moved = (evaluate(denoiser, others, logsnr)[:half] - eps_hat[:half]).abs().max()
            independent = float(moved) <= tolerance * float(eps_hat[:half].abs().max().clamp_min(1.0))
            todo = "put the network in eval mode; no statistics over the batch"
            require(
                independent, f"a denoiser whose rows change by {float(moved):.2g} when other rows do (log-SNR {level:g})", "independent rows", todo
            )


def take(denoiser: Denoiser, index: Tensor) -> Denoiser:
    """The denoiser for rows ``index`` (n,) of the B rows it is bound to, as one with a label for each row is; itself if it treats all rows alike."""
    return denoiser.take(index) if hasattr(denoiser, "take") else denoiser  # pyright: ignore


def binds_rows(denoiser: Denoiser) -> bool:
    """Whether rows are treated differently by their place in the batch, so that each needs ``take`` to be read elsewhere."""
    return hasattr(denoiser, "take") and take(denoiser, torch.zeros(1, dtype=torch.long)) is not getattr(denoiser, "_orig_mod", denoiser)


def at_noise(denoiser: Denoiser, zeta: Tensor | float) -> Denoiser:
    r"""The denoiser of :math:`p_\zeta`: :math:`(z,\alpha)\mapsto b\,\hat\epsilon(z,\beta)` (Eq. 3, 5). ``zeta`` a number or (B,), nats.

    Composes: ``at_noise(at_noise(d, z1), z2)`` is ``at_noise(d, compose(z1, z2)[0])``.
    """

    def noised(z: Tensor, logsnr: Tensor) -> Tensor:
        beta, b = compose(logsnr, torch.as_tensor(zeta, device=z.device).to(logsnr.dtype))
        return per_row(b, z) * denoiser(z, beta)

    return noised


class Bounded(torch.nn.Module):
    r"""A denoiser trusted on [low, high] only, continued to every log-SNR.

    Above ``high`` the score is held: the law is taken to have no detail finer than ``high`` shows, so
    :math:`\hat\epsilon` falls to zero in proportion to :math:`e^{-\alpha/2}` and likelihood integrals converge. Below ``low``
    :math:`\hat x` is held. Inside nothing changes. Plain clamping of the level does neither, and its integrals diverge.
    """

    def __init__(self, denoiser: Denoiser, low: float, high: float):
        super().__init__()
        require(math.isfinite(low) and math.isfinite(high) and low < high, f"a range from {low} to {high}", "finite, low < high")
        self.denoiser, self.low, self.high = denoiser, low, high
        self.finest = high

    def take(self, index: Tensor) -> "Bounded":
        inner = take(self.denoiser, index)
        return self if inner is self.denoiser else Bounded(inner, self.low, self.high)

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        inside = logsnr.clamp(self.low, self.high)
        scale = per_row(signal(inside) / signal(logsnr), z)  # to z at the clamped level, the clean coordinate y = z / signal held
        held = self.denoiser(torch.where(per_row(logsnr > self.high, z) > 0, z * scale, z), inside)
        above = held * per_row(sigma_of_logsnr(logsnr) / sigma_of_logsnr(inside), z)
        below = eps_from_x(z, logsnr, x_from_eps(z, inside, held))
        level = per_row(logsnr, z)
        return torch.where(level > self.high, above, torch.where(level < self.low, below, held))


class FromEDM(torch.nn.Module):
    """The denoiser of an EDM network; see ``from_edm``."""

    def __init__(self, net: Callable[..., Tensor], class_labels: Tensor | None = None, augment_labels: Tensor | None = None):
        super().__init__()
        self.net, self.class_labels, self.augment_labels = net, class_labels, augment_labels
        sigma_min = float(getattr(net, "sigma_min", 0.0) or 0.0)
        self.finest = float(logsnr_of_sigma(sigma_min)) if sigma_min > 0 else FINEST

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        sigma = sigma_of_logsnr(logsnr)
        y = z / per_row(signal(logsnr), z)
        labels = [None if v is None else v.to(z.device).expand(len(z), -1) for v in (self.class_labels, self.augment_labels)]
        while labels and labels[-1] is None:  # a network without labels need not take any
            labels.pop()
        return (y - self.net(y, sigma, *labels).to(z.dtype)) / per_row(sigma, z)

    def take(self, index: Tensor) -> "FromEDM":
        if all(v is None or len(v) == 1 for v in (self.class_labels, self.augment_labels)):
            return self
        class_labels, augment_labels = (v if v is None or len(v) == 1 else v[index.to(v.device)] for v in (self.class_labels, self.augment_labels))
        return FromEDM(self.net, class_labels, augment_labels)


def from_edm(net: Callable[..., Tensor], class_labels: Tensor | None = None, augment_labels: Tensor | None = None) -> FromEDM:
    """The denoiser of an EDM network ``net(y, sigma[, class_labels[, augment_labels]]) -> D`` (Karras et al. 2022): y = x + sigma eps (B, *S), sigma (B,).

    Labels are closed over: (1, L) for all rows alike, or (B, L), row i's for row i. ``finest`` follows the network's ``sigma_min`` where it has one.
    """
    return FromEDM(net, class_labels, augment_labels)


def to_edm(denoiser: Denoiser) -> Callable[[Tensor, Tensor], Tensor]:
    """The inverse of ``from_edm``: ``D(y, sigma)`` from a denoiser, for k-diffusion and EDM samplers."""

    def net(y: Tensor, sigma: Tensor) -> Tensor:
        logsnr = logsnr_of_sigma(sigma)
        return y - per_row(sigma, y) * denoiser(y * per_row(signal(logsnr), y), logsnr)

    return net


class FromTimesteps(torch.nn.Module):
    """The denoiser of a network indexed by timestep; see ``from_timesteps``."""

    def __init__(self, net: Callable[..., Any], table: Table, predicts: Prediction, rounded: bool, learned: bool):
        super().__init__()
        self.net, self.table, self.predicts, self.rounded, self.learned = net, table, predicts, rounded, learned
        self.levels = table.logsnrs if rounded else None
        self.low, self.high = float(table.logsnrs[-1]), float(table.logsnrs[0])
        self.finest = self.high
        self._warned = False

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        return TO_EPS[self.predicts](z, logsnr, self._output(z, logsnr)[:, : z.shape[1]])

    def ranged(self, z: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """eps_hat and the share v of the learned variance, of a network with ``learned``."""
        require(self.learned, "a timestep network without a learned variance", "one that returns it", "from_timesteps(..., learned=True)")
        out, v = self._output(z, logsnr).split(z.shape[1], 1)
        return TO_EPS[self.predicts](z, logsnr, out), v

    def _output(self, z: Tensor, logsnr: Tensor) -> Tensor:
        self._warn(logsnr)
        t = self.table.inverse(logsnr)
        t = t.round().long() if self.rounded else t.to(z.dtype)
        out = self.net(z, t)
        out = getattr(out, "sample", out)
        wanted = (len(z), z.shape[1] * (1 + self.learned), *z.shape[2:])
        require(
            out.shape == wanted,
            f"a timestep network that returns {tuple(out.shape)}",
            f"{wanted}",
            "learned=True is for networks of twice the channels",
        )
        return out

    def _warn(self, logsnr: Tensor) -> None:
        slack = 1e-4  # float32 rounding of the table's own ends
        if not self._warned and bool(((logsnr < self.low - slack) | (logsnr > self.high + slack)).any()):
            self._warned = True
            warnings.warn(
                f"log-SNR from {float(logsnr.min()):.2f} to {float(logsnr.max()):.2f} reaches outside the timestep table's "
                f"[{self.low:.2f}, {self.high:.2f}]; the timestep is clamped there (wrap in Bounded to continue the score instead)",
                stacklevel=3,
            )


def from_timesteps(
    net: Callable[..., Any], table: Table | Tensor, predicts: Prediction = "eps", rounded: bool = False, learned: bool = False
) -> FromTimesteps:
    """The denoiser of ``net(z, t) -> eps | x | v`` (B, *S) trained on integer timesteps t = 0 .. T-1 of a log-SNR ``table`` (T,).

    Timesteps are interpolated in log-SNR, exact at the integers; ``rounded=True`` gives the nearest integer (int64). Levels outside the
    table are clamped, with one warning. A diffusers output object is unwrapped (``.sample``). ``learned``: the network returns twice the
    channels, the second half the share v of a learned variance (iDDPM, ADM), which ``solvers.ddpm("learned")`` reads.
    """
    choose(predicts, TO_EPS, "prediction")
    return FromTimesteps(net, table if isinstance(table, Table) else Table(torch.as_tensor(table)), predicts, rounded, learned)


def of_network(net: Callable[..., Any], class_labels: Tensor | None = None, augment_labels: Tensor | None = None) -> Denoiser:
    """The denoiser of a network of this package by its ``convention``: "edm", "timesteps" (DDPM's thousand), or log-SNR where it names none."""
    convention = getattr(net, "convention", "logsnr")
    if convention == "edm":
        return from_edm(net, class_labels, augment_labels)
    require(class_labels is None and augment_labels is None, f"labels for a network of convention {convention!r}", "none", "use ddpm++ or ncsn++")
    return from_timesteps(net, ddpm()) if convention == "timesteps" else net


def to_timesteps(denoiser: Denoiser, table: Table, predicts: Prediction = "eps") -> Callable[[Tensor, Tensor], Tensor]:
    """The inverse of ``from_timesteps``: ``net(z, t) -> eps | x | v`` for (fractional) timesteps of ``table``."""
    choose(predicts, FROM_EPS, "prediction")

    def net(z: Tensor, t: Tensor) -> Tensor:
        logsnr = table(t.double() / (len(table.logsnrs) - 1)).to(z.dtype)
        return FROM_EPS[predicts](z, logsnr, denoiser(z, logsnr))

    return net


class Counted:
    """Counts what a denoiser is asked: ``rows`` evaluations in ``calls`` calls."""

    def __init__(self, denoiser: Denoiser, whole: "Counted | None" = None):
        self.denoiser, self.rows, self.calls, self.whole = denoiser, 0, 0, whole
        self.finest = finest_of(denoiser)

    def __call__(self, z: Tensor, logsnr: Tensor) -> Tensor:
        self.count(len(z))
        return self.denoiser(z, logsnr)

    def ranged(self, z: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        self.count(len(z))
        return ranged(self.denoiser, z, logsnr)

    def take(self, index: Tensor) -> "Counted":
        """The same for some rows; what it counts, this counts too."""
        return Counted(take(self.denoiser, index), self)

    def count(self, rows: int) -> None:
        self.rows, self.calls = self.rows + rows, self.calls + 1
        if self.whole is not None:
            self.whole.count(rows)


def unit_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Unit Gaussian noise in the dtype and on the device of ``like``, drawn on the device of the generator."""
    device = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def noised(x: Tensor, logsnr: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
    """A draw of the channel at ``logsnr`` from x (B, *S), with fresh noise of ``generator`` (on the generator's device)."""
    return corrupt(x, logsnr, unit_noise(x.shape, x, generator))


def check_data(x: Tensor, what: str = "x") -> Tensor:
    """x (B, *S) if it is a non-empty, finite, floating-point batch; otherwise one line that says what it is."""
    require(isinstance(x, Tensor), f"{what} of type {type(x).__name__}", "a torch tensor (B, *S)", "torch.as_tensor(x)")
    require(x.is_floating_point(), f"{what} of dtype {x.dtype}", "a floating-point tensor", "x.float()")
    require(x.dim() >= 2, f"{what} of shape {tuple(x.shape)}", "a batch (B, *S)", "x[None] for one item, x[:, None] for scalars")
    require(x.numel() > 0, f"{what} of shape {tuple(x.shape)}", "at least one row")
    require(bool(x.isfinite().all()), f"{what} with {int((~x.isfinite()).sum())} non-finite values", "finite values", "clean the data")
    return x


TO_EPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"eps": lambda z, _, out: out, "x": eps_from_x, "v": eps_from_v}
FROM_EPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"eps": lambda z, _, out: out, "x": x_from_eps, "v": v_from_eps}
