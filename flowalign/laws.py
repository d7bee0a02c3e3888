"""Noise laws: how much fresh noise a step from t to s draws.

A law sees the process and both ends of the step, since published rules need them: Flow-GRPO replaces the singular first
denominator by the next time, the memoryless law is offset by the step so that nothing is left over at data time.

For ``EulerMaruyama`` a law is the diffusion ``g`` (noise per √time), for ``Ancestral`` the std of the step itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.process import Process, Time, as_time

__all__ = [
    "Clipped",
    "Consistency",
    "Constant",
    "Cps",
    "Ddim",
    "FlowGrpo",
    "Memoryless",
    "NoiseLaw",
    "Ode",
    "Spatial",
    "Table",
]


class NoiseLaw(ABC):
    """``law(process, t, s)``: a float64 tensor of the shape of t, or a map ``(1 | B, ..., H, W)`` over space."""

    keeps_marginals: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return the noise of the step from t to s < t."""

    def stochastic(self, t: float, s: float) -> bool:
        """Return whether the step from t to s draws noise: a law of level 0 draws none."""
        return True


@dataclass(frozen=True)
class Ode(NoiseLaw):
    """No noise: the probability-flow ODE, or DDIM with η = 0."""

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return 0."""
        return torch.zeros_like(as_time(t))

    def stochastic(self, t: float, s: float) -> bool:
        """Return False."""
        return False


@dataclass(frozen=True)
class FlowGrpo(NoiseLaw):
    """``g = a √(σ_t / α_t)``; where α_t = 0 (the first step from pure noise) α is taken at s.

    Flow-GRPO (2505.05470), ``sd3_sde_with_logprob.py``: a = .7 for SD3.5, .9 FLUX, 1.2 Qwen-Image. a = √2 is memoryless
    in the limit of small steps.
    """

    a: float = 0.7

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return ``a √(σ_t / α)``."""
        alpha, sigma = process(t)
        return self.a * (sigma / torch.where(alpha > 0, alpha, process(s)[0])).sqrt()

    def stochastic(self, t: float, s: float) -> bool:
        """Return whether a > 0."""
        return self.a > 0


@dataclass(frozen=True)
class Constant(NoiseLaw):
    """``g = eta``, DanceGRPO (2505.07818): .3 for FLUX, .25 for HunyuanVideo."""

    eta: float = 0.3

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return ``eta``."""
        return torch.full_like(as_time(t), self.eta)

    def stochastic(self, t: float, s: float) -> bool:
        """Return whether η > 0."""
        return self.eta > 0


@dataclass(frozen=True)
class Memoryless(NoiseLaw):
    """``g² = 2 σ_t W_t / α_s`` with the Wronskian ``W = σ̇ α - σ α̇``; rectified flow: ``2t / ((1-t) + (t-s))``.

    Adjoint Matching (2409.08861) needs x_1 and x_0 independent: g² = 2η_t = 2 σ W / α. α at the *end* of the step keeps
    the first step finite and leaves no residual variance at data time (the paper's own offset leaves 4h²).
    """

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return ``√(2 σ_t W_t / α_s)``."""
        return (2 * process(t)[1] * process.wronskian(t) / process(s)[0]).sqrt()


@dataclass(frozen=True)
class Ddim(NoiseLaw):
    """``std = η √[ σ_s²/σ_t² · (σ_t² - (α_t/α_s)² σ_s²) ]`` (DDIM, 2010.02502, eq. 16); η = 1 is DDPM's posterior."""

    eta: float = 1.0

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return the std of the step."""
        (a_t, s_t), (a_s, s_s) = process(t), process(s)
        return self.eta * s_s / s_t * (s_t**2 - (a_t / a_s * s_s) ** 2).clamp_min(0).sqrt()

    def stochastic(self, t: float, s: float) -> bool:
        """Return whether η > 0 (into exactly clean data the std is 0 at any η)."""
        return self.eta > 0


@dataclass(frozen=True)
class Cps(NoiseLaw):
    """Coefficient-preserving sampling: ``std = σ_s sin(η π/2)`` (Flow-CPS; η = .8 usual). Loses the marginals."""

    eta: float = 0.8
    keeps_marginals: ClassVar[bool] = False

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return ``σ_s sin(η π/2)``."""
        return process(s)[1] * math.sin(self.eta * math.pi / 2)

    def stochastic(self, t: float, s: float) -> bool:
        """Return whether the sine is positive and s > 0: at data time σ_s = 0."""
        return 0 < self.eta < 2 and s > 0


@dataclass(frozen=True)
class Consistency(NoiseLaw):
    """``std = σ_s``: all noise is fresh (consistency models, LCM; RLCM's policy)."""

    keeps_marginals: ClassVar[bool] = False

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return ``σ_s``."""
        return process(s)[1]

    def stochastic(self, t: float, s: float) -> bool:
        """Return whether noise is drawn: at data time σ_s = 0."""
        return s > 0


class Table(NoiseLaw):
    """``ψ(t)``: a named state, one level per grid time, interpolated linearly between (DenseGRPO, 2601.20218, Alg. 1).

    Args:
        times: ``(K,)`` decreasing start times of the steps.
        values: ``(K,)`` positive noise levels, trained or calibrated; ``state_dict`` saves them.
    """

    def __init__(self, times: Tensor, values: Tensor) -> None:
        if times.shape != values.shape or times.ndim != 1 or (times.diff() >= 0).any():
            raise ValueError(
                f"a table needs falling times and as many values; got {times.tolist()} and {values.tolist()}."
            )
        self.times, self.values = times.double().cpu(), values.double().cpu()

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return ψ(t)."""
        return self._level(as_time(t))

    def _level(self, t: Tensor) -> Tensor:
        """Interpolate ψ between its knots."""
        knots, psi = self.times.flip(0).to(t.device), self.values.flip(0).to(t.device)
        if len(knots) == 1:
            return psi[0].expand_as(t).clone()
        i = torch.searchsorted(knots, t.contiguous()).clamp(1, len(knots) - 1)
        w = ((t - knots[i - 1]) / (knots[i] - knots[i - 1])).clamp(0, 1)
        return psi[i - 1] + w * (psi[i] - psi[i - 1])

    def stochastic(self, t: float, s: float) -> bool:
        """Return whether ψ(t) > 0."""
        return bool(self._level(as_time(t)) > 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return times and values."""
        return {"times": self.times.clone(), "values": self.values.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore times and values."""
        self.times, self.values = state["times"].double(), state["values"].double()


@dataclass(frozen=True)
class Spatial(NoiseLaw):
    """Another law times a map over space (UPSR: more noise where a super-resolution is uncertain).

    Attributes:
        law: the law to scale.
        map: ``(1 | B, 1 | C, H, W)``, non-negative.
    """

    law: NoiseLaw
    map: Tensor

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return ``map * law(t, s)``."""
        level = self.law(process, t, s)
        return self.map.double() * level.reshape(-1, *[1] * (self.map.ndim - 1)).to(self.map.device)

    @property
    def keeps_marginals(self) -> bool:  # type: ignore[override]
        """As the law that is scaled."""
        return self.law.keeps_marginals

    def stochastic(self, t: float, s: float) -> bool:
        """Return the answer of the law that is scaled."""
        return self.law.stochastic(t, s)


@dataclass(frozen=True)
class Clipped(NoiseLaw):
    """Another law with the std of the step, ``g √(t - s)``, held below ``limit`` (LongCat-Video: .45)."""

    law: NoiseLaw
    limit: float = 0.45

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return ``min(g, limit / √(t - s))``."""
        return torch.minimum(self.law(process, t, s), self.limit / (as_time(t) - as_time(s)).sqrt())

    def stochastic(self, t: float, s: float) -> bool:
        """Return the answer of the law that is clipped; none is drawn below a limit of 0."""
        return self.limit > 0 and self.law.stochastic(t, s)
