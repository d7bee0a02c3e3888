"""Kernels: from ``(x_t, E[x0|x_t], t, s)`` to the law of the next state ``x_s``, a :class:`Gaussian`.

Two of them hold every published one-step sampler.

    EulerMaruyama(g)    x_s ~ N( x + [v + g²/2 · E[ε|x]/σ_t] (s - t),  g² (t - s) )
                        g = 0: the ODE; a√(σ/α): Flow-GRPO; constant: DanceGRPO; √(2 σ W/α): memoryless
    Ancestral(std)      x_s ~ N( α_s x̂0 + √(σ_s² - std²) ε̂,  std² )
                        DDIM(η), DDPM (η = 1), CPS (σ_s sin(ηπ/2)), consistency (std = σ_s)

The drift of the first is coupled to its noise so that the marginals of the process are kept for any g (Song et al.
2011.13456, eq. 13); its local error is of second order in the step. The second is exact where the posterior of x0 is a
point. Flow-GRPO's ``sde_step_with_logprob``, DanceGRPO's ``flux_step``, Flow-CPS and DDIM are reproduced to round-off.

A kernel may need memory of the steps before (multistep solvers): ``carry``, tensors ``(B, ...)`` or None.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowalign.gaussian import Gaussian, per_sample, work_dtype
from flowalign.laws import NoiseLaw, Ode
from flowalign.process import Posterior, Time

ODE = Ode()

__all__ = ["Ancestral", "EulerMaruyama", "Kernel", "SecondOrder", "Windowed"]

Carry = Any


class Kernel(ABC):
    """The law of one step. ``order`` is the weak order of the ODE part; ``keeps_marginals`` is tested."""

    keeps_marginals: ClassVar[bool] = True

    @abstractmethod
    def __call__(
        self, x: Tensor, posterior: Posterior, t: Time, s: Time, carry: Carry = None
    ) -> tuple[Gaussian, Carry]:
        """Return the law of ``x_s`` given ``x_t = x`` and the memory to hand to the next step.

        Args:
            x: states ``(B, *)`` at time ``t``.
            posterior: what the network says at ``(x, t)``.
            t: one time or ``(B,)`` times.
            s: where to go, ``s < t``, of the shape of ``t``.
            carry: what the step before returned.
        """

    @abstractmethod
    def stochastic(self, t: float, s: float) -> bool:
        """Return whether the step from t to s draws noise: only such a step has a density to train on."""


@dataclass(frozen=True)
class EulerMaruyama(Kernel):
    """Euler-Maruyama step of the reverse SDE with diffusion ``g = law(process, t, s)``."""

    law: NoiseLaw = ODE

    def __call__(
        self, x: Tensor, posterior: Posterior, t: Time, s: Time, carry: Carry = None
    ) -> tuple[Gaussian, Carry]:
        """Return ``N(x + [v + g²/2 ε̂/σ_t](s - t), g²(t - s))``."""
        x = x.to(work_dtype(x))
        dt = torch.as_tensor(s, dtype=torch.float64) - torch.as_tensor(t, dtype=torch.float64)
        if isinstance(self.law, Ode):
            return Gaussian(x + per_sample(dt, x) * posterior.velocity, x.new_zeros(())), None
        g = torch.as_tensor(self.law(posterior.process, t, s), dtype=torch.float64)
        sigma = posterior.process(t)[1]
        push = per_sample(g**2 / 2, x) / per_sample(sigma, x) if g.ndim > 1 else per_sample(g**2 / 2 / sigma, x)
        std = per_sample(g, x) * per_sample((-dt).sqrt(), x) if g.ndim > 1 else per_sample(g * (-dt).sqrt(), x)
        return Gaussian(x + (posterior.velocity + push * posterior.eps) * per_sample(dt, x), std), None

    def stochastic(self, t: float, s: float) -> bool:
        """Return the law's own answer: one of level 0 is the ODE by another name."""
        return self.law.stochastic(t, s)


EULER = EulerMaruyama()


@dataclass(frozen=True)
class Ancestral(Kernel):
    """``x_s = α_s x̂0 + √(σ_s² - std²) ε̂ + std z`` with ``std = law(process, t, s)``.

    With ``Cps`` the terminal spread does not converge to the data's: the fresh noise replaces part of ε̂, which already
    is a shrunken E[ε|x], so variance is lost at every step, however small (N(.7, .5²) ends at std .40 with η = .8).
    DDIM with η ≤ 1 has vanishing noise per step and converges.
    """

    law: NoiseLaw

    @property
    def keeps_marginals(self) -> bool:  # type: ignore[override]
        """Whether the marginals converge to the process's as the steps shrink."""
        return self.law.keeps_marginals

    def __call__(
        self, x: Tensor, posterior: Posterior, t: Time, s: Time, carry: Carry = None
    ) -> tuple[Gaussian, Carry]:
        """Return ``N(α_s x̂0 + √(σ_s² - std²) ε̂, std²)``."""
        a, sigma = posterior.process(s)
        std = torch.as_tensor(self.law(posterior.process, t, s), dtype=torch.float64)
        like = posterior.x0
        if std.ndim > 1:  # a map over space
            std = per_sample(std, like)
            rest = (per_sample(sigma**2, like) - std**2).clamp_min(0).sqrt()
            return Gaussian(per_sample(a, like) * like + rest * posterior.eps, std), None
        rest = per_sample((sigma**2 - std**2).clamp_min(0).sqrt(), like)
        return Gaussian(per_sample(a, like) * like + rest * posterior.eps, per_sample(std, like)), None

    def stochastic(self, t: float, s: float) -> bool:
        """Return whether the law leaves noise at this step (needs the law's own answer: DDIM with η = 0 does not)."""
        return self.law.stochastic(t, s)


@dataclass(frozen=True)
class SecondOrder(Kernel):
    """DPM-Solver++(2M), deterministic, one network call a step (Lu et al. 2211.01095, Alg. 2).

    With λ = log(α/σ), h = λ_s - λ_t, r = h_last / h and the two newest x̂0 predictions,

        D = (1 + 1/2r) x̂0_t - 1/2r x̂0_before,    x_s = σ_s/σ_t x - α_s (e^{-h} - 1) D

    The first step, and the last one into σ = 0, are of first order, as in diffusers. ``carry`` holds ``(x̂0, λ)``.
    """

    def __call__(
        self, x: Tensor, posterior: Posterior, t: Time, s: Time, carry: Carry = None
    ) -> tuple[Gaussian, Carry]:
        """Return a Dirac at the second-order mean."""
        x = x.to(work_dtype(x))
        (a_t, s_t), (a_s, s_s) = posterior.process(t), posterior.process(s)
        lam_t, lam_s = (a_t / s_t).log(), (a_s / s_s).log()
        d = posterior.x0
        if carry is not None:
            before, lam_before = carry
            lam_before = lam_before.to(lam_t).reshape(-1)
            w = (0.5 * (lam_s - lam_t) / (lam_t - lam_before)).expand(len(x))
            # into σ = 0 the log-SNR jumps to infinity, from σ_max it came from -infinity: first order there
            # NaN marks a node that entered just now and has no step before
            w = per_sample(torch.where(torch.isfinite(w), w, 0.0), x)
            d = d + w * torch.where(w != 0, d - before, 0.0)
        decay = torch.where(s_s > 0, s_s / s_t, torch.zeros_like(s_t))
        gain = torch.where(s_s > 0, a_s - decay * a_t, a_s)  # -α_s (e^{-h} - 1) without 0 · inf
        mean = per_sample(decay, x) * x + per_sample(gain, x) * d
        return Gaussian(mean, x.new_zeros(())), (posterior.x0, lam_t.expand(len(x)).clone())

    def stochastic(self, t: float, s: float) -> bool:
        """Return False."""
        return False


@dataclass(frozen=True)
class Windowed(Kernel):
    """``inside`` where ``window(t, s)`` holds, ``outside`` elsewhere: MixGRPO, Flow-GRPO-Fast, singular steps (G²RPO).

    ``window`` may be a named state that moves while training; within one rollout it must not change.
    """

    inside: Kernel
    window: Callable[[float, float], bool]
    outside: Kernel = EULER

    def __call__(
        self, x: Tensor, posterior: Posterior, t: Time, s: Time, carry: Carry = None
    ) -> tuple[Gaussian, Carry]:
        """Return the law of the kernel in force; per-sample times are split between the two.

        A batch of transitions replayed in training carries its own times, some inside and some outside.
        """
        tt = torch.as_tensor(t, dtype=torch.float64).reshape(-1)
        ss = torch.as_tensor(s, dtype=torch.float64).reshape(-1)
        hit = [self.window(a, b) for a, b in zip(tt.tolist(), ss.expand(len(tt)).tolist(), strict=True)]
        if all(hit) or not any(hit):
            return (self.inside if hit[0] else self.outside)(x, posterior, t, s, carry)
        if carry is not None:
            raise ValueError("a window cannot split one batch between kernels with memory; pass one time per batch.")
        (p, _), (q, _) = self.inside(x, posterior, t, s), self.outside(x, posterior, t, s)
        mask = torch.tensor(hit, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        return Gaussian(torch.where(mask, p.mean, q.mean), torch.where(mask, p.std, q.std)), None

    def stochastic(self, t: float, s: float) -> bool:
        """Return the answer of the kernel in force."""
        return (self.inside if self.window(t, s) else self.outside).stochastic(t, s)
