"""Which of an iteration's transitions are trained: random steps per sample, the best and worst samples, live groups.

Each is a function ``(transitions, experience) → transitions``; ``chain`` composes them. What is random is drawn from
the iteration's seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowalign.experience import Experience
from flowalign.noise import mix
from flowalign.trajectory import Transitions, pick

__all__ = ["Thin", "chain", "extremes", "live_groups", "random_steps", "with_best"]

Thin = Callable[[Transitions, Experience], Transitions]


def chain(*parts: Thin) -> Thin:
    """Apply one after the other."""

    def thin(steps: Transitions, e: Experience) -> Transitions:
        for part in parts:
            steps = part(steps, e)
        return steps

    return thin


def random_steps(fraction: float) -> Thin:
    """Keep a random fraction of each sample's steps, another choice for each sample (DanceGRPO: .6)."""

    def thin(steps: Transitions, e: Experience) -> Transitions:
        child = _child(steps)
        g = torch.Generator().manual_seed(mix(e.seed, e.iteration, 400))
        key = torch.rand(len(steps), generator=g, dtype=torch.float64)
        # rank of each step among those of its sample
        order = torch.argsort(child.double() + key, stable=True)
        counts = torch.bincount(child)
        first = torch.cumsum(counts, 0) - counts
        rank = torch.empty_like(child)
        rank[order] = torch.arange(len(child)) - first[child[order]]
        return steps[(rank < (fraction * counts[child]).round().clamp_min(1)).nonzero().flatten()]

    return thin


def extremes(best: int, worst: int) -> Thin:
    """Keep the steps of the best and worst samples of each group (DanceGRPO's best-of-N: 8 of 24)."""

    def thin(steps: Transitions, e: Experience) -> Transitions:
        leaves = e.trajectory.leaves
        group, total = e.group[leaves.row], e.total.detach().cpu()
        kept = torch.zeros(len(leaves), dtype=torch.bool)
        for g in group.unique().tolist():
            members = (group == g).nonzero().flatten()
            order = members[total[members].argsort(descending=True, stable=True)]
            kept[order[:best]] = True
            kept[order[len(order) - worst :]] = True
        return steps[kept[_child(steps)].nonzero().flatten()]

    return thin


def live_groups(steps: Transitions, e: Experience) -> Transitions:
    """Drop the steps of groups without any credit: they would only dilute the mean (dynamic filtering).

    None may be left: an iteration in which no group has variance has nothing to teach, and costs no update.
    """
    assert steps.weight is not None
    size = steps.weight.detach().abs().reshape(len(steps), -1).sum(1).cpu()
    group = e.group[steps.row]
    alive = torch.zeros(int(group.max()) + 1).index_add(0, group, size.float()) > 0
    return steps[alive[group].nonzero().flatten()]


def with_best(steps: Transitions, e: Experience) -> Transitions:
    """Attach to each step the best leaf of its group as a supervised target (LayerTuning-RL)."""
    leaves = e.trajectory.leaves
    group, total = e.group[leaves.row], e.total.detach().cpu()
    best = torch.zeros(int(group.max()) + 1, dtype=torch.long)
    for g in group.unique().tolist():
        members = (group == g).nonzero().flatten()
        best[g] = members[total[members].argmax()]
    target = pick(leaves.x.detach(), best[e.group[steps.row]])
    return Transitions(**{**vars(steps), "target": target})


def _child(steps: Transitions) -> Tensor:
    if steps.child is None:
        raise ValueError("these transitions do not say which sample they belong to; take them from a trajectory.")
    return steps.child
