"""What every selection is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from flowalign.noise import NoiseSource

__all__ = ["Chosen", "Selection", "by_row"]


class Chosen(NamedTuple):
    """The outcome of a selection: ``parents (M,)`` on the CPU, ``log_w (M,)``, ``dlog_z (n_rows,)``."""

    parents: Tensor
    log_w: Tensor
    dlog_z: Tensor


class Selection(ABC):
    """Who has offspring at a level."""

    @abstractmethod
    def __call__(self, level: int, log_w: Tensor, row: Tensor, n_rows: int, noise: NoiseSource) -> Chosen | None:
        """Choose parents.

        Args:
            level: of the nodes.
            log_w: carried log-weights ``(N,)``.
            row: row of each node ``(N,)``, CPU.
            n_rows: number of rows.
            noise: where uniforms come from.

        Returns:
            None where every node has exactly one child.
        """


def by_row(row: Tensor, n_rows: int) -> Tensor:
    """Return the nodes of each row as ``(n_rows, n)`` indices.

    Raises:
        ValueError: if rows have different numbers of nodes.
    """
    counts = torch.bincount(row, minlength=n_rows)
    if not len(row) or (counts != counts[0]).any():
        raise ValueError(
            f"selection needs the same number of nodes for every prompt; got {counts.tolist()}. Start each prompt with "
            "equally many particles."
        )
    return torch.argsort(row, stable=True).reshape(n_rows, -1)
