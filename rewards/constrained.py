"""Maximise one reward while others stay above a bound: a Lagrangian whose multipliers learn.

    score = r + Σ_i λ_i (c_i − b_i),        λ_i ← clip(λ_i − η · mean(c_i − b_i), 0, λ_max)   after each batch

A multiplier grows while its constraint is broken and falls to zero once it holds with room to spare. Multipliers
change only in :meth:`Constrained.step`, which the training loop (not an evaluation) calls, and are saved by
``state_dict``: a resumed run goes on with the same ones.

Reference: Moskovitz et al., Confronting reward model overoptimization with constrained RLHF (2310.04373).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.protocols import Meta, Reward
from flowalign.rewards.composite import Composite

__all__ = ["Constrained", "Constraint"]


@dataclass(frozen=True)
class Constraint:
    """``mean(reward) ≥ bound``; for an upper bound, negate both.

    Attributes:
        reward: what is bounded.
        bound: its least acceptable mean.
        rate: η, the multiplier's step per unit of violation.
        start: λ at the start.
        limit: λ_max.
    """

    reward: Reward
    bound: float
    rate: float = 0.1
    start: float = 0.0
    limit: float = 100.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bound) and self.rate > 0 and 0 <= self.start <= self.limit):
            raise ValueError(
                f"a constraint wants a finite bound, rate > 0 and 0 ≤ start ≤ limit; got bound {self.bound}, rate "
                f"{self.rate}, start {self.start}, limit {self.limit}."
            )


class Constrained(Composite):
    """The Lagrangian of ``objective`` under ``constraints``.

    Attributes:
        multipliers: ``(C,)`` λ, a buffer.
        slack: ``(C,)`` the last batch's ``mean(c_i − b_i)``, negative where broken; NaN before the first batch.
    """

    multipliers: Tensor
    slack: Tensor

    def __init__(self, objective: Reward, constraints: Sequence[Constraint]) -> None:
        if not constraints:
            raise ValueError("Constrained needs at least one constraint.")
        names = ", ".join(f"{c.reward.card.name} ≥ {c.bound:g}" for c in constraints)
        low, high = objective.card.range
        for c in constraints:
            low += min(0.0, c.limit * (c.reward.card.range[0] - c.bound))
            high += max(0.0, c.limit * (c.reward.card.range[1] - c.bound))
        name = f"{objective.card.name} subject to {names}"
        super().__init__([objective, *(c.reward for c in constraints)], name, (low, high))
        self.constraints = tuple(constraints)
        self.register_buffer("multipliers", torch.tensor([c.start for c in constraints], dtype=torch.float64))
        self.register_buffer("slack", torch.full((len(constraints),), torch.nan, dtype=torch.float64))

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the Lagrangian and remember the slack."""
        total, slack = scores[0], []
        for c, multiplier, score in zip(self.constraints, self.multipliers.tolist(), scores[1:], strict=True):
            total = total + multiplier * (score - c.bound)
            slack.append((score.detach().double() - c.bound).mean())
        self.slack.copy_(torch.stack(slack))
        return total

    def parts(self, media: Tensor, prompts: Sequence[str], meta: Meta | None = None) -> dict[str, Tensor]:
        """Return the parts, and each multiplier for the log."""
        found = super().parts(media, prompts, meta)
        for c, multiplier in zip(self.constraints, self.multipliers, strict=True):
            found[f"lambda/{c.reward.card.name}"] = multiplier.expand(len(media)).float()
        return found

    @torch.no_grad()
    def step(self) -> None:
        """Move the multipliers by the last batch's slack.

        Raises:
            RuntimeError: nothing has been scored since the last step.
        """
        if self.slack.isnan().any():
            raise RuntimeError("Constrained.step() needs a batch scored since the last step.")
        for i, c in enumerate(self.constraints):
            self.multipliers[i] = (self.multipliers[i] - c.rate * self.slack[i]).clamp(0.0, c.limit)
        self.slack.fill_(torch.nan)
