"""Candidates of several searches in one batch: the best of each, and the better of two rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.methods.base import Candidates
from flowalign.selection.base import by_row

__all__ = ["best_by_row", "better", "mixed", "take"]


def best_by_row(total: Tensor, row: Tensor, n_rows: int, k: int = 1) -> Tensor:
    """Return the indices of the k best of each row, best first, ``(n_rows * k,)``."""
    nodes = by_row(row, n_rows)
    order = total.detach().cpu()[nodes].argsort(dim=1, descending=True, stable=True)[:, :k]
    return nodes.gather(1, order).flatten()


def take(found: Candidates, index: Tensor) -> Candidates:
    """Select candidates."""
    x, total, log_w = (v[index.to(v.device)] for v in (found.x, found.total, found.log_w))
    rewards = {k: v[index.to(v.device)] for k, v in found.rewards.items()}
    return Candidates(x, found.row[index], rewards, total, torch.zeros_like(log_w))


def mixed(old: Candidates, new: Candidates, index: Tensor) -> Candidates:
    """Select from both, ``old`` first."""
    rewards = {k: torch.cat([v, new.rewards[k]]) for k, v in old.rewards.items()}
    x, row, total, log_w = (torch.cat([getattr(c, n) for c in (old, new)]) for n in ("x", "row", "total", "log_w"))
    return take(Candidates(x, row, rewards, total, log_w), index)


def better(old: Candidates | None, new: Candidates) -> tuple[Candidates, Tensor]:
    """Return one candidate per search, the better of the two, and where the new one won, ``(R,)`` on the CPU."""
    if old is None:
        return new, torch.ones(len(new.row), dtype=torch.bool)
    won = (new.total > old.total).cpu()
    return mixed(old, new, torch.arange(len(won)) + won * len(won)), won
