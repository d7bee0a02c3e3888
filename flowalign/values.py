"""Values: what a state at time t promises, ``(x, posterior, t, row) → (B,)``, in units of the reward.

Shared by Feynman-Kac potentials, twisted proposals, pruning, dense step rewards and process rewards. A ``score`` is any
function ``(x0 states, row) → (B,)``; methods make it from a pipeline's decoder and a reward.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.kernels import EulerMaruyama, Kernel
from flowalign.policy import Policy
from flowalign.process import Posterior, Time

__all__ = ["Completion", "Draws", "Learned", "Score", "Tweedie", "Value"]

Score = Callable[[Tensor, Tensor], Tensor]


class Value(ABC):
    """Predicts the reward of the finished sample."""

    @abstractmethod
    def __call__(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
        """Return ``(B,)`` values of states ``x (B, *)`` at time t, of the given rows (CPU)."""


@dataclass(frozen=True)
class Tweedie(Value):
    """The reward of the posterior mean, ``r(E[x0 | x_t])``: no extra network call; biased where r is not linear."""

    score: Score

    def __call__(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
        """Return ``r(x̂0)``."""
        return self.score(posterior.x0, row)


@dataclass(frozen=True)
class Draws(Value):
    """``(1/λ) log mean exp(λ r)`` over several draws ``x̂0 + spread(t) z`` around the posterior mean (FK's many-sample).

    Attributes:
        score: of x0.
        spread: std of ``x0 | x_t`` at time t; for data of unit scale ``σ/√(α² + σ²)``.
        noise: ``(n, *shape)`` fixed standard normals, shared by all states so that values are comparable.
        scale: λ.
    """

    score: Score
    spread: Callable[[Time], Tensor]
    noise: Tensor
    scale: float = 1.0

    def __call__(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
        """Return the soft mean of the rewards of the draws."""
        std = self.spread(t).to(posterior.x0).reshape(-1, *[1] * (x.ndim - 1))
        if not bool((std > 0).any()):  # data: all draws are the state
            return self.score(posterior.x0, row)
        r = torch.stack([self.score(posterior.x0 + std * z.to(posterior.x0), row) for z in self.noise])
        return (torch.logsumexp(self.scale * r, 0) - math.log(len(r))) / self.scale


@dataclass(frozen=True)
class Completion(Value):
    """The reward after a short ODE from ``x_t`` to data; its first step reuses the posterior at hand.

    Attributes:
        policy: what is evaluated.
        score: of x0.
        cond: the rows' conditions.
        steps: ODE steps in all, one or more; one is Tweedie.
        kernel: deterministic.
    """

    policy: Policy
    score: Score
    cond: Any = None
    steps: int = 2
    kernel: Kernel = EulerMaruyama()  # noqa: RUF009 - frozen, without state

    def __call__(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
        """Return ``r(ODE(x_t))``."""
        grid = torch.as_tensor(t, dtype=torch.float64)
        carry = None
        for i in range(self.steps):
            a, b = grid * (1 - i / self.steps), grid * (1 - (i + 1) / self.steps)
            if i:
                posterior = self.policy.posterior(x, a, None if self.cond is None else self.cond[row])
            law, carry = self.kernel(x, posterior, a, b, carry)
            x = law.mean
        return self.score(x, row)


class Learned(Value):
    """A network on noisy latents, ``V_φ(x_t, t, row)``, as a value of any rollout.

    Args:
        network: ``(x, t (B,), row) → (B,)``: a module, or a value that is being learnt.
    """

    def __init__(self, network: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.network = network

    def __call__(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
        """Return ``V_φ``."""
        times = torch.as_tensor(t, dtype=torch.float64).reshape(-1).expand(len(x))
        return self.network(x, times.to(x.device), row)
