"""Tempering: intermediate targets ``p_k ∝ p exp(λ_k r_k)`` with λ_k rising to λ (DAS, 2501.05803).

A fixed schedule keeps Ẑ unbiased. Choosing λ_k from the particles, so that the ESS falls to a target at each level
(Del Moral, Doucet & Jasra 2012), does not: the bias is O(1/N). Both say which they are.

Near pure noise all values are alike and any λ_k would keep the ESS: the adaptive rule would jump to λ at the first
level and be no tempering at all. It is therefore held below 1 - t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.potentials.base import Potential

__all__ = ["Tempered", "geometric"]


def geometric(gamma: float, steps: int) -> Callable[[float], float]:
    """Return DAS's ``min((1 + γ)^i - 1, 1)`` at step i of ``steps``, as a function of t (γ = .008, 100 steps)."""
    return lambda t: min((1 + gamma) ** ((1 - t) * steps) - 1, 1.0)


@dataclass(frozen=True)
class Tempered(Potential):
    """``log G = λ_k r_k - λ_{k-1} r_{k-1}``.

    Attributes:
        schedule: ``t → λ_k / λ`` in [0, 1]; None to choose λ_k by bisection on the ESS.
        target: fraction of the particles' number that the adaptive rule lets the ESS fall to.
    """

    schedule: Callable[[float], float] | None = None
    target: float = 0.9

    @property
    def unbiased(self) -> bool:
        """Whether the schedule was fixed beforehand."""
        return self.schedule is not None

    def gain(
        self, t: float, value: Tensor, own: Any, total: Tensor, log_w: Tensor, row: Tensor, n_rows: int
    ) -> tuple[Tensor, Any]:
        """Return the step from the product so far to the tempered target."""
        if self.schedule is not None:
            return self.scale * self.schedule(t) * value - total, None
        before = value.new_zeros(len(value)) if own is None else own
        high = before.clamp_min(1 - t)
        share = _bisect(lambda f: log_w + f * self.scale * value - total, before, high, row, n_rows, self.target)
        return self.scale * share * value - total, share


def _bisect(
    weights: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    row: Tensor,
    n_rows: int,
    target: float,
    rounds: int = 40,
) -> Tensor:
    """Return per node its row's largest share in [low, high] whose ESS is at least ``target`` of the row's particles.

    Where no share is, the answer is ``low``.
    """
    row = row.to(low.device)
    n = torch.bincount(row, minlength=n_rows).to(low)

    def enough(share: Tensor) -> Tensor:
        w = weights(share)
        top = w.new_full((n_rows,), -torch.inf).scatter_reduce(0, row, w, "amax")
        w = (w - top[row]).exp()
        first, second = w.new_zeros(n_rows).index_add(0, row, w), w.new_zeros(n_rows).index_add(0, row, w**2)
        return (first**2 / second >= target * n)[row]

    most, done = high, enough(high)
    for _ in range(rounds):
        mid = (low + high) / 2
        ok = enough(mid)
        low, high = torch.where(ok, mid, low), torch.where(ok, high, mid)
    return torch.where(done, most, low)
