"""What a diffusers scheduler means: its noising process, its clock, and what the network predicts.

Every convention answers four questions for one scheduler: which :class:`~flowalign.process.Process` holds the states
that ``step`` sees; which float times ``t`` in [0, 1] (1 = noise) its grid has; which timestep the network is given at a
time between grid points; and how a raw model output becomes ``E[x0|x]`` and ``E[ε|x]``.

    Flow        x = (1 - σ) x0 + σ ε             t = σ                       output v = ε - x0 (Mochi: both turned)
    Diffusion   x = √ᾱ x0 + √(1-ᾱ) ε             t = (τ + 1)/N, or by angle  output ε, x0 or v = αε - σx0
    KDiffusion  x = x0 + σ̃ ε, σ̃ = √(1-ᾱ)/√ᾱ      t by angle θ = atan σ̃       same outputs, rescaled states
    Edm         x = x0 + σ ε                     σ = σ_max t^ρ               x0 = c_skip x + c_out F (Karras 2022)
    Trig        x = cos θ x0 + σ_d sin θ ε       t = 2θ/π                    x0 = cos θ x - sin θ F (sCM, SanaSprint)

At grid points the time is exact in float64: it is computed from the scheduler's own float32 sigma, so a kernel that
uses ``process(t)`` uses the very noise level that the pipeline's solver uses.

:func:`flowalign.pipelines.reading.convention` tells which one a scheduler follows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.gaussian import per_sample, work_dtype
from flowalign.process import Karras, Posterior, Process, Rescaled, Time, VariancePreserving

__all__ = ["Convention", "Diffusion", "Flow", "KDiffusion", "Ratio", "angle_times", "sigma_times"]


@dataclass(frozen=True)
class Convention(ABC):
    """How one scheduler's numbers are read. Immutable; made by :func:`convention`."""

    process: Process

    @abstractmethod
    def times(self, scheduler: Any) -> Tensor:
        """Return ``(len(timesteps) + 1,)`` float64 times of a scheduler after ``set_timesteps``; the last is 0."""

    @abstractmethod
    def timestep(self, t: float) -> float:
        """Return the timestep that the network is given at time ``t``, anywhere in [0, 1]."""

    @abstractmethod
    def sigma(self, t: float) -> float:
        """Return what ``scheduler.sigmas`` would hold at time ``t``."""

    @abstractmethod
    def read(self, x: Tensor, t: Time, raw: Tensor) -> Posterior:
        """Return the posterior that the raw model output ``raw`` means at ``(x, t)``."""

    @abstractmethod
    def write(self, x: Tensor, posterior: Posterior) -> Tensor:
        """Return the raw model output that means ``posterior``: the inverse of :meth:`read`."""


@dataclass(frozen=True)
class Flow(Convention):
    """Rectified flow. ``inverted``: σ rises from 0 at noise to 1 at data and the output is x0 - ε (Mochi)."""

    train_steps: float = 1000.0
    inverted: bool = False
    kind: str = "velocity"

    def times(self, scheduler: Any) -> Tensor:
        """Return the scheduler's sigmas."""
        sigmas = scheduler.sigmas.detach().double().cpu()[: len(scheduler.timesteps) + 1]
        return 1 - sigmas if self.inverted else sigmas

    def timestep(self, t: float) -> float:
        """Return ``N σ``."""
        return self.train_steps * self.sigma(t)

    def sigma(self, t: float) -> float:
        """Return t, or 1 - t where the clock is turned."""
        return 1 - t if self.inverted else t

    def read(self, x: Tensor, t: Time, raw: Tensor) -> Posterior:
        """Return ``x0 = x - t v``, ``ε = x + (1 - t) v``."""
        if self.kind == "x0":
            return self.process.posterior(x, t, x0=raw)
        return self.process.posterior(x, t, v=-raw if self.inverted else raw)

    def write(self, x: Tensor, posterior: Posterior) -> Tensor:
        """Return ``v = ε - x0``."""
        if self.kind == "x0":
            return posterior.x0
        v = posterior.eps - posterior.x0
        return -v if self.inverted else v


@dataclass(frozen=True)
class Diffusion(Convention):
    """Variance-preserving states. ``by_sigma``: the scheduler has ``sigmas`` (DPM-Solver, UniPC, DEIS), else timesteps.

    ``boundary``: the consistency functions c_skip, c_out of LCM, timestep scaling and σ_data, or None.
    """

    process: VariancePreserving
    prediction: str = "epsilon"
    train_steps: int = 1000
    by_sigma: bool = False
    boundary: tuple[float, float] | None = None

    def times(self, scheduler: Any) -> Tensor:
        """Return ``(τ + 1)/N``, or the time at which the process has the scheduler's σ/α."""
        if self.by_sigma:
            return angle_times(self.process, scheduler.sigmas, len(scheduler.timesteps))
        steps = scheduler.timesteps.detach().double().cpu()
        return torch.cat([(steps + 1) / self.train_steps, steps.new_zeros(1)])

    def timestep(self, t: float) -> float:
        """Return ``t N - 1``."""
        return max(t * self.train_steps - 1, 0.0)

    def sigma(self, t: float) -> float:
        """Return ``σ/α``."""
        a, s = self.process(t)
        return float(s / a)

    def read(self, x: Tensor, t: Time, raw: Tensor) -> Posterior:
        """Complete the prediction; a consistency model's x0 is its boundary-conditioned one."""
        name = {"epsilon": "eps", "sample": "x0", "v_prediction": "v_prediction"}[self.prediction]
        posterior = self.process.posterior(x, t, **{name: raw})
        if self.boundary is None:
            return posterior
        skip, out = self._scalings(t, posterior.x0)
        return self.process.posterior(x, t, x0=out * posterior.x0 + skip * x.to(posterior.x0))

    def write(self, x: Tensor, posterior: Posterior) -> Tensor:
        """Return ε, x0 or ``αε - σx0``; the boundary functions are undone first."""
        if self.boundary is not None:
            skip, out = self._scalings(posterior.t, posterior.x0)
            posterior = self.process.posterior(x, posterior.t, x0=(posterior.x0 - skip * x) / out)
        if self.prediction == "sample":
            return posterior.x0
        if self.prediction == "epsilon":
            return posterior.eps
        a, s = (per_sample(c, x) for c in self.process(posterior.t))
        return a * posterior.eps - s * posterior.x0

    def _scalings(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        assert self.boundary is not None
        scaling, data = self.boundary
        tau = (torch.as_tensor(t, dtype=torch.float64) * self.train_steps - 1) * scaling
        norm = tau**2 + data**2
        return per_sample(data**2 / norm, like), per_sample(tau / norm.sqrt(), like)


@dataclass(frozen=True)
class Ratio(Diffusion):
    """Wuerstchen and Stable Cascade: the timestep is the cosine schedule's own argument in [0, 1]."""

    def times(self, scheduler: Any) -> Tensor:
        """Return the timesteps, which end at 0."""
        steps = scheduler.timesteps.detach().double().cpu()
        return steps if float(steps[-1]) == 0.0 else torch.cat([steps, steps.new_zeros(1)])

    def timestep(self, t: float) -> float:
        """Return t."""
        return t


@dataclass(frozen=True)
class KDiffusion(Convention):
    """States ``x0 + σ̃ ε`` (the Euler, Heun, LMS and KDPM2 family), over the angle clock or over Karras's."""

    prediction: str = "epsilon"
    train_steps: int = 1000
    continuous: bool = False

    def times(self, scheduler: Any) -> Tensor:
        """Return the times at which the process has the scheduler's sigmas."""
        sigmas = scheduler.sigmas
        between = vars(scheduler).get("sigmas_interpol")  # KDPM2's second evaluation sits between two sigmas
        if between is not None and len(between) >= len(sigmas):
            sigmas = torch.where(torch.arange(len(sigmas)) % 2 == 1, between[: len(sigmas)].cpu(), sigmas.cpu())
        return sigma_times(self.process, sigmas, len(scheduler.timesteps))

    def timestep(self, t: float) -> float:
        """Return ``t N - 1``, or ``log(σ)/4`` where timesteps are continuous (SVD)."""
        if self.continuous:
            return 0.25 * math.log(max(self.sigma(t), 1e-12))
        return max(t * self.train_steps - 1, 0.0)

    def sigma(self, t: float) -> float:
        """Return ``σ̃(t)``."""
        return float(self.process(t)[1])

    def read(self, x: Tensor, t: Time, raw: Tensor) -> Posterior:
        """Complete ε, x0 or v = (ε - σ̃ x0)/√(1 + σ̃²)."""
        if self.prediction == "epsilon":
            return self.process.posterior(x, t, eps=raw)
        if self.prediction == "sample":
            return self.process.posterior(x, t, x0=raw)
        x = x.to(work_dtype(x))
        s = per_sample(self.process(t)[1], x)
        n = 1 + s**2
        return self.process.posterior(x, t, x0=x / n - raw.to(x) * s / n.sqrt())

    def write(self, x: Tensor, posterior: Posterior) -> Tensor:
        """Return the inverse of :meth:`read`."""
        if self.prediction == "epsilon":
            return posterior.eps
        if self.prediction == "sample":
            return posterior.x0
        s = per_sample(self.process(posterior.t)[1], x)
        return (posterior.eps - s * posterior.x0) / (1 + s**2).sqrt()


def angle_times(process: VariancePreserving, sigmas: Tensor, count: int) -> Tensor:
    """Return the times at which ``σ/α`` equals ``sigmas``; inverts the piecewise linear angle."""
    theta = sigmas.detach().double().cpu()[: count + 1].atan()
    knots = torch.tensor(process.angles, dtype=torch.float64)
    n = len(knots) - 1
    i = torch.searchsorted(knots, theta).clamp(1, n)
    gap = knots[i] - knots[i - 1]
    # the terminal sigma is data time whatever the table says; round-off at a knot must not leave it
    t = (i - 1 + torch.where(gap > 0, (theta - knots[i - 1]) / gap, 1.0)).clamp(0, n) / n
    near = (t * n).round() / n
    t = torch.where((t - near).abs() * n < 1e-5, near, t)
    return torch.cat([t[:count], t.new_zeros(1)])


def sigma_times(process: Process, sigmas: Tensor, count: int) -> Tensor:
    """Return the times of k-diffusion or EDM sigmas; the terminal one is 0."""
    if isinstance(process, Rescaled):
        assert isinstance(process.inner, VariancePreserving)
        return angle_times(process.inner, sigmas, count)
    assert isinstance(process, Karras)
    t = process.time(sigmas.detach().double().cpu()[:count])
    return torch.cat([t, t.new_zeros(1)])
