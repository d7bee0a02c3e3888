"""A search on a closed-form world: Gaussian data of any shape, a reward of the state, everything counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flowalign.ledger import Ledger
from flowalign.methods.base import Task
from flowalign.policy import Policy
from flowalign.source import Draw
from tests.toy import ToyCondition
from tests.worlds import F64, Normal


@dataclass
class Judge:
    """Rewards by name as functions of states and prompt rows; remembers what it was asked."""

    rewards: dict[str, Callable[[Tensor, Tensor], Tensor]]
    cond: ToyCondition
    ledger: Ledger
    weights: dict[str, float] = field(default_factory=dict)
    differentiable: bool = True
    asked: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        card = SimpleNamespace(card=SimpleNamespace(differentiable=self.differentiable))
        self.prompts = list(self.cond.prompts)
        self.scorer = SimpleNamespace(
            weights={n: self.weights.get(n, 1.0) for n in self.rewards}, differentiable=self.differentiable,
            rewards=dict.fromkeys(self.rewards, card), ledger=self.ledger,
        )  # fmt: skip

    def __call__(self, x0: Tensor, row: Tensor) -> dict[str, Tensor]:
        self.ledger.rewards += len(x0)
        scores = {n: r(x0, row) for n, r in self.rewards.items()}
        total = torch.stack([self.scorer.weights[n] * s for n, s in scores.items()]).sum(0)
        self.asked.append((total.detach(), row))
        return scores

    def total(self, x0: Tensor, row: Tensor) -> Tensor:
        return torch.stack([self.scorer.weights[n] * s for n, s in self(x0, row).items()]).sum(0)


def task(
    reward: Callable[[Tensor, Tensor], Tensor] | dict[str, Callable[[Tensor, Tensor], Tensor]],
    prompts: int = 1,
    samples: int = 1,
    *,
    world: Normal | None = None,
    shape: tuple[int, ...] = (3, 2, 2),
    steps: int = 8,
    seed: int = 0,
    **judge: Any,
) -> Task:
    """Return a task on a Gaussian world whose noise at t = 1 is standard."""
    world = world or Normal(0.5, 0.8)
    names = tuple(f"p{i}" for i in range(prompts))
    policy = Policy(world)
    draw = Draw(
        list(names), [{}] * prompts, torch.arange(prompts), tuple(range(prompts)), torch.full((prompts,), samples)
    )
    pipeline = SimpleNamespace(
        shape=lambda c: shape, start=lambda z, t, c: z.double(),
        times=lambda n: torch.linspace(1, 0, n + 1, dtype=F64), process=world.process,
    )  # fmt: skip
    rewards = reward if isinstance(reward, dict) else {"r": reward}
    made = Judge(rewards, ToyCondition(names), policy.ledger, **judge)
    return Task(pipeline, policy, made, draw, pipeline.times(steps), seed)  # type: ignore[arg-type]


def slope(shape: tuple[int, ...] = (3, 2, 2)) -> Tensor:
    """A direction to climb."""
    return torch.linspace(-1, 1.5, int(torch.tensor(shape).prod()), dtype=F64).reshape(shape)


def linear(x: Tensor, row: Tensor) -> Tensor:
    """``h · x``, the other way for odd prompts."""
    sign = torch.where(row % 2 == 0, 1.0, -1.0).to(x)
    return sign * (x * slope(tuple(x.shape[1:])).to(x)).flatten(1).sum(1)
