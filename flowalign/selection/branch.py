"""Branching: every node has so many children at the given levels (BranchGRPO, TreeGRPO, G²RPO, B²-DiffuRL)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.noise import NoiseSource
from flowalign.selection.base import Chosen, Selection

__all__ = ["Branch", "Fan"]


@dataclass(frozen=True)
class Branch(Selection):
    """``widths[level]`` children per node; one where the level is not named. Children inherit the log-weight.

    A tree with the same width for all nodes of a level keeps the log-mean of the weights an unbiased estimate of Z.

    Raises:
        ValueError: if a width is below 1.
    """

    widths: Mapping[int, int]

    def __post_init__(self) -> None:
        bad = {k: w for k, w in self.widths.items() if w < 1}
        if bad:
            raise ValueError(f"every width must be at least 1; got {bad}. Leave a level out for one child per node.")

    def __call__(self, level: int, log_w: Tensor, row: Tensor, n_rows: int, noise: NoiseSource) -> Chosen | None:
        """Repeat each node."""
        width = self.widths.get(level, 1)
        if width == 1:
            return None
        parents = torch.arange(len(row)).repeat_interleave(width)
        return Chosen(parents, log_w.repeat_interleave(width), log_w.new_zeros(n_rows))


@dataclass(frozen=True)
class Fan(Selection):
    """Every node of row r has ``widths[r]`` children at one level: samples that share their start part there.

    Attributes:
        level: where.
        widths: children by row.
    """

    level: int
    widths: tuple[int, ...]

    def __call__(self, level: int, log_w: Tensor, row: Tensor, n_rows: int, noise: NoiseSource) -> Chosen | None:
        """Repeat each node as its row asks."""
        if level != self.level:
            return None
        parents = torch.arange(len(row)).repeat_interleave(torch.tensor(self.widths)[row])
        return Chosen(parents, log_w[parents.to(log_w.device)], log_w.new_zeros(n_rows))
