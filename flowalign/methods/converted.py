"""The same network on another path: a flow sampled as a variance-preserving diffusion (Kim et al. 2503.19385).

    x̄ = (σ̄/σ) x  at the time t of equal signal-to-noise ratio,  E[x0 | ·] and E[ε | ·] the same

:class:`Converted` is a denoiser of the new process, so that kernels, rollouts and ledgers see nothing special.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.gaussian import per_sample
from flowalign.laws import NoiseLaw
from flowalign.process import Posterior, Process, Time, VariancePreserving, as_time

__all__ = ["Converted", "Power", "same_snr", "vp_path"]


@dataclass(frozen=True)
class Power(NoiseLaw):
    """``g = a t^p``; published: 3 t²."""

    a: float = 3.0
    p: float = 2.0

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return ``a t^p``."""
        return self.a * as_time(t) ** self.p


def vp_path(low: float = 0.1, high: float = 20.0, n: int = 1000) -> VariancePreserving:
    """Return the variance-preserving process with ``β`` rising from ``low`` to ``high`` (Song et al. 2011.13456)."""
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    return VariancePreserving.from_alphas_cumprod(torch.exp(-low * t - (high - low) * t**2 / 2))


def same_snr(process: Process, alpha: Tensor, sigma: Tensor, steps: int = 60) -> Tensor:
    """Return the times at which a process has the ratio ``alpha / sigma``, by bisection: it falls with time."""
    low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
    for _ in range(steps):
        middle = (low + high) / 2
        a, s = process(middle)
        early = a * sigma > alpha * s  # less noise than wanted
        low, high = torch.where(early, middle, low), torch.where(early, high, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Converted:
    """A denoiser seen on the path of another process.

    Attributes:
        inner: the denoiser as it was trained.
        process: the path to be on.
    """

    inner: Any
    process: Process

    def there(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return the inner time of equal signal-to-noise ratio, and ``σ_inner / σ``."""
        alpha, sigma = self.process(t)
        time = same_snr(self.inner.process, alpha, sigma)
        return time, self.inner.process(time)[1] / sigma

    def posterior(self, x: Tensor, t: Time, cond: Any) -> Posterior:
        """Return ``E[x0|x], E[ε|x]``: the inner ones at the rescaled state."""
        time, scale = self.there(t)
        known = self.inner.posterior(per_sample(scale, x) * x, float(time) if time.ndim == 0 else time, cond)
        return Posterior(known.x0, known.eps, self.process, t)
