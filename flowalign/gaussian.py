"""A sampling step is a probability distribution.

Every kernel of the toolkit returns a :class:`Gaussian`; sampling, log-probability, KL to a reference, guidance
(a shift of the mean) and importance weights are then written once, here.

    x_s ~ N(mean, std² I),    log p(x) = Σ_d [ -(x_d - mean_d)² / 2 std_d² - log std_d - log √(2π) ]

A coordinate whose std is zero is an *atom*: it contributes 0 to the log-probability where x equals the mean and
-inf elsewhere, so a deterministic step has log-probability 0 and an importance weight of one against itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Gaussian", "per_sample", "sum_dims", "work_dtype"]

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def work_dtype(x: Tensor) -> torch.dtype:
    """Return the precision kernels compute in: ``promote_types(x.dtype, float32)``."""
    return torch.promote_types(x.dtype, torch.float32)


def sum_dims(x: Float[Tensor, "b *d"]) -> Float[Tensor, "b"]:
    """Sum over every dimension but the first."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """Shape a scalar, a ``(B,)`` vector or a map so that it broadcasts against ``like`` of shape ``(B, *)``.

    The result has the device of ``like`` and the precision kernels compute in.
    """
    v = torch.as_tensor(value).to(device=like.device, dtype=work_dtype(like))
    return v.reshape(-1, *[1] * (like.ndim - 1)) if v.ndim == 1 else v


@dataclass(frozen=True)
class Gaussian:
    """``N(mean, std²)`` with independent coordinates.

    Attributes:
        mean: ``(B, *)``.
        std: broadcastable to ``mean``: a scalar per sample, or a map over space. Zero marks an atom.
    """

    mean: Float[Tensor, "b *d"]
    std: Tensor

    def sample(self, noise: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
        """Return ``mean + std * noise``; the noise is explicit so that a step can be replayed."""
        return self.mean + self.std * noise.to(self.mean)

    def noise(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, "b *d"]:
        """Return the standardised residual ``(x - mean) / std``, 0 on atoms."""
        return torch.where(self.std > 0, (x - self.mean) / self._safe_std(), 0.0)

    def log_prob(self, x: Float[Tensor, "b *d"]) -> Float[Tensor, "b"]:
        """Return the log-density of ``x``, summed over dimensions (a true density, not a mean)."""
        std = self._safe_std()
        spread = -0.5 * ((x - self.mean) / std) ** 2 - std.log() - LOG_SQRT_2PI
        atom = torch.where(x == self.mean, 0.0, -math.inf).to(spread)
        return sum_dims(torch.where(self.std > 0, spread, atom))

    def kl(self, other: Gaussian) -> Float[Tensor, "b"]:
        """Return ``KL(self || other)`` in nats per sample; infinite where only one of the two is an atom."""
        p, q = self._safe_std(), other._safe_std()
        gap = self.mean - other.mean
        spread = (q / p).log() + (p**2 + gap**2) / (2 * q**2) - 0.5
        atom = torch.where((gap == 0) & (self.std == other.std), 0.0, math.inf).to(spread)
        return sum_dims(torch.where((self.std > 0) & (other.std > 0), spread, atom))

    def shift(self, delta: Tensor) -> Gaussian:
        """Return the same law with its mean moved by ``delta``, e.g. ``std² ∇V`` for a twisted proposal."""
        return Gaussian(self.mean + delta, self.std)

    def detach(self) -> Gaussian:
        """Return the same law cut from the graph."""
        return Gaussian(self.mean.detach(), self.std.detach())

    def __getitem__(self, index: Tensor) -> Gaussian:
        """Select samples along the batch dimension (a ``std`` shared by the batch stays shared)."""
        own = self.std.ndim == self.mean.ndim and self.std.shape[0] == self.mean.shape[0]
        return Gaussian(self.mean[index], self.std[index] if own else self.std)

    def _safe_std(self) -> Tensor:
        # the value under the mask must be finite, or its gradient is NaN although it is not selected
        return torch.where(self.std > 0, self.std, 1.0)
