"""How several losses become one gradient: their sum, or the shortest vector in their hull.

MARBLE (2605.06507): one gradient per reward and ``α = argmin_{simplex} ‖Σ α_i g_i‖²`` (MGDA, Désidéri 2012), smoothed
over iterations, so that no reward falls to first order. Losses that are no reward (penalties) are added as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.state import Stateful

__all__ = ["Aggregate", "MinNorm", "Sum"]


class Aggregate(Stateful, ABC):
    """Adds the gradient of losses by name to the parameters' ``.grad``."""

    @abstractmethod
    def backward(
        self, terms: Mapping[str, Tensor], parameters: Sequence[Tensor], scale: float = 1.0
    ) -> dict[str, float]:
        """Backpropagate ``scale`` times the combination; return metrics."""


class Sum(Aggregate):
    """The sum of all losses."""

    def backward(
        self, terms: Mapping[str, Tensor], parameters: Sequence[Tensor], scale: float = 1.0
    ) -> dict[str, float]:
        """Backpropagate the sum."""
        (scale * torch.stack(list(terms.values())).sum()).backward()
        return {}


class MinNorm(Aggregate):
    """The min-norm combination of the reward losses, plus the penalties.

    Args:
        decay: of the moving average of the coefficients; 0 takes each batch's own.
        penalties: names of losses that are added as they are.
    """

    def __init__(self, decay: float = 0.9, penalties: tuple[str, ...] = ("kl",)) -> None:
        self.decay, self.penalties = decay, penalties
        self.alpha: Tensor | None = None

    def backward(
        self, terms: Mapping[str, Tensor], parameters: Sequence[Tensor], scale: float = 1.0
    ) -> dict[str, float]:
        """Backpropagate ``Σ α_i L_i`` of the rewards and the penalties; ``α`` sums to one."""
        names = [n for n in terms if n not in self.penalties]
        self.alpha = self._smooth(self.coefficients([terms[n] for n in names], parameters))
        # the gradient of Σ α L with fixed α is Σ α g: no second set of gradients is kept
        total = torch.stack([a * terms[n] for a, n in zip(self.alpha.tolist(), names, strict=True)]).sum()
        for name in self.penalties:
            if name in terms:
                total = total + terms[name]
        (scale * total).backward()
        return {f"alpha/{n}": a for n, a in zip(names, self.alpha.tolist(), strict=True)}

    def coefficients(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """Return the min-norm weights of the losses' gradients, ``(R,)`` float64."""
        from torchjd.aggregation import MGDAWeighting

        rows = []
        for loss in losses:
            grads = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
            rows.append(torch.cat([g.detach().flatten().double() for g in grads if g is not None]))
        jacobian = torch.stack(rows)
        gram = jacobian @ jacobian.T
        return MGDAWeighting()(gram / gram.diagonal().mean().clamp_min(1e-30)).cpu()

    def _smooth(self, alpha: Tensor) -> Tensor:
        if self.alpha is None or len(self.alpha) != len(alpha):
            return alpha
        return self.decay * self.alpha + (1 - self.decay) * alpha

    def state_dict(self) -> dict[str, Any]:
        """Return the moving average."""
        return {} if self.alpha is None else {"alpha": self.alpha}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the moving average."""
        self.alpha = state.get("alpha")
