"""Every rollout is a genealogy.

``parent`` maps the nodes of level k+1 to those of level k: the identity is a chain, ``repeat_interleave`` a tree, a
resampled index a particle system. GRPO groups, branch trees, beams and Feynman-Kac particles are one ``Trajectory``;
credit flows back along it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowalign.nodes import Nodes, pick, ranks, row_lse

__all__ = ["Nodes", "Trajectory", "Transitions", "pick", "ranks", "row_lse"]

Reduce = Literal["mean", "max"]


@dataclass(frozen=True)
class Transitions:
    """Steps taken, flat over levels, for minibatches of an objective.

    Attributes:
        x, x_next: states before and after, ``(M, *)``.
        t, s: their times ``(M,)``, float64 on the CPU.
        row: ``(M,)``.
        level: the level stepped from, ``(M,)``.
        log_prob: log-density of the step when it was taken, ``(M,)``.
        weight: advantage or other credit of the step, ``(M,)`` or state-shaped.
        mean: the law's mean when the step was taken, where it was kept.
        carry: the kernel's memory before the step.
        child: index of the node stepped to, at its level, ``(M,)``.
        target: clean states ``(M, *)`` that a supervised term pulls to, where a method has one.
        taught: which steps it pulls, ``(M,)`` booleans; all where None.
        parent: index of the node stepped from, at its level, ``(M,)``; None where nobody knows.
    """

    x: Tensor
    x_next: Tensor
    t: Tensor
    s: Tensor
    row: Tensor
    level: Tensor
    log_prob: Tensor
    weight: Tensor | None = None
    mean: Tensor | None = None
    carry: Any = None
    child: Tensor | None = None
    target: Tensor | None = None
    taught: Tensor | None = None
    parent: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.row)

    def sources(self) -> tuple[Tensor, Tensor] | None:
        """Return the first step from each node ``(P,)`` and the number of each step's node in it ``(M,)``.

        Siblings step from one state, about which the network need be asked once. None where all steps are from
        different nodes, or nobody knows.
        """
        if self.parent is None or not len(self):
            return None
        key, inverse = torch.unique(self.level * (int(self.parent.max()) + 1) + self.parent, return_inverse=True)
        if len(key) == len(self):
            return None
        first = torch.full((len(key),), len(self)).scatter_reduce(0, inverse, torch.arange(len(self)), "amin")
        return first, inverse

    def __getitem__(self, index: Tensor) -> Transitions:
        """Select steps."""
        return Transitions(**{k: pick(v, index) for k, v in vars(self).items()})


@dataclass(frozen=True)
class Trajectory:
    """A genealogy over ``K + 1`` times.

    Attributes:
        times: ``(K + 1,)`` falling float64.
        levels: nodes by level; None before the first entry.
        log_z: log normalising constant gathered at resamplings, ``(n_rows,)``; see :meth:`log_evidence`.
    """

    times: Tensor
    levels: tuple[Nodes | None, ...]
    log_z: Tensor

    @property
    def leaves(self) -> Nodes:
        """The nodes of the last level."""
        return self.at(len(self.levels) - 1)

    @property
    def first(self) -> int:
        """The first level that has nodes."""
        return next(k for k, n in enumerate(self.levels) if n is not None)

    @property
    def n_rows(self) -> int:
        """The number of rows (prompts)."""
        return len(self.log_z)

    def at(self, level: int) -> Nodes:
        """Return the nodes of a level.

        Raises:
            IndexError: if nothing has entered by then.
        """
        nodes = self.levels[level]
        if nodes is None:
            raise IndexError(f"level {level} has no nodes; the first level with any is {self.first}.")
        return nodes

    def log_evidence(self) -> Tensor:
        """Return ``log Ẑ`` per row: resampling constants plus the log-mean of the weights still carried."""
        leaves = self.leaves
        count = torch.bincount(leaves.row, minlength=self.n_rows).to(leaves.log_w)
        return self.log_z.to(leaves.log_w) + row_lse(leaves.log_w, leaves.row, self.n_rows) - count.log()

    def weights(self) -> Tensor:
        """Return the leaves' weights, normalised to sum to one in each row, ``(N,)``."""
        leaves = self.leaves
        total = row_lse(leaves.log_w, leaves.row, self.n_rows)
        return (leaves.log_w - total[leaves.row.to(total.device)]).exp()

    def lineage(self) -> list[Tensor]:
        """Return for each level the index of each leaf's ancestor there, ``(N_leaves,)``, -1 before its entry."""
        index = torch.arange(len(self.leaves))
        out = [index]
        for k in range(len(self.levels) - 1, self.first, -1):
            parent = self.at(k).parent
            index = torch.where(index >= 0, parent[index.clamp_min(0)], index)
            out.append(index)
        out += [torch.full_like(index, -1)] * self.first
        return out[::-1]

    def backup(self, values: Tensor, how: Reduce | float = "mean") -> list[Tensor | None]:
        """Carry leaf values ``(N_leaves,)`` back along the genealogy, level by level.

        Args:
            values: of the leaves.
            how: ``"mean"`` over all descendant leaves, ``"max"`` over them, or a number λ for the soft (Bellman) value
                ``(1/λ) log mean_children exp(λ V)`` of Diffusion Tree Sampling.

        Returns:
            One ``(N_k,)`` tensor per level (None before the first). A node without descendants has NaN: nobody knows
            its value, and nobody may average it in.
        """
        out: list[Tensor | None] = [None] * len(self.levels)
        out[-1] = values
        count = torch.ones_like(values)
        for k in range(len(self.levels) - 1, self.first, -1):
            child, n = self.at(k), len(self.at(k - 1))
            kept = child.parent >= 0
            known = kept.to(values.device) & ~torch.isnan(values)
            parent = child.parent.to(values.device)[known]
            v, c = values[known], count[known]
            values, count = _reduce(v, c, parent, n, how)
            out[k - 1] = values
        return out

    def transitions(
        self,
        weights: Sequence[Tensor | None] | None = None,
        where: Callable[[int, float, float], bool] | None = None,
    ) -> Transitions:
        """Flatten the steps taken into one batch.

        Args:
            weights: credit per level: entry k holds ``(N_k, ...)``, the credit of the step *into* each node of level k.
                Steps into nodes without descendants, whose credit is NaN, are left out.
            where: ``(level, t, s) → bool``: which steps to keep; all by default.

        Raises:
            ValueError: if no step is left, e.g. when a kernel without noise left nothing to train on.
        """
        parts = []
        times = self.times.tolist()
        for k in range(self.first, len(self.levels) - 1):
            a, b = self.at(k), self.at(k + 1)
            w = None if weights is None else weights[k + 1]
            if weights is not None and w is None:
                continue
            kept = ((b.parent >= 0) & self._credited(k + 1, w)).nonzero().flatten()
            if not len(kept) or (where is not None and not where(k, times[k], times[k + 1])):
                continue
            parent, n = b.parent[kept], len(kept)
            parts.append(
                Transitions(
                    x=pick(a.x, parent),
                    x_next=pick(b.x, kept),
                    t=self.times[k].expand(n),
                    s=self.times[k + 1].expand(n),
                    row=b.row[kept],
                    level=torch.full((n,), k),
                    log_prob=pick(b.log_prob, kept),
                    weight=pick(w, kept),
                    mean=None if a.step is None else pick(a.step.mean, parent),
                    carry=pick(a.carry, parent),
                    child=kept,
                    parent=parent,
                )
            )
        if not parts:
            raise ValueError(
                "no step of this rollout can be trained on: the kernel drew no noise at any selected level. Use a "
                "stochastic kernel, or widen the window of trained steps."
            )
        return _concat(parts)

    def _credited(self, level: int, weight: Tensor | None) -> Tensor:
        """Return which nodes have a credit: not those that died out and whose credit is NaN since nobody knows it."""
        n = len(self.at(level))
        if weight is None:
            return torch.ones(n, dtype=torch.bool)
        alive = torch.zeros(n, dtype=torch.bool)
        line = self.lineage()[level]
        alive[line[line >= 0]] = True
        return alive | ~torch.isnan(weight.detach()).reshape(n, -1).any(1).cpu()

    def graft(self, other: Trajectory) -> Trajectory:
        """Return this genealogy with another one, grown from its nodes, joined on: a search tree grows in batches.

        Entries of ``other`` hang on the node of the level before that their ``origin`` names.
        """
        levels: list[Nodes | None] = []
        for k, (a, b) in enumerate(zip(self.levels, other.levels, strict=True)):
            if a is None or b is None:
                levels.append(a if b is None else b)
                continue
            before = self.levels[k - 1] if k else None
            shift = 0 if before is None else len(before)
            parent = torch.where(b.parent >= 0, b.parent + shift, b.origin)
            levels.append(a.join(replace(b, parent=parent)))
        return Trajectory(self.times, tuple(levels), self.log_z)


def _reduce(v: Tensor, count: Tensor, parent: Tensor, n: int, how: Reduce | float) -> tuple[Tensor, Tensor]:
    total = v.new_zeros(n).index_add(0, parent, count)
    nan = v.new_full((n,), torch.nan)
    if how == "mean":
        out = v.new_zeros(n).index_add(0, parent, v * count) / total
    elif how == "max":
        out = v.new_full((n,), -torch.inf).scatter_reduce(0, parent, v, "amax")
    else:
        lam = float(how)
        children = v.new_zeros(n).index_add(0, parent, torch.ones_like(v))
        out = (row_lse(lam * v, parent, n) - children.log()) / lam
    return torch.where(total > 0, out, nan), total


def _concat(parts: list[Transitions]) -> Transitions:
    def cat(items: list[Any]) -> Any:
        if any(i is None for i in items):
            return None
        if isinstance(items[0], Tensor):
            return torch.cat(items)
        return tuple(cat(list(group)) for group in zip(*items, strict=True))

    return Transitions(**{k: cat([getattr(p, k) for p in parts]) for k in vars(parts[0])})
