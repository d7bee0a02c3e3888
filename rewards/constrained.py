"""Maximise one reward while others stay above a bound: a Lagrangian whose multipliers learn.

    score = r + Σ_i λ_i (c_i − b_i),        λ_i ← clip(λ_i − η · mean(c_i − b_i), 0, λ_max)   after each iteration

A multiplier grows while its constraint is broken and falls to zero once it holds with room to spare. The training loop
moves it once per iteration, by the mean over the iteration's samples of all processes, and saves it with the run
(:class:`Multipliers`). Whatever else is scored, in searches or evaluations, moves nothing.

Reference: Moskovitz et al., Confronting reward model overoptimization with constrained RLHF (2310.04373).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowalign.hearing import tell
from flowalign.learner import Learner
from flowalign.protocols import Meta, Reward
from flowalign.rewards.composite import Composite

__all__ = ["Constrained", "Constraint", "Multipliers"]


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
    """

    multipliers: Tensor

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
        self.dual = Multipliers(self)

    def learners(self) -> tuple[Learner, ...]:
        """Return the multipliers, after what learns in the members."""
        return (*super().learners(), self.dual)

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the Lagrangian, and tell the multipliers of the constraints' raw values ``(B, C)``."""
        total = scores[0]
        for c, multiplier, score in zip(self.constraints, self.multipliers.tolist(), scores[1:], strict=True):
            total = total + multiplier * (score - c.bound)
        tell(self.dual, torch.stack([s.detach() for s in scores[1:]], 1))
        return total

    def parts(self, media: Tensor, prompts: Sequence[str], meta: Meta | None = None) -> dict[str, Tensor]:
        """Return the parts, and each multiplier for the log."""
        found = super().parts(media, prompts, meta)
        for c, multiplier in zip(self.constraints, self.multipliers, strict=True):
            found[f"lambda/{c.reward.card.name}"] = multiplier.expand(len(media)).float()
        return found

    @torch.no_grad()
    def step(self, values: Float[Tensor, "n c"]) -> Float[Tensor, "c"]:
        """Move the multipliers by the mean slack of an iteration.

        Args:
            values: raw scores of the constraints, one row per sample of the iteration.

        Returns:
            The slack ``mean(c_i − b_i)``, negative where a constraint is broken.
        """
        bound = torch.tensor([c.bound for c in self.constraints], dtype=torch.float64)
        slack = values.detach().cpu().double().mean(0) - bound
        for i, c in enumerate(self.constraints):
            self.multipliers[i] = (self.multipliers[i] - c.rate * slack[i]).clamp(0.0, c.limit)
        return slack


class Multipliers(Learner):
    """What learns in a :class:`Constrained`: the training loop moves it once per iteration and saves it.

    Args:
        reward: whose multipliers.
    """

    def __init__(self, reward: Constrained) -> None:
        self.reward = reward

    def learn(self, heard: Sequence[Any], seed: int, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Take one step of dual ascent; return each multiplier and slack."""
        if not heard:
            return {}
        slack = self.reward.step(gather(torch.cat(list(heard))))
        found: dict[str, float] = {}
        for c, multiplier, room in zip(self.reward.constraints, self.reward.multipliers, slack, strict=True):
            name = c.reward.card.name
            found |= {f"lambda/{name}": float(multiplier), f"slack/{name}": float(room)}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the multipliers."""
        return {"multipliers": self.reward.multipliers.detach().cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            ValueError: for another number of constraints.
        """
        saved = state["multipliers"]
        if saved.shape != self.reward.multipliers.shape:
            raise ValueError(f"{len(saved)} multipliers were saved; this reward has {len(self.reward.constraints)}.")
        self.reward.multipliers.copy_(saved)
