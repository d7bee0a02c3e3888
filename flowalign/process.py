"""Noising processes ``x_t = α_t x0 + σ_t ε`` on data time 0 ≤ t ≤ noise time 1, and what is known at ``x_t``.

A process knows its coefficients and their rates; a :class:`Posterior` holds ``E[x0 | x_t]`` and ``E[ε | x_t]``
however the network is parametrised:

    x0-prediction       ε = (x - α x0) / σ
    ε-prediction        x0 = (x - σ ε) / α
    velocity            v = α̇ x0 + σ̇ ε            (rectified flow: v = ε - x0, the diffusers sign)
    v-prediction        v = α ε - σ x0              (variance preserving; Salimans & Ho 2022, App. D)
    score               ∇ log p_t(x) = -E[ε | x_t] / σ_t
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.gaussian import per_sample, work_dtype

__all__ = ["Karras", "Posterior", "Process", "Rectified", "Rescaled", "Time", "VariancePreserving"]

Time = float | Tensor  # one time for the batch, or (B,) times


def as_time(t: Time) -> Tensor:
    """Return ``t`` as a float64 tensor of shape ``()`` or ``(B,)``."""
    return torch.as_tensor(t, dtype=torch.float64)


class Process(ABC):
    """A linear noising process. Coefficients are float64 tensors of the shape of ``t``."""

    @abstractmethod
    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return ``(α_t, σ_t)``."""

    @abstractmethod
    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return the time derivatives ``(α̇_t, σ̇_t)``."""

    def wronskian(self, t: Time) -> Tensor:
        """Return ``σ̇ α - σ α̇``, the determinant of the map ``(x0, ε) → (x, v)``. Rectified flow: 1."""
        (a, s), (da, ds) = self(t), self.rates(t)
        return ds * a - s * da

    def posterior(
        self,
        x: Float[Tensor, "b *d"],
        t: Time,
        *,
        x0: Tensor | None = None,
        eps: Tensor | None = None,
        v: Tensor | None = None,
        v_prediction: Tensor | None = None,
    ) -> Posterior:
        """Complete one prediction to a :class:`Posterior`.

        Args:
            x: states ``(B, *)``.
            t: one time or ``(B,)`` times.
            x0: ``E[x0|x]``.
            eps: ``E[ε|x]``.
            v: velocity ``dx/dt`` of the probability flow.
            v_prediction: ``α ε - σ x0``.

        Raises:
            ValueError: unless exactly one prediction is given.
        """
        given = [
            name for name, p in (("x0", x0), ("eps", eps), ("v", v), ("v_prediction", v_prediction)) if p is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"posterior() takes exactly one of x0, eps, v, v_prediction; it was given {given or 'none'}."
            )
        x = x.to(work_dtype(x))
        a, s = (per_sample(c, x) for c in self(t))
        exact = None
        if x0 is not None:
            x0 = x0.to(x)
            eps = (x - a * x0) / s
        elif eps is not None:
            eps = eps.to(x)
            x0 = (x - s * eps) / a
        elif v is not None:
            da, ds = (per_sample(c, x) for c in self.rates(t))
            w, exact = ds * a - s * da, v.to(x)
            x0, eps = (ds * x - s * exact) / w, (a * exact - da * x) / w
        else:
            assert v_prediction is not None
            u = v_prediction.to(x)
            n = a**2 + s**2
            x0, eps = (a * x - s * u) / n, (s * x + a * u) / n
        return Posterior(x0, eps, self, t, exact)

    def forward(self, x_s: Float[Tensor, "b *d"], s: Time, t: Time, noise: Tensor) -> Float[Tensor, "b *d"]:
        """Re-noise from ``s`` to ``t ≥ s``: sample ``p(x_t | x_s)`` with the given noise."""
        x_s = x_s.to(work_dtype(x_s))
        (a_s, sig_s), (a_t, sig_t) = self(s), self(t)
        scale = a_t / a_s
        std = (sig_t**2 - (scale * sig_s) ** 2).clamp_min(0).sqrt()
        return per_sample(scale, x_s) * x_s + per_sample(std, x_s) * noise.to(x_s)

    def diffuse(self, x0: Float[Tensor, "b *d"], t: Time, noise: Tensor) -> Float[Tensor, "b *d"]:
        """Return ``α_t x0 + σ_t noise``: the forward process from clean data."""
        x0 = x0.to(work_dtype(x0))
        a, s = self(t)
        return per_sample(a, x0) * x0 + per_sample(s, x0) * noise.to(x0)


@dataclass(frozen=True)
class Posterior:
    """What the network says at ``x_t``, of a process at time ``t``.

    Attributes:
        x0: ``E[x0 | x_t]``, ``(B, *)``.
        eps: ``E[ε | x_t]``, ``(B, *)``.
        process: the noising process.
        t: one time or ``(B,)`` times.
        v: the velocity as the network gave it, where it predicts one: no round-off through ``x0`` and ``ε``.
        output: the raw network output, kept where a diffusers scheduler is to take the step itself.
    """

    x0: Float[Tensor, "b *d"]
    eps: Float[Tensor, "b *d"]
    process: Process
    t: Time
    v: Tensor | None = None
    output: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """``∇ log p_t(x) = -E[ε|x] / σ_t``."""
        return -self.eps / per_sample(self.process(self.t)[1], self.eps)

    @property
    def velocity(self) -> Tensor:
        """``v = α̇ E[x0|x] + σ̇ E[ε|x]``, the probability-flow ODE's right-hand side in t."""
        if self.v is not None:
            return self.v
        da, ds = self.process.rates(self.t)
        return per_sample(da, self.x0) * self.x0 + per_sample(ds, self.eps) * self.eps

    def guided(self, gradient: Tensor) -> Posterior:
        """Add ``gradient`` to the score (Flow-NRG, classifier guidance): ``x0 += σ²/α g``, ``ε -= σ g``.

        ``x_t`` stays what it was, since ``α σ²/α g - σ σ g = 0``. Where α = 0 the state knows nothing of the data,
        every value is flat, and the posterior is returned as it is.
        """
        a, s = (per_sample(c, self.x0) for c in self.process(self.t))
        gradient = torch.where(a > 0, gradient, 0.0)
        gain = s**2 / torch.where(a > 0, a, 1.0)
        return Posterior(self.x0 + gain * gradient, self.eps - s * gradient, self.process, self.t)

    def detach(self) -> Posterior:
        """Return the same posterior cut from the graph."""
        return self._map(Tensor.detach)

    def __getitem__(self, index: Tensor) -> Posterior:
        """Select samples along the batch dimension."""
        return self._map(lambda x: x[index.to(x.device)])

    def _map(self, f: Callable[[Tensor], Tensor]) -> Posterior:
        t = f(self.t) if isinstance(self.t, Tensor) and self.t.ndim else self.t
        v, output = (None if z is None else f(z) for z in (self.v, self.output))
        return Posterior(f(self.x0), f(self.eps), self.process, t, v, output)


@dataclass(frozen=True)
class Rectified(Process):
    """Rectified flow: ``α = 1 - t, σ = t`` (Liu et al. 2209.03003; SD3, Flux, Wan, ...)."""

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return ``(1 - t, t)``."""
        t = as_time(t)
        return 1 - t, t

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return ``(-1, 1)``."""
        t = as_time(t)
        return -torch.ones_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class VariancePreserving(Process):
    """``α = cos θ(t), σ = sin θ(t)`` through the angles of a scheduler's ``alphas_cumprod``.

    Training step i of N sits at ``t = (i + 1) / N`` and data time 0 at the scheduler's own final alpha (Stable
    Diffusion 1.5: ᾱ = .99915, not 1). Between them the angle is linear in t, so that a zero terminal SNR is an
    ordinary point and the rates exist everywhere. Make one with :meth:`from_alphas_cumprod`.

    Attributes:
        angles: ``(N + 1,)`` increasing, in [0, π/2].
    """

    angles: tuple[float, ...]

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor, final: float | None = None) -> VariancePreserving:
        """Build from a scheduler's ``alphas_cumprod`` ``(N,)`` and its final ᾱ (1 when None).

        Raises:
            ValueError: if the alphas are not in [0, 1] and non-increasing.
        """
        last = torch.tensor([1.0 if final is None else float(final)], dtype=torch.float64)
        ab = torch.cat([last, alphas_cumprod.detach().double().cpu()])
        if ab.ndim != 1 or len(ab) < 2 or ab.min() < 0 or ab.max() > 1 or (ab.diff() > 0).any():
            raise ValueError(
                f"alphas_cumprod must fall from at most 1 to at least 0; got {len(ab) - 1} values from "
                f"{float(ab[0]):.4g} (final) to {float(ab[-1]):.4g}. Pass scheduler.alphas_cumprod unchanged."
            )
        return cls(tuple(torch.atan2((1 - ab).sqrt(), ab.sqrt()).tolist()))

    def _segment(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return the angle at t and its slope."""
        t = as_time(t)
        knots = torch.tensor(self.angles, dtype=torch.float64, device=t.device)
        n = len(knots) - 1
        # round-off in i/N must not pick the wrong segment at a knot
        u = (t * n).clamp(0, n)
        near = u.round()
        u = torch.where((u - near).abs() < 1e-6, near, u)
        i = (u.ceil() - 1).clamp_min(0).long()
        slope = knots[i + 1] - knots[i]
        return torch.where(u == near, knots[near.long()], knots[i] + (u - i) * slope), slope * n

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return ``(cos θ, sin θ)``."""
        theta, _ = self._segment(t)
        return theta.cos().where(theta < math.pi / 2, 0.0), theta.sin()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return ``θ̇ (-sin θ, cos θ)``."""
        theta, slope = self._segment(t)
        return -slope * theta.sin(), slope * theta.cos()


@dataclass(frozen=True)
class Karras(Process):
    """Variance exploding: ``α = 1, σ = σ_max t^ρ`` (Karras et al. 2206.00364, eq. 5 with σ_min = 0).

    Attributes:
        sigma_max: noise level at t = 1.
        rho: curvature of the grid; 7 in EDM.
    """

    sigma_max: float = 80.0
    rho: float = 7.0

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return ``(1, σ_max t^ρ)``."""
        t = as_time(t)
        return torch.ones_like(t), self.sigma_max * t**self.rho

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return ``(0, ρ σ_max t^(ρ-1))``."""
        t = as_time(t)
        return torch.zeros_like(t), self.rho * self.sigma_max * t ** (self.rho - 1)

    def time(self, sigma: Time) -> Tensor:
        """Return the time at which the noise level is ``sigma``."""
        return (as_time(sigma) / self.sigma_max) ** (1 / self.rho)


@dataclass(frozen=True)
class Rescaled(Process):
    """``x / α_t`` of another process: the k-diffusion scaling in which diffusers' Euler schedulers hold SD latents."""

    inner: Process

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return ``(1, σ / α)`` of the inner process."""
        a, s = self.inner(t)
        return torch.ones_like(a), s / a

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return ``(0, W / α²)``."""
        a, _ = self.inner(t)
        return torch.zeros_like(a), self.inner.wronskian(t) / a**2
