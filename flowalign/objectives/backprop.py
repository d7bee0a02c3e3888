"""Reward backpropagation: DRaFT, DRaFT-K, AlignProp, ReFL's cousins on one taped rollout.

    L = -mean r(x0(θ))    through the last K steps, the decoder and the reward

``ceiling`` is ReFL's ``relu(τ - r)``: a sample that is good enough gives no more gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowalign.objectives.base import Losses, Objective, Wants, summary
from flowalign.policy import Policy
from flowalign.trajectory import Trajectory

__all__ = ["Backprop", "Grown"]


@dataclass(frozen=True)
class Grown:
    """A taped rollout with its rewards, graph and all.

    Attributes:
        trajectory: the rollout.
        rewards: by name, ``(N,)``.
        total: the weighted sum, ``(N,)``.
    """

    trajectory: Trajectory
    rewards: dict[str, Tensor]
    total: Tensor

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.total)


class Backprop(Objective):
    """Maximise a differentiable reward by its gradient.

    Args:
        ceiling: reward above which a sample gives no gradient; None for none.
        kl: weight of ``mean (v - v_ref)²`` at the taped states.
    """

    wants: ClassVar[Wants] = "grown"

    def __init__(self, ceiling: float | None = None, kl: float = 0.0) -> None:
        super().__init__()
        self.ceiling, self.kl = ceiling, kl

    @property
    def roles(self) -> tuple[str, ...]:
        """The reference, where the penalty is on."""
        return ("reference",) if self.kl else ()

    def forward(self, policy: Policy, batch: Grown, cond: Any = None) -> Losses:
        """Return the reward loss and the penalty.

        Raises:
            ValueError: if the reward gives no gradient.
        """
        if not batch.total.requires_grad:
            raise ValueError(
                "backpropagation needs a differentiable reward, and this one returned scores without a graph. Use "
                "Flow-GRPO or DiffusionNFT for it, or a reward whose card says differentiable."
            )
        loss = -batch.total if self.ceiling is None else torch.relu(self.ceiling - batch.total)
        terms = {"reward": loss.mean()}
        if self.kl:
            terms["kl"] = self.kl * self._penalty(policy, batch.trajectory, cond)
        return Losses(terms, {"reward": summary(batch.total)})

    def _penalty(self, policy: Policy, tree: Trajectory, cond: Any) -> Tensor:
        gaps = []
        for k, t in enumerate(tree.times.tolist()[:-1]):
            nodes = tree.levels[k]
            if nodes is None or nodes.posterior is None or not nodes.posterior.x0.requires_grad:
                continue
            ref = policy.posterior(nodes.x.detach(), t, None if cond is None else cond[nodes.row], "reference")
            gaps.append(((nodes.posterior.velocity - ref.velocity) ** 2).mean())
        if not gaps:
            raise ValueError("the penalty needs the taped posteriors: run the rollout with keep=True.")
        return torch.stack(gaps).mean()
