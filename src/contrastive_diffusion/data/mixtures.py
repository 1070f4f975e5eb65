r"""The truth: a Gaussian mixture knows its density, optimal denoiser, nll and likelihood ratio at every log-SNR in closed form.

Component k of :math:`p_\alpha` has mean :math:`\sqrt{\sigma(\alpha)}\mu_k` and variance :math:`v_k=\sigma(\alpha)s_k^2+\sigma(-\alpha)`
(Wu et al. 2024, App. A.3, with the square of s that the paper drops), and by Eq. 9
:math:`\hat\epsilon(z,\alpha)=\sqrt{\sigma(-\alpha)}\sum_k r_k(z)\,(z-\sqrt{\sigma(\alpha)}\mu_k)/v_k` with the responsibilities r.
With zero stds it is the ideal denoiser of a finite data set. Everything is computed in float64 whatever the input, by direct differences,
row by row: rows never influence each other, not even in the last bit. Diagonal covariances only.
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from contrastive_diffusion.channel import as_logsnr, noise, signal
from contrastive_diffusion.errors import require

CHUNK = 2**16  # (row, component) pairs worked on at once: half a MiB of float64, which stays in the cache


class GaussianMixture:
    r""":math:`\sum_k w_k N(\mu_k, \mathrm{diag}(s_k^2))` on any shape S, and its optimal denoiser when called as ``mixture(z, logsnr)``.

    Args:
        means: :math:`\mu`, (K, *S).
        stds: :math:`s\ge 0`, a number, (K,) or (K, *S). Zero makes the mixture a finite data set (no density at logsnr = inf).
        weights: w, (K,), positive; normalised here. Uniform by default.
    """

    def __init__(self, means: Tensor, stds: Tensor | float, weights: Tensor | None = None):
        means = torch.as_tensor(means, dtype=torch.float64)
        require(means.dim() >= 2 and means.numel(), f"means of shape {tuple(means.shape)}", "(K, *S), not empty")
        stds = torch.as_tensor(stds, dtype=torch.float64)
        if stds.dim() == 1:
            stds = stds.reshape(-1, *[1] * (means.dim() - 1))
        weights = torch.ones(len(means), dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        require(bool(means.isfinite().all()), "non-finite means", "finite numbers")
        require(bool(((stds >= 0) & stds.isfinite()).all()), "a negative or non-finite std", "stds >= 0")
        require(weights.shape == means.shape[:1] and bool((weights > 0).all()), f"weights {tuple(weights.shape)}", "K positive weights")
        self.shape = means.shape[1:]
        self.means = means.flatten(1)  # (K, D)
        self.stds = stds.expand(means.shape).flatten(1)  # (K, D)
        self.log_weights = (weights / weights.sum()).log()  # (K,)
        self._means_by_axis, self._stds_by_axis = self.means.T.contiguous(), self.stds.T.contiguous()  # (D, K)
        self._differ = bool((self.stds != self.stds[:1]).any())
        smallest = float(self.stds.min())
        self.finest = -2 * math.log(smallest) if smallest > 0 else 20.0

    def to(self, device: torch.device | str) -> "GaussianMixture":
        """The same mixture on another device (its numbers stay float64)."""
        moved = copy.copy(self)
        moved.__dict__ |= {name: value.to(device) for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        return moved

    def mean(self) -> Tensor:
        """E[x], shape S, float64."""
        return (self.log_weights.exp()[:, None] * self.means).sum(0).reshape(self.shape)

    def covariance(self) -> Tensor:
        """Cov[x] of the flattened x, (D, D), float64."""
        w = self.log_weights.exp()[:, None]
        centred = self.means - (w * self.means).sum(0)
        return (w * centred).T @ centred + torch.diag((w * self.stds**2).sum(0))

    def sample(self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` draws (n, *S), n >= 0, on the device of the mixture."""
        require(n >= 0, f"n = {n}", "n >= 0")
        device = generator.device if generator is not None else self.means.device
        chosen = (
            torch.multinomial(self.log_weights.exp().to(device), n, replacement=True, generator=generator) if n else torch.zeros(0, dtype=torch.long)
        )
        chosen = chosen.to(self.means.device)
        eps = torch.randn((n, self.means.shape[1]), generator=generator, dtype=torch.float64, device=device).to(self.means.device)
        return (self.means[chosen] + self.stds[chosen] * eps).reshape(n, *self.shape).to(dtype)

    def log_prob(self, z: Tensor, logsnr: Tensor | float | None = None) -> Tensor:
        r""":math:`\log p_\alpha(z)` in nats, (B,), for z (B, *S) and logsnr a number or (B,); None is the data itself (+inf)."""
        logsnr = math.inf if logsnr is None else logsnr
        require(
            bool((self.stds > 0).all()) or bool((as_logsnr(logsnr, len(z)) < math.inf).all()),
            "a mixture with zero stds at logsnr = inf",
            "a finite logsnr",
            "a finite data set has no density: give logsnr",
        )
        return self._rowwise(z, logsnr, lambda zs, ls: self._log_joint(zs, ls).logsumexp(1))

    def nll(self, x: Tensor) -> Tensor:
        """:math:`-\\log p(x)` in nats, (B,)."""
        return -self.log_prob(x)

    def llr(self, x: Tensor, zeta: Tensor | float) -> Tensor:
        r""":math:`\log p_\zeta(x)-\log p(x)` in nats, (B,); zeta a number or (B,)."""
        return self.log_prob(x, zeta) - self.log_prob(x)

    def __call__(self, z: Tensor, logsnr: Tensor) -> Tensor:
        """The optimal denoiser eps_hat (B, *S) of z (B, *S) at logsnr (B,)."""
        return self._rowwise(z, logsnr, self._eps_hat).reshape(z.shape)

    def _rowwise(self, z: Tensor, logsnr: Tensor | float, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        require(
            z.shape[1:] == self.shape and z.is_floating_point(),
            f"z of shape {tuple(z.shape)}, {z.dtype}",
            f"a floating-point batch (B, {', '.join(map(str, self.shape))})",
        )
        flat, levels = z.double().flatten(1), as_logsnr(logsnr, len(z), z.device)
        if not len(z):
            return function(flat, levels).to(z.dtype)
        rows = max(1, CHUNK // len(self.means))
        return torch.cat([function(zs, ls) for zs, ls in zip(flat.split(rows), levels.split(rows), strict=True)]).to(z.dtype)

    def _axes(self, z: Tensor, logsnr: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each dimension of z (b, D): the distance to every component's mean (b, K), and its variance (b, K) or (b, 1) if they agree."""
        scale, noise_var = signal(logsnr)[:, None], noise(logsnr).square()[:, None]
        for d in range(z.shape[1]):
            stds = self._stds_by_axis[d] if self._differ else self._stds_by_axis[d, :1]
            yield z[:, d : d + 1] - scale * self._means_by_axis[d], scale.square() * stds.square() + noise_var

    def _log_joint(self, z: Tensor, logsnr: Tensor) -> Tensor:
        """log w_k N(z; m_k, v_k), (b, K)."""
        total = self.log_weights - 0.5 * z.shape[1] * math.log(2 * math.pi)
        for distance, variance in self._axes(z, logsnr):
            total = torch.addcdiv(total - 0.5 * variance.log(), distance.square(), variance, value=-0.5)
        return total

    def _eps_hat(self, z: Tensor, logsnr: Tensor) -> Tensor:
        responsibility = self._log_joint(z, logsnr).softmax(1)
        columns = [(responsibility * distance / variance).sum(1) for distance, variance in self._axes(z, logsnr)]
        return noise(logsnr)[:, None] * torch.stack(columns, 1)
