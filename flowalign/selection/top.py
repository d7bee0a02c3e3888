"""Truncation: the best nodes of each row go on (best-of-N, beams, SVDD's argmax, TTSnap's pruning)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flowalign.noise import NoiseSource
from flowalign.selection.base import Chosen, Selection, by_row

__all__ = ["Top"]


@dataclass(frozen=True)
class Top(Selection):
    """Keep the ``keep[level]`` nodes of greatest log-weight in each row, best first, each with ``children`` children.

    A search, not a sampler: the kept weights are no estimate of Z.

    Attributes:
        keep: level → number kept.
        children: children of each kept node.
    """

    keep: Mapping[int, int]
    children: int = 1

    def __post_init__(self) -> None:
        if self.children < 1 or any(k < 1 for k in self.keep.values()):
            raise ValueError(f"keep and children must be at least 1; got {dict(self.keep)} and {self.children}.")

    def __call__(self, level: int, log_w: Tensor, row: Tensor, n_rows: int, noise: NoiseSource) -> Chosen | None:
        """Rank and truncate."""
        if level not in self.keep:
            return None
        nodes = by_row(row, n_rows)
        k = self.keep[level]
        if k > nodes.shape[1]:
            raise ValueError(f"cannot keep {k} of {nodes.shape[1]} nodes per prompt at level {level}.")
        order = log_w.detach().cpu()[nodes].argsort(dim=1, descending=True, stable=True)[:, :k]
        parents = nodes.gather(1, order).flatten().repeat_interleave(self.children)
        return Chosen(parents, log_w[parents.to(log_w.device)], log_w.new_zeros(n_rows))
