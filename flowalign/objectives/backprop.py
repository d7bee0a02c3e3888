"""Reward backpropagation: DRaFT, DRaFT-K, AlignProp, ReFL's cousins on one taped rollout.

    L = -mean w r(x0(θ))    through the last K steps, the decoder and the reward;  w = 1 but where a method discounts

``ceiling`` is ReFL's ``relu(τ - r)``: a sample that is good enough gives no more gradient. The penalty is taken at the
visited states of the taped steps, held fixed, as the squared gap of velocities or as the KL of the step's law in nats:

    kl · mean_k mean (v_θ - v_ref)²(x_k)        or        kl · Σ_k KL( p_θ(· | x_k) ‖ p_ref(· | x_k) )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowalign.kernels import Kernel
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
        weight: of each sample's loss, ``(N,)``; None for 1.
    """

    trajectory: Trajectory
    rewards: dict[str, Tensor]
    total: Tensor
    weight: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.total)


class Backprop(Objective):
    """Maximise a differentiable reward by its gradient.

    Args:
        ceiling: reward above which a sample gives no gradient; None for none.
        kl: weight of the penalty.
        kernel: law of a step, for the penalty as a KL; None for the gap of velocities.
    """

    wants: ClassVar[Wants] = "grown"

    def __init__(self, ceiling: float | None = None, kl: float = 0.0, kernel: Kernel | None = None) -> None:
        super().__init__()
        self.ceiling, self.kl, self.kernel = ceiling, kl, kernel

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
        terms = {"reward": (loss if batch.weight is None else batch.weight.to(loss) * loss).mean()}
        if self.kl:
            terms["kl"] = self.kl * self._penalty(policy, batch.trajectory, cond)
        return Losses(terms, {"reward": summary(batch.total)})

    def _penalty(self, policy: Policy, tree: Trajectory, cond: Any) -> Tensor:
        gaps, times = [], tree.times.tolist()
        for k in range(tree.first, len(times) - 1):
            nodes = tree.at(k)
            if not tree.at(k + 1).x.requires_grad:
                continue
            x, known = nodes.x.detach(), None if cond is None else cond[nodes.row]
            # a state that itself has a graph would drag the penalty through the steps before: ask again at a fixed one
            fixed = nodes.posterior is not None and not nodes.x.requires_grad
            own = nodes.posterior if fixed else policy.posterior(x, times[k], known, checkpoint=True)
            ref = policy.posterior(x, times[k], known, "reference")
            assert own is not None
            if self.kernel is None:
                gaps.append(((own.velocity - ref.velocity) ** 2).mean())
            else:
                law, base = (self.kernel(x, p, times[k], times[k + 1], nodes.carry)[0] for p in (own, ref))
                gaps.append(law.kl(base).mean())
        if not gaps:
            raise ValueError("the penalty follows taped steps, and this batch has none in its trajectory.")
        return torch.stack(gaps).mean() if self.kernel is None else torch.stack(gaps).sum()
