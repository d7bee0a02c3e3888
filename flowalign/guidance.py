"""Guides: how a gradient steers a step.

    where = "posterior"   score += g:  x̂0 += σ²/α g,  ε̂ -= σ g         (Flow-NRG; works for an ODE; not weighted)
    where = "proposal"    the step's mean += std² g, and the weight gains  log prior(x) - log proposal(x)
                          (twisted diffusion sampler, DAS: unbiased whatever g is)

The log-density that is stored of a step is always that of the unguided law: training on it distils the guidance into
the policy (Euphonium).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowalign.process import Posterior, Time
from flowalign.values import Score

__all__ = ["Along", "Guide", "Twist"]

Where = Literal["posterior", "proposal"]


class Guide(ABC):
    """Says where to push a state. ``through_network`` guides differentiate the posterior with respect to x."""

    where: Where
    through_network: bool
    weighted: bool = True

    def enter(self, score: Score, seed: int, keys: tuple[int, ...] | None) -> None:  # noqa: B027 - most ask nobody
        """Hear who judges the coming rollout, for guides that ask (SPSA); most do not.

        Args:
            score: ``(x0 states, row) → (B,)``.
            seed: of the rollout's noise.
            keys: of its rows; see :class:`flowalign.noise.Noise`.
        """

    @abstractmethod
    def active(self, t: float) -> bool:
        """Return whether the step from t is guided."""

    @abstractmethod
    def gradient(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor, value: Tensor | None) -> Tensor:
        """Return ``∇_x`` of a log-potential, ``(B, *)``.

        Args:
            x: states; they require gradients where ``through_network``.
            posterior: evaluated at x, attached to x's graph where ``through_network``.
            t: the time.
            row: row of each state.
            value: what the rollout's ``Value`` said at x, attached likewise; None where the rollout has none.
        """


@dataclass(frozen=True)
class Twist(Guide):
    """``scale(t) ∇_x V(x̂0(x))`` of the rollout's own value: one forward serves value, weight and gradient.

    Attributes:
        scale: λ, or a function of the time (tempering); in log units per unit of reward.
        where: see the module.
        limit: largest norm of the gradient per sample; None for no limit. A clipped proposal stays correctly weighted.
        window: times at which to guide; all by default.
    """

    scale: float | Callable[[float], float] = 1.0
    where: Where = "proposal"
    limit: float | None = None
    window: Callable[[float], bool] | None = None
    through_network = True

    def active(self, t: float) -> bool:
        """Return whether t is in the window."""
        return self.window is None or self.window(t)

    def gradient(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor, value: Tensor | None) -> Tensor:
        """Differentiate the value.

        Raises:
            ValueError: if the rollout has no value, or the value does not depend on x (a reward without gradients).
        """
        if value is None or not value.requires_grad:
            raise ValueError(
                "a gradient guide needs a differentiable value: the rollout has none, or its reward gives no gradient "
                "(card.differentiable is False). Use a weight-only method (FK, SVDD, tree search) for such a reward."
            )
        (g,) = torch.autograd.grad(value.sum(), x)
        scale = self.scale(float(t)) if callable(self.scale) else self.scale
        return _limited(scale * g, self.limit)


@dataclass(frozen=True)
class Along(Guide):
    """A gradient field given as a function ``(x, posterior, t, row) → (B, *)``: learned values, exact worlds, SPSA.

    Attributes:
        field: the gradient of a log-potential.
        where: see the module.
        weighted: whether a proposal's weight is corrected; False where the guidance is to be distilled (Euphonium).
        window: times at which to guide; all by default.
    """

    field: Callable[[Tensor, Posterior, Time, Tensor], Tensor]
    where: Where = "posterior"
    weighted: bool = True
    window: Callable[[float], bool] | None = None
    through_network = False

    def active(self, t: float) -> bool:
        """Return whether t is in the window."""
        return self.window is None or self.window(t)

    def gradient(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor, value: Tensor | None) -> Tensor:
        """Return the field at x."""
        return self.field(x, posterior, t, row)


def _limited(g: Tensor, limit: float | None) -> Tensor:
    if limit is None:
        return g
    norm = g.flatten(1).norm(dim=1).clamp_min(1e-12)
    return g * (limit / norm).clamp_max(1.0).reshape(-1, *[1] * (g.ndim - 1))
