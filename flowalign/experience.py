"""One iteration's experience: a genealogy, its media's rewards, and the means to ask for more.

Everything a credit, an objective's batch or a learner may need, gathered by the training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowalign.kernels import EulerMaruyama, Kernel, Windowed
from flowalign.laws import Ode
from flowalign.noise import Noise
from flowalign.policy import Policy
from flowalign.rollout import rollout
from flowalign.trajectory import Nodes, Trajectory

__all__ = ["Experience", "complete", "completions", "ode_from", "weighted"]

Scores = Callable[[Tensor, Tensor], Mapping[str, Tensor]]  # (x0 states, row) -> rewards by name
ODE = EulerMaruyama()


def weighted(rewards: Mapping[str, Tensor], weights: Mapping[str, float], ceiling: float | None = None) -> Tensor:
    """Return the weighted sum of rewards ``(B,)``, cut at ``ceiling``: what is good enough counts no more, no less."""
    total = torch.stack([weights[k] * r for k, r in rewards.items()]).sum(0)
    return total if ceiling is None else total.clamp_max(ceiling)


def ode_from(kernel: Kernel, times: Tensor) -> int:
    """Return the first level from which on every step of a kernel is the ODE's Euler step; the last level for none.

    Args:
        kernel: of a rollout.
        times: ``(K + 1,)`` of it.
    """
    grid = times.tolist()
    level = len(grid) - 1
    for t, s in reversed(list(pairwise(grid))):
        step = kernel
        while isinstance(step, Windowed):
            step = step.inside if step.window(t, s) else step.outside
        if not (isinstance(step, EulerMaruyama) and isinstance(step.law, Ode)):
            break
        level -= 1
    return level


def completions(
    policy: Policy,
    trajectory: Trajectory,
    cond: Any = None,
    *,
    kernel: Kernel = ODE,
    role: str = "current",
    stop: int | None = None,
) -> list[Tensor]:
    """Finish every node of every level by the remaining steps of a deterministic kernel, as one staircase.

    Level by level the completions already under way are joined by the nodes of that level: K network calls in sequence
    instead of K(K+1)/2.

    Args:
        policy: evaluated.
        trajectory: whose nodes.
        cond: by row.
        kernel: deterministic.
        role: whose weights.
        stop: a level from which on the trajectory is that kernel's own and each node has one child: its nodes lead to
            the leaves, and nothing is evaluated for them. None for the last level.

    Returns:
        The clean states ``(N_k, *)`` that the nodes of each level lead to; from ``stop`` on the leaves themselves.
    """
    first, last = trajectory.first, len(trajectory.levels) - 1
    stop = last if stop is None else stop
    leaves = [trajectory.leaves.x.detach()] * (last + 1 - max(stop, first))
    if stop <= first:
        return leaves
    nodes = {k: trajectory.at(k) for k in range(first, stop)}
    start = {k: Nodes.enter(n.x.detach(), n.row) for k, n in nodes.items()}
    ends = rollout(
        policy, kernel, trajectory.times, start, cond, noise=Noise(0), n_rows=trajectory.n_rows, role=role
    ).leaves.x
    return [*ends.split([len(n) for n in nodes.values()]), *leaves]


def complete(
    policy: Policy, x: Tensor, t: Tensor, cond: Any, steps: int, *, kernel: Kernel = ODE, role: str = "current"
) -> Tensor:
    """Finish states at their own times ``t (B,)`` in ``steps`` equal steps, all in one batch.

    Args:
        policy: a generator that takes per-sample times.
        x: ``(B, *)``.
        t: ``(B,)``; a state already at data time is returned as it is.
        cond: of each state.
        steps: network calls.
        kernel: deterministic, without memory.
        role: whose weights.
    """
    live = (t > 0).nonzero().flatten()
    if not len(live):
        return x
    part, cond = x[live.to(x.device)], None if cond is None else cond[live]
    with torch.no_grad():
        for i in range(steps):
            a, b = t[live] * (1 - i / steps), t[live] * (1 - (i + 1) / steps)
            part = kernel(part, policy.posterior(part, a, cond, role), a, b)[0].mean
    out = x.clone()
    out[live.to(x.device)] = part.to(out)
    return out


def same(values: Tensor) -> Tensor:
    """Return the values of the only process there is."""
    return values


@dataclass(frozen=True)
class Experience:
    """What one iteration gathered.

    Attributes:
        policy: the generator.
        trajectory: the rollout.
        cond: conditions by row.
        group: group of each row, ``(n_rows,)``; a group may hold several rows (textual variations of one prompt).
        rewards: by name, ``(N_leaves,)``.
        weights: weight of each reward.
        scores: judges further clean states.
        seed: of the iteration, for whatever is drawn later.
        iteration: number of the iteration.
        media: the decoded leaves, where they were kept.
        gather: joins per-sample values of all processes, for statistics of the whole batch.
        ceiling: at which the weighted sum is cut; None for none.
        ode: level from which on the rollout is the ODE of the current weights, unguided (see :func:`ode_from`); None
            where nobody knows.
    """

    policy: Policy
    trajectory: Trajectory
    cond: Any
    group: Tensor
    rewards: Mapping[str, Tensor]
    weights: Mapping[str, float]
    scores: Scores
    seed: int = 0
    iteration: int = 0
    media: Tensor | None = None
    gather: Callable[[Tensor], Tensor] = same
    ceiling: float | None = None
    ode: int | None = None
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> Tensor:
        """The weighted sum of the rewards, ``(N_leaves,)``."""
        return weighted(self.rewards, self.weights, self.ceiling)

    def judge(self, x0: Tensor, row: Tensor) -> Tensor:
        """Return the weighted reward of clean states, ``(B,)``."""
        return weighted(self.scores(x0, row), self.weights, self.ceiling)

    def completions(self, steps: int | None = None) -> list[Tensor]:
        """Return the reward of the ODE completion of every node, by level (computed once).

        Where the rollout itself goes on as the ODE, its own reward is the completion's: nothing is evaluated, decoded
        or judged again.

        Args:
            steps: ODE steps of each completion; None for all that remain.
        """
        if steps not in self.cache:
            tree = self.trajectory
            levels = range(tree.first, len(tree.levels))
            stop = max(self._settled() if steps is None else levels[-1], tree.first)
            nodes = [tree.at(k) for k in range(tree.first, stop)]
            values: list[Tensor] = []
            if nodes:
                ends = completions(self.policy, tree, self.cond, stop=stop) if steps is None else self._short(steps)
                with torch.no_grad():
                    value = self.judge(torch.cat(ends[: len(nodes)]), torch.cat([n.row for n in nodes]))
                values = list(value.split([len(n) for n in nodes]))
            self.cache[steps] = values + [self.total.detach()] * (len(levels) - len(nodes))
        return self.cache[steps]

    def _settled(self) -> int:
        """Return the first level from which on the rollout is the ODE and every node has one child, in order."""
        tree = self.trajectory
        level = last = len(tree.levels) - 1
        while level > max(last if self.ode is None else self.ode, tree.first):
            parent = tree.at(level).parent
            if len(parent) != len(tree.at(level - 1)) or not torch.equal(parent, torch.arange(len(parent))):
                break
            level -= 1
        return level

    def _short(self, steps: int) -> list[Tensor]:
        tree = self.trajectory
        nodes = [tree.at(k) for k in range(tree.first, len(tree.levels))]
        t = torch.cat([tree.times[tree.first + i].expand(len(n)) for i, n in enumerate(nodes)])
        row = torch.cat([n.row for n in nodes])
        known = None if self.cond is None else self.cond[row]
        ends = complete(self.policy, torch.cat([n.x.detach() for n in nodes]), t, known, steps)
        return list(ends.split([len(n) for n in nodes]))
