"""The potential as an object, ``(level, t, value, trace) → (log G, trace)``; completed at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Potential"]


@dataclass(frozen=True)
class Potential(ABC):
    """Log-potential of a lineage.

    Attributes:
        scale: λ = 1/β, log-weight per unit of reward. Published: 10 with ImageReward.
        levels: ``level → bool``: where the potential is not 1; every level by default. The terminal one always acts.
    """

    scale: float = 1.0
    levels: Callable[[int], bool] | None = None

    @property
    def unbiased(self) -> bool:
        """Whether ``E[Ẑ] = Z`` for any number of particles; not so where the potential looks at the particles."""
        return True

    def active(self, level: int, last: bool) -> bool:
        """Return whether values are needed at this level."""
        return last or self.levels is None or self.levels(level)

    def __call__(
        self, level: int, t: float, value: Tensor, trace: Any, log_w: Tensor, row: Tensor, n_rows: int, last: bool
    ) -> tuple[Tensor, Any]:
        """Return ``log G (N,)`` and the lineage's new memory.

        Args:
            level: of the nodes.
            t: their time.
            value: of the nodes, ``(N,)``; at the last level the reward itself.
            trace: the lineage's memory, None at the start: ``(sum of log G so far, own memory)``.
            log_w: the weights carried, for potentials that adapt to them.
            row: row of each node.
            n_rows: number of rows.
            last: whether this is data time, where the product is completed to ``exp(λ r)``.
        """
        value = value.detach()
        total, own = (value.new_zeros(len(value)), None) if trace is None else trace
        if last:
            return self.scale * value - total, None
        gain, own = self.gain(t, value, own, total, log_w, row, n_rows)
        return gain, (total + gain, own)

    @abstractmethod
    def gain(
        self, t: float, value: Tensor, own: Any, total: Tensor, log_w: Tensor, row: Tensor, n_rows: int
    ) -> tuple[Tensor, Any]:
        """Return ``log G_k`` before the last level, and what to remember."""
