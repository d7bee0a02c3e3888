"""The conventions that live on σ_data: EDM (Karras et al. 2206.00364), consistency models and TrigFlow (2410.11081)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.gaussian import per_sample, work_dtype
from flowalign.pipelines.convention import Convention, sigma_times
from flowalign.process import Karras, Posterior, Process, Time

__all__ = ["Arc", "Edm", "Trig"]


@dataclass(frozen=True)
class Edm(Convention):
    """EDM preconditioning: ``x0 = c_skip x + c_out F``; ``sigma_min`` > 0 gives the consistency-model boundary."""

    process: Karras
    sigma_data: float = 0.5
    sigma_min: float = 0.0
    sign: float = 1.0
    consistency: bool = False

    def times(self, scheduler: Any) -> Tensor:
        """Return ``(σ/σ_max)^(1/ρ)``."""
        return sigma_times(self.process, scheduler.sigmas, len(scheduler.timesteps))

    def timestep(self, t: float) -> float:
        """Return ``log(σ)/4``; consistency models scale it by 1000."""
        sigma = max(self.sigma(t), 1e-12)
        return 1000 * 0.25 * math.log(sigma + 1e-44) if self.consistency else 0.25 * math.log(sigma)

    def sigma(self, t: float) -> float:
        """Return ``σ_max t^ρ``."""
        return float(self.process(t)[1])

    def read(self, x: Tensor, t: Time, raw: Tensor) -> Posterior:
        """Return the denoised sample's posterior."""
        x = x.to(work_dtype(x))
        skip, out = self._scalings(t, x)
        return self.process.posterior(x, t, x0=skip * x + out * raw.to(x))

    def write(self, x: Tensor, posterior: Posterior) -> Tensor:
        """Return ``F``."""
        skip, out = self._scalings(posterior.t, posterior.x0)
        return (posterior.x0 - skip * x) / out

    def _scalings(self, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
        s, d = self.process(t)[1], self.sigma_data
        shifted = s - self.sigma_min
        out = self.sign * shifted * d / (s**2 + d**2).sqrt()
        return per_sample(d**2 / (shifted**2 + d**2), like), per_sample(out, like)


@dataclass(frozen=True)
class Arc(Process):
    """``α = cos(πt/2), σ = σ_data sin(πt/2)``: the circle of sCM, with states in units of σ_data (2410.11081)."""

    sigma_data: float = 0.5

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return ``(cos θ, σ_d sin θ)``."""
        theta = torch.as_tensor(t, dtype=torch.float64) * (math.pi / 2)
        return theta.cos(), self.sigma_data * theta.sin()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return ``π/2 (-sin θ, σ_d cos θ)``."""
        theta = torch.as_tensor(t, dtype=torch.float64) * (math.pi / 2)
        return -theta.sin() * math.pi / 2, self.sigma_data * theta.cos() * math.pi / 2


@dataclass(frozen=True)
class Trig(Convention):
    """TrigFlow: timesteps are angles."""

    process: Arc

    def times(self, scheduler: Any) -> Tensor:
        """Return ``2θ/π``."""
        angles = scheduler.timesteps.detach().double().cpu()
        # the largest angle is written 1.57080, which is a little more than π/2
        return torch.cat([(angles * (2 / math.pi)).clamp_max(1.0), angles.new_zeros(1)])

    def timestep(self, t: float) -> float:
        """Return the angle."""
        return t * math.pi / 2

    def sigma(self, t: float) -> float:
        """Return the angle too: the scheduler holds no sigmas."""
        return self.timestep(t)

    def read(self, x: Tensor, t: Time, raw: Tensor) -> Posterior:
        """Return ``x0 = cos θ x - sin θ F``."""
        x = x.to(work_dtype(x))
        theta = torch.as_tensor(t, dtype=torch.float64) * (math.pi / 2)
        return self.process.posterior(x, t, x0=per_sample(theta.cos(), x) * x - per_sample(theta.sin(), x) * raw.to(x))

    def write(self, x: Tensor, posterior: Posterior) -> Tensor:
        """Return ``F = (cos θ x - x0)/sin θ``."""
        theta = torch.as_tensor(posterior.t, dtype=torch.float64) * (math.pi / 2)
        return (per_sample(theta.cos(), x) * x - posterior.x0) / per_sample(theta.sin(), x)
