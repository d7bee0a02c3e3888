"""What a search found: its results, best first or weighted, decoded to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowalign.genealogy import evidence_error
from flowalign.ledger import Ledger
from flowalign.methods.base import Candidates, Steering
from flowalign.scorer import Bound
from flowalign.trajectory import Trajectory
from flowalign.watch import Look

__all__ = ["SearchFailed", "Steered", "join", "settle"]


@dataclass(frozen=True)
class Steered:
    """What a search found.

    Attributes:
        media: ``(M, ...)``, best first within each prompt.
        row: prompt of each, ``(M,)``.
        rewards: by name, ``(M,)``.
        total: the weighted reward, ``(M,)``.
        weights: of each result within its prompt; they sum to one.
        candidates: mean reward of everything drawn, per prompt ``(P,)``: what no search would have had.
        ledger: what it cost.
        log_z: ``log Ẑ`` of each prompt, ``(P,)``; None where the method estimates none.
        log_z_error: its standard error from the genealogy; None likewise.
        ess: effective sample size of the results' weights, ``(P,)``.
        looks: every call of the judge: reward against what was spent.
        trajectory: the genealogy, where the method kept one.
        stopped: ``finished``, or ``budget`` where that ended the search.
        partial: whether no round was finished, so that the results are the best that was looked at.
    """

    media: Tensor
    row: Tensor
    rewards: dict[str, Tensor]
    total: Tensor
    weights: Tensor
    candidates: Tensor
    ledger: Ledger
    log_z: Tensor | None = None
    log_z_error: Tensor | None = None
    ess: Tensor | None = None
    looks: Sequence[Look] = ()
    trajectory: Trajectory | None = None
    stopped: Literal["finished", "budget"] = "finished"
    partial: bool = False


class SearchFailed(ValueError):
    """A search that broke after it had found something.

    Attributes:
        found: the results until then.
    """

    def __init__(self, message: str, found: Steered) -> None:
        super().__init__(message)
        self.found = found


def join(rounds: list[Candidates]) -> Candidates:
    """Return the candidates of all rounds as one; genealogy and evidence are the last round's."""
    rewards = {k: torch.cat([r.rewards[k] for r in rounds]) for k in rounds[0].rewards}
    x, row, total, log_w = (torch.cat([getattr(r, k) for r in rounds]) for k in ("x", "row", "total", "log_w"))
    return Candidates(x, row, rewards, total, log_w, rounds[-1].trajectory, rounds[-1].log_z)


def settle(
    method: Steering | None,
    found: Candidates,
    judge: Bound,
    samples: Tensor,
    ledger: Ledger,
    looks: Sequence[Look],
    stopped: Literal["finished", "budget"],
) -> Steered:
    """Keep the best ``samples`` of each prompt, or all of the last round; decode them. No method: bare looks."""
    total = found.total.detach().cpu()
    best = method is None or method.results == "best"
    chosen = []
    for prompt, wanted in enumerate(samples.tolist()):
        mine = (found.row == prompt).nonzero().flatten()
        order = mine[total[mine].argsort(descending=True, stable=True)]
        chosen.append(order[:wanted] if best else order)
    index = torch.cat(chosen)
    row = found.row[index]
    log_w = torch.zeros(len(index)) if best else found.log_w.cpu()[index].float()
    weights = torch.cat([log_w[row == r].softmax(0) for r in row.unique()])
    mean = torch.stack([total[found.row == r].mean() for r in range(len(samples))])
    size = torch.stack([1 / (weights[row == r] ** 2).sum() for r in range(len(samples))])
    with torch.no_grad():
        media = judge.media(found.x[index.to(found.x.device)], row)
    rewards = {k: v.detach().cpu()[index] for k, v in found.rewards.items()}
    tree, log_z = found.trajectory, found.log_z
    weighted = tree is not None and log_z is not None and len(log_z) == tree.n_rows and bool(tree.leaves.log_w.any())
    return Steered(
        media, row, rewards, total[index], weights, mean, ledger, None if log_z is None else log_z.detach().cpu(),
        evidence_error(tree) if weighted and tree is not None else None, size, tuple(looks), tree, stopped,
        method is None,
    )  # fmt: skip
