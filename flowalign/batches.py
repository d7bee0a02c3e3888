"""What objectives train on, besides :class:`~flowalign.trajectory.Transitions`.

Whatever is random in a loss, the time and the noise of a re-noised sample, is drawn when the batch is made, from the
iteration's seed: an objective is then a function of its batch, and a resumed run repeats it bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.experience import Experience
from flowalign.noise import mix
from flowalign.process import Process
from flowalign.trajectory import Transitions, pick

__all__ = ["Leaves", "Pairs", "Paths", "TimeLaw", "leaves", "pairs", "paths"]


@dataclass(frozen=True)
class TimeLaw:
    """Where re-noised samples are placed: stratified uniform on ``[low, high]``, or logit-normal inside it.

    Attributes:
        low: earliest time.
        high: latest time.
        logit_normal: draw ``sigmoid(N(0, 1))`` (SD3's training law) instead of uniform.
    """

    low: float = 0.0
    high: float = 1.0
    logit_normal: bool = False

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        """Return ``(n,)`` float64 times, one in each of n strata, shuffled."""
        u = (torch.randperm(n, generator=g) + torch.rand(n, generator=g, dtype=torch.float64)) / n
        if self.logit_normal:
            u = torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
        return self.low + (self.high - self.low) * u


@dataclass(frozen=True)
class Leaves:
    """Clean samples to be re-noised.

    Attributes:
        x0: ``(M, *)``.
        row: ``(M,)``.
        weight: advantage ``(M,)``, or ``(M, R)`` with one column per reward.
        t: ``(M,)`` times.
        noise: ``(M, *)``.
        names: of the columns of ``weight``.
    """

    x0: Tensor
    row: Tensor
    weight: Tensor
    t: Tensor
    noise: Tensor
    names: tuple[str, ...] = ("reward",)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.row)

    def __getitem__(self, index: Tensor) -> Leaves:
        """Select samples."""
        return Leaves(**{k: v if k == "names" else pick(v, index) for k, v in vars(self).items()})

    def noised(self, process: Process) -> Tensor:
        """Return ``x_t``."""
        return process.diffuse(self.x0, self.t, self.noise)


@dataclass(frozen=True)
class Pairs:
    """Preferred and rejected samples of one prompt, re-noised with one shared time and noise.

    Attributes:
        win, lose: ``(M, *)`` clean states.
        row: ``(M,)``.
        weight: of the pair, ``(M,)``.
        t: ``(M,)``.
        noise: ``(M, *)``.
    """

    win: Tensor
    lose: Tensor
    row: Tensor
    weight: Tensor
    t: Tensor
    noise: Tensor

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.row)

    def __getitem__(self, index: Tensor) -> Pairs:
        """Select pairs."""
        return Pairs(**{k: pick(v, index) for k, v in vars(self).items()})


@dataclass(frozen=True)
class Paths:
    """Whole lineages for balance losses.

    Attributes:
        steps: all transitions of the lineages, grouped by ``path``.
        path: lineage of each transition, ``(M,)``.
        reward: of each lineage, ``(P,)``.
        row: of each lineage, ``(P,)``.
        total: number of stochastic steps of a full lineage; a subset of them is rescaled by ``total / kept``.
        dice: of each transition, ``(M,)`` uniforms by which a loss picks its subset of steps; None where it takes all.
    """

    steps: Transitions
    path: Tensor
    reward: Tensor
    row: Tensor
    total: int
    dice: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of lineages."""
        return len(self.row)

    def __getitem__(self, index: Tensor) -> Paths:
        """Select lineages, with all their transitions."""
        new = torch.full((len(self),), -1)
        new[index] = torch.arange(len(index))
        kept = (new[self.path] >= 0).nonzero().flatten()
        dice = None if self.dice is None else self.dice[kept]
        path, reward = new[self.path[kept]], pick(self.reward, index)
        return Paths(self.steps[kept], path, reward, self.row[index], self.total, dice)


def _generator(experience: Experience, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(experience.seed, experience.iteration, purpose))


def _noise_like(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=g).to(x)


def leaves(
    experience: Experience, weight: Tensor, law: TimeLaw, update: int = 0, names: tuple[str, ...] = ("reward",)
) -> Leaves:
    """Return the leaves of a rollout with fresh times and noises for an update.

    Args:
        experience: what was gathered.
        weight: ``(N,)`` or ``(N, R)``.
        law: of the times.
        update: number of the pass over the leaves: each pass draws anew.
        names: of the columns of ``weight``.
    """
    nodes, g = experience.trajectory.leaves, _generator(experience, 100 + update)
    x0 = nodes.x.detach()
    return Leaves(x0, nodes.row, weight.detach(), law.draw(len(nodes), g), _noise_like(x0, g), names)


def pairs(experience: Experience, law: TimeLaw, per_group: int = 1, update: int = 0) -> Pairs:
    """Return the best against the worst of each group (then second best against second worst, ...).

    Pairs of equal reward carry no preference and are left out.

    Raises:
        ValueError: if no group has two different rewards.
    """
    e, nodes = experience, experience.trajectory.leaves
    group, reward = e.group[nodes.row], e.total.detach().cpu()
    best, worst = [], []
    for g_id in group.unique().tolist():
        members = (group == g_id).nonzero().flatten()
        order = members[reward[members].argsort(descending=True, stable=True)]
        for i in range(min(per_group, len(order) // 2)):
            a, b = int(order[i]), int(order[-1 - i])
            if reward[a] > reward[b]:
                best.append(a)
                worst.append(b)
    if not best:
        raise ValueError("no group holds two samples of different reward: there is no preference to learn from.")
    w, lo, g = torch.tensor(best), torch.tensor(worst), _generator(e, 200 + update)
    x = nodes.x.detach()
    gap = (e.total[w.to(e.total.device)] - e.total[lo.to(e.total.device)]).detach()
    win = pick(x, w)
    return Pairs(win, pick(x, lo), nodes.row[w], gap, law.draw(len(w), g), _noise_like(win, g))


def paths(experience: Experience, weights: Any = None, update: int = 0, levels: Collection[int] | None = None) -> Paths:
    """Return the lineages of the leaves of a chain rollout, for balance losses.

    Args:
        experience: what was gathered.
        weights: credit per level, handed on with the transitions; None for none.
        update: number of the pass over the lineages: each pass throws its dice anew.
        levels: of the steps; all when None.

    Raises:
        ValueError: for a rollout that branches.
    """
    tree = experience.trajectory
    steps = tree.transitions(weights, None if levels is None else lambda k, t, s: k in levels)
    n = len(tree.leaves)
    if len(steps) % n:
        raise ValueError("balance losses follow chains; this trajectory branches or was resampled.")
    path = torch.arange(n).repeat(len(steps) // n)
    dice = torch.rand(len(steps), generator=_generator(experience, 600 + update), dtype=torch.float64)
    return Paths(steps, path, experience.total.detach(), tree.leaves.row, len(steps) // n, dice)
