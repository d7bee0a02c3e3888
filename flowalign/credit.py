"""Credit: from rewards of leaves to the weight of every step.

A credit maps an :class:`~flowalign.experience.Experience` to one ``(N_k,)`` tensor per level: entry k is the credit of
the step *into* each node of level k, which is also where a state-shaped credit, the lean adjoint ``a_{k+1}``, belongs.

The papers silently mix the normalisations; here each is named (``Normalise``): Flow-GRPO centres by group and scales by
the whole batch (population std + 1e-4), DanceGRPO, MixGRPO and G²RPO scale by group (unbiased std + 1e-8).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.experience import Experience
from flowalign.state import Stateful
from flowalign.trajectory import Trajectory, row_lse

__all__ = ["Credit", "Edges", "Gains", "Group", "Levels", "Normalise", "Tree", "group_mean", "likely"]

Levels = list[Tensor | None]
Scope = Literal["group", "batch", "none"]


def group_mean(values: Tensor, group: Tensor, n: int) -> Tensor:
    """Return the mean of each group, ``(n,)``; 0 for an empty group.

    It lies between the smallest and the largest value in spite of round-off: equal values have exactly that mean.
    """
    group = group.to(values.device)
    count = torch.bincount(group, minlength=n).to(values).clamp_min(1)
    mean = values.new_zeros(n).index_add(0, group, values) / count
    low = values.new_full((n,), torch.inf).scatter_reduce(0, group, values, "amin")
    high = values.new_full((n,), -torch.inf).scatter_reduce(0, group, values, "amax")
    return torch.where(low <= high, mean.clamp(low, high), mean)


@dataclass(frozen=True)
class Normalise:
    """``clamp((r - mean) / (std + eps), ±clamp)``.

    Attributes:
        center: scope of the mean.
        scale: scope of the std; ``none`` leaves the deviations as they are.
        unbiased: divide the sum of squares by n - 1.
        eps: added to the std.
        clamp: bound of the result; None for no bound.
        least: a group whose std is below this gets exactly 0: what is round-off of a mean is no advantage.
    """

    center: Scope = "group"
    scale: Scope = "group"
    unbiased: bool = False
    eps: float = 1e-4
    clamp: float | None = 5.0
    least: float = 0.0

    def __call__(self, values: Tensor, group: Tensor, batch: Tensor | None = None) -> Tensor:
        """Normalise ``values (N,)`` within ``group (N,)``; a group without variance gets exactly 0.

        Args:
            values: of the samples; NaN marks one whose value nobody knows: it stays NaN and counts for nothing.
            group: of each sample.
            batch: values of the whole batch where other processes hold parts of it.
        """
        batch = values if batch is None else batch
        known, batch = ~torch.isnan(values), batch[~torch.isnan(batch)]
        if not known.all():
            out = values.clone()
            if known.any():
                out[known] = self(values[known], group.to(values.device)[known], batch)
            return out
        group = group.to(values.device)
        n = int(group.max()) + 1
        mean = {
            "group": lambda: group_mean(values, group, n)[group],
            "batch": lambda: batch.mean().clamp(batch.min(), batch.max()),
            "none": lambda: values.new_zeros(()),
        }[self.center]()
        out = values - mean
        if self.scale == "group":
            std = self._group_std(values, group, n)[group]
            out = torch.where(std < self.least, 0.0, out / (std + self.eps))
        elif self.scale == "batch":
            out = out / (batch.std(correction=int(self.unbiased and len(batch) > 1)) + self.eps)
        return out if self.clamp is None else out.clamp(-self.clamp, self.clamp)

    def _group_std(self, values: Tensor, group: Tensor, n: int) -> Tensor:
        count = torch.bincount(group, minlength=n).to(values)
        square = (values - group_mean(values, group, n)[group]) ** 2
        total = values.new_zeros(n).index_add(0, group, square)
        return (total / (count - int(self.unbiased)).clamp_min(1)).sqrt()


class Credit(Stateful, ABC):
    """Credits every step of a rollout. ``differentiates``: it takes the reward's gradient, through the network."""

    differentiates: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, experience: Experience) -> Levels:
        """Return the credit of the step into each node, by level; None for a level that earns none."""


@dataclass(frozen=True)
class Group(Credit):
    """The leaf's advantage in its group, given to every step that led there.

    Attributes:
        normalise: how.
        per_reward: normalise each reward on its own, then sum with the weights (GDPO, MixGRPO's ``advantage_aggr``),
            instead of normalising the weighted sum.
    """

    normalise: Normalise = field(default_factory=Normalise)
    per_reward: bool = False

    def leaves(self, experience: Experience) -> Tensor:
        """Return the advantage of each leaf."""
        e = experience
        group = e.group[e.trajectory.leaves.row]
        if not self.per_reward:
            return self.normalise(e.total, group, e.gather(e.total))
        parts = [e.weights[name] * self.normalise(r, group, e.gather(r)) for name, r in e.rewards.items()]
        return torch.stack(parts).sum(0)

    def __call__(self, experience: Experience) -> Levels:
        """Carry the leaves' advantages back: a node has the mean over its descendants."""
        return experience.trajectory.backup(self.leaves(experience))


@dataclass(frozen=True)
class Tree(Credit):
    """Node values backed up from the leaves' rewards, normalised within each depth (BranchGRPO, Dynamic-TreeRPO).

    Attributes:
        normalise: within the nodes of one group at one depth.
        how: ``"mean"`` over leaves, or ``"probability"``: siblings by their likelihood (``tree_prob_weighted``).
    """

    normalise: Normalise = field(default_factory=lambda: Normalise(unbiased=True, eps=1e-8, least=1e-6))
    how: Literal["mean", "probability"] = "mean"

    def __call__(self, experience: Experience) -> Levels:
        """Back up, then normalise level by level."""
        e = experience
        out: Levels = []
        values = likely(e.trajectory, e.total) if self.how == "probability" else e.trajectory.backup(e.total)
        for nodes, value in zip(e.trajectory.levels, values, strict=True):
            out.append(None if nodes is None or value is None else self.normalise(value, e.group[nodes.row]))
        return out


@dataclass(frozen=True)
class Edges(Credit):
    """TreeGRPO (2512.08153): the leaves' advantages in their group, backed up by likelihood to an advantage per edge.

    What is backed up stays as it is: an early edge, whose leaves disagree, counts for less than a late one. ``Tree``
    backs up rewards instead and brings every depth to the same spread.

    Attributes:
        normalise: within the leaves of one group.
    """

    normalise: Normalise = field(default_factory=lambda: Normalise(unbiased=True, eps=1e-8, least=1e-6))

    def __call__(self, experience: Experience) -> Levels:
        """Normalise, then back up."""
        e = experience
        return likely(e.trajectory, self.normalise(e.total, e.group[e.trajectory.leaves.row]))


def likely(tree: Trajectory, values: Tensor) -> Levels:
    """Back up leaf values ``(N_leaves,)``, siblings weighted by the softmax of their log-densities per dimension."""
    out: Levels = [None] * len(tree.levels)
    out[-1] = value = values
    for k in range(len(tree.levels) - 1, tree.first, -1):
        child, n = tree.at(k), len(tree.at(k - 1))
        score = child.log_prob.to(value) / child.x[0].numel()
        share = (score - row_lse(score, child.parent, n)[child.parent.to(score.device)]).exp()
        value = value.new_zeros(n).index_add(0, child.parent.to(value.device), share * value)
        out[k - 1] = value
    return out


@dataclass(frozen=True)
class Gains(Credit):
    """DenseGRPO: the credit of a step is how much it raised the reward of the ODE completion (2601.20218, eq. 6-8).

    ``ΔR_k = R(ODE(x_{k+1})) - R(ODE(x_k))``, normalised in the group at each step.

    Attributes:
        normalise: per step within the group.
        steps: ODE steps of a completion; None for all remaining ones (best in the paper), run as one staircase.
    """

    normalise: Normalise = field(default_factory=Normalise)
    steps: int | None = None

    def gains(self, experience: Experience) -> list[Tensor]:
        """Return the raw gain of each step of each chain, ``K`` tensors ``(N,)``."""
        rewards = experience.completions(self.steps)
        tree = experience.trajectory
        return [b - a[tree.at(k + 1).parent] for k, (a, b) in enumerate(pairwise(rewards))]

    def __call__(self, experience: Experience) -> Levels:
        """Normalise each step's gains."""
        e = experience
        out: Levels = [None]
        for k, gain in enumerate(self.gains(e)):
            out.append(self.normalise(gain, e.group[e.trajectory.at(k + 1).row]))
        return out
