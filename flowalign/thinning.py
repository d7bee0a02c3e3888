"""Which of an iteration's transitions are trained: random steps per sample, the best and worst samples, live groups.

On a tree a sample's steps are those of all its ancestors; a step that several samples share stays while one of them is
kept, and is trained once, with the credit that it had in the whole tree.

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

__all__ = [
    "Thin",
    "best_siblings",
    "chain",
    "compared",
    "credited",
    "extremes",
    "live_groups",
    "pruned",
    "random_steps",
    "with_best",
]

Thin = Callable[[Transitions, Experience], Transitions]
Leaves = Callable[[Experience], Tensor]  # which leaves are kept, (N_leaves,) booleans on the CPU


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


def pruned(keep: Leaves) -> Thin:
    """Keep the steps that lead to a leaf which ``keep`` chooses."""

    def thin(steps: Transitions, e: Experience) -> Transitions:
        lineage, chosen, child = e.trajectory.lineage(), keep(e), _child(steps)
        kept = torch.zeros(len(steps), dtype=torch.bool)
        for level in steps.level.unique().tolist():
            line = lineage[level + 1][chosen]
            alive = torch.zeros(len(e.trajectory.at(level + 1)), dtype=torch.bool)
            alive[line[line >= 0]] = True
            here = steps.level == level
            kept[here] = alive[child[here]]
        return steps[kept.nonzero().flatten()]

    return thin


def extremes(best: int, worst: int) -> Thin:
    """Keep the best and worst samples of each group (DanceGRPO's best-of-N: 8 of 24; BranchGRPO's 2nd width rule)."""

    def keep(e: Experience) -> Tensor:
        leaves = e.trajectory.leaves
        group, total = e.group[leaves.row], e.total.detach().cpu()
        kept = torch.zeros(len(leaves), dtype=torch.bool)
        for g in group.unique().tolist():
            members = (group == g).nonzero().flatten()
            order = members[total[members].argsort(descending=True, stable=True)]
            kept[order[:best]] = True
            kept[order[len(order) - worst :]] = True
        return kept

    return pruned(keep)


def best_siblings(e: Experience) -> Tensor:
    """Choose the best leaf below each node of the last split (BranchGRPO's first width rule); all where none splits."""
    tree, total = e.trajectory, e.total.detach().cpu()
    parents = torch.arange(len(tree.leaves))
    for k in range(len(tree.levels) - 1, tree.first, -1):
        parent = tree.at(k).parent
        if len(parent.unique()) < len(parent):
            parents = tree.lineage()[k - 1]
            break
    kept = torch.zeros(len(parents), dtype=torch.bool)
    for p in parents.unique().tolist():
        members = (parents == p).nonzero().flatten()
        kept[members[total[members].argmax()]] = True
    return kept


def credited(steps: Transitions, e: Experience) -> Transitions:
    """Drop the steps whose credit is 0: samples that a method chose not to train on (B²-DiffuRL's other siblings).

    None may be left. Not for a loss with a penalty, which trains on steps without credit too.
    """
    return steps[(_size(steps) > 0).nonzero().flatten()]


def compared(steps: Transitions, e: Experience) -> Transitions:
    """Drop the steps into nodes that are alone in their group at their level: a tree before its first split.

    A credit normalised among the nodes of a group at one level is 0 there by construction, whatever the rewards. A
    credit of another making that is not 0 there stays.
    """
    kept = _size(steps) > 0
    for level in steps.level.unique().tolist():
        size = torch.bincount(e.group[e.trajectory.at(level + 1).row], minlength=int(e.group.max()) + 1)
        here = steps.level == level
        kept[here] |= size[e.group[steps.row[here]]] > 1
    return steps[kept.nonzero().flatten()]


def live_groups(steps: Transitions, e: Experience) -> Transitions:
    """Drop the steps of groups without any credit: they would only dilute the mean (dynamic filtering).

    None may be left: an iteration in which no group has variance has nothing to teach, and costs no update.
    """
    group = e.group[steps.row]
    alive = torch.zeros(int(group.max()) + 1).index_add(0, group, _size(steps).float()) > 0
    return steps[alive[group].nonzero().flatten()]


def with_best(steps: Transitions, e: Experience) -> Transitions:
    """Let the best leaf of each group teach the steps that led to it (LayerTuning-RL).

    Not the others: where they are, the end that the network should expect is not that of another branch. Taught to
    every step of its group, the best leaf turns what x̂0 says into a mean of pictures.
    """
    leaves, lineage, child = e.trajectory.leaves, e.trajectory.lineage(), _child(steps)
    group, total = e.group[leaves.row], e.total.detach().cpu()
    best = torch.zeros(int(group.max()) + 1, dtype=torch.long)
    for g in group.unique().tolist():
        members = (group == g).nonzero().flatten()
        best[g] = members[total[members].argmax()]
    teacher = best[e.group[steps.row]]
    taught = torch.zeros(len(steps), dtype=torch.bool)
    for level in steps.level.unique().tolist():
        here = steps.level == level
        taught[here] = lineage[level + 1][teacher[here]] == child[here]
    return Transitions(**{**vars(steps), "target": pick(leaves.x.detach(), teacher), "taught": taught})


def _child(steps: Transitions) -> Tensor:
    if steps.child is None:
        raise ValueError("these transitions do not say which sample they belong to; take them from a trajectory.")
    return steps.child


def _size(steps: Transitions) -> Tensor:
    """Return the sum of each step's absolute credits, ``(M,)`` on the CPU."""
    assert steps.weight is not None
    return steps.weight.detach().abs().reshape(len(steps), -1).sum(1).cpu()
