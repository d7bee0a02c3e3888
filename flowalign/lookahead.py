"""Looking forward: what a state on the way promises, as the credit of flow-network losses.

    R̃_k(x) = λ γ_k r(x̂0(x)),    γ_k = α(t_k)^p,    at data time  R̃_K = λ r

A balance loss that knows R̃ at both ends of a step needs no finished sample to say what the step was worth (Pan et al.
2302.01687); what R̃ gets wrong is left to a learned residual flow, :class:`PromptedFlow`, which is 0 at data time.
Values are ``(N, 2)``, gradients ``(N, 2, *)``: of the state before the step and of the one after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.adjoint import reward_gradient
from flowalign.credit import Credit, Levels
from flowalign.experience import Experience
from flowalign.noise import mix
from flowalign.trajectory import Trajectory
from flowalign.valuenet import LatentValue, word_ids

__all__ = ["LookAhead", "LookAheadGradient", "PromptedFlow", "strata"]

Chosen = Callable[[int, int], Sequence[int]]  # (seed, iteration) -> levels stepped from


def strata(fraction: float, steps: int) -> Chosen:
    """Return which steps an iteration trains on: one drawn in each of ``fraction · steps`` equal strata."""
    count = max(1, round(fraction * steps))
    edges = [round(i * steps / count) for i in range(count + 1)]

    def chosen(seed: int, iteration: int) -> list[int]:
        g = torch.Generator().manual_seed(mix(seed, iteration, 420))
        return [int(torch.randint(a, b, (), generator=g)) for a, b in pairwise(edges)]

    return chosen


def _parent(tree: Trajectory, k: int) -> None:
    parent = tree.at(k).parent
    if len(parent) != len(tree.at(k - 1)) or (parent != torch.arange(len(parent))).any():
        raise ValueError("looking forward follows chains; this trajectory branches or was resampled.")


@dataclass(frozen=True)
class LookAhead(Credit):
    """Credits each step with ``(R̃_k, R̃_{k+1})``; gradients of nothing.

    Attributes:
        scale: λ.
        power: p; 2 is the published choice of ∇-GFlowNet ("squared").
    """

    scale: float = 1.0
    power: float = 2.0

    def __call__(self, experience: Experience) -> Levels:
        """Judge the posterior mean of every state that was visited; those kept by the rollout cost no network call."""
        e, tree = experience, experience.trajectory
        values = [self.at(e, k) for k in range(tree.first, len(tree.levels))]
        for k in range(tree.first + 1, len(tree.levels)):
            _parent(tree, k)
        pairs = [torch.stack([a, b.to(a)], 1) for a, b in pairwise(values)]
        return [*[None] * (tree.first + 1), *pairs]

    @torch.no_grad()
    def at(self, e: Experience, k: int) -> Tensor:
        """Return ``R̃_k`` of the nodes of a level, ``(N_k,)``."""
        tree, nodes = e.trajectory, e.trajectory.at(k)
        if k == len(tree.levels) - 1:
            return self.scale * e.total.detach()
        gain = self.scale * float(e.policy.process(tree.times[k])[0]) ** self.power
        if gain == 0:
            return torch.zeros_like(nodes.log_w)
        posterior = nodes.posterior
        if posterior is None:
            posterior = e.policy.posterior(nodes.x, float(tree.times[k]), None if e.cond is None else e.cond[nodes.row])
        return gain * e.judge(posterior.x0, nodes.row)


@dataclass(frozen=True)
class LookAheadGradient(Credit):
    """Credits each step with ``(∇R̃_k(x_k), ∇R̃_{k+1}(x_{k+1}))``, through the current network and the reward.

    Attributes:
        scale: λ.
        power: p.
        chosen: which steps; all when None. Each distinct level costs one vector-Jacobian product.
    """

    differentiates = True

    scale: float = 1.0
    power: float = 2.0
    chosen: Chosen | None = None

    def __call__(self, experience: Experience) -> Levels:
        """Differentiate at both ends of each chosen step."""
        e, tree = experience, experience.trajectory
        last = len(tree.levels) - 1
        steps = range(tree.first, last) if self.chosen is None else self.chosen(e.seed, e.iteration)
        known: dict[int, Tensor] = {}
        out: Levels = [None] * (last + 1)
        for k in steps:
            _parent(tree, k + 1)
            for j in (k, k + 1):
                if j not in known:
                    known[j] = self.at(e, j)
            out[k + 1] = torch.stack([known[k], known[k + 1].to(known[k])], 1)
        return out

    def at(self, e: Experience, k: int) -> Tensor:
        """Return ``∇R̃_k`` at the nodes of a level, ``(N_k, *)``."""
        tree, nodes = e.trajectory, e.trajectory.at(k)
        t = float(tree.times[k])
        if k == len(tree.levels) - 1:
            return self.scale * reward_gradient(e.judge, nodes.x, nodes.row)
        gain = self.scale * float(e.policy.process(t)[0]) ** self.power
        if gain == 0:
            return torch.zeros_like(nodes.x)
        known = None if e.cond is None else e.cond[nodes.row]
        e.policy.ledger.gradients += len(nodes)
        return gain * reward_gradient(
            lambda x, row: e.judge(e.policy.posterior(x, t, known).x0, row), nodes.x, nodes.row
        )


class PromptedFlow(nn.Module):
    """A residual log-flow ``F_φ(x, t, prompt)``; 0 before it has learnt anything.

    Args:
        shape: of one state.
        width: of the network.
    """

    def __init__(self, shape: Sequence[int], width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = LatentValue(shape, width)
        last = self.network.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, t: Tensor, row: Tensor, cond: Any) -> Tensor:
        """Return ``F (B,)`` of states ``(B, *)`` at times ``(B,)`` of rows of a condition."""
        words = word_ids([cond.prompts[r] for r in row.tolist()]).to(x.device)
        return self.network(x, t.to(x.device), words)
