"""A state of a search tree, its soft value, and the chances with which walks go on from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign.gaussian import Gaussian

__all__ = ["Node", "pick", "shares", "soft_mean"]


@dataclass(slots=True, eq=False)
class Node:
    """A visited state.

    Attributes:
        level: -1 for the dummy root above the initial noise.
        value: soft value, in units of the reward.
        visits: rollouts that went through it.
        children: in the order in which they were made.
        x: the state; None for the root, and where it was forgotten.
        law: of the next step; None at data time.
        x0: posterior mean, where it is kept.
        look: reward of the posterior mean, once it was asked for.
    """

    level: int
    value: float = -math.inf
    visits: int = 0
    children: list[Node] = field(default_factory=list)
    x: Tensor | None = None
    law: Gaussian | None = None
    x0: Tensor | None = None
    look: float | None = None

    @property
    def living(self) -> list[Node]:
        """Children whose states are still there."""
        return [c for c in self.children if c.x is not None]

    @property
    def final(self) -> bool:
        """Whether a further child would be a copy: data, or a step without noise."""
        return self.level >= 0 and (self.law is None or not bool((self.law.std > 0).any()))

    def bytes(self) -> int:
        """Return the size of what it keeps."""
        kept = [self.x, self.x0, *([self.law.mean, self.law.std] if self.law is not None else [])]
        return sum(z.numel() * z.element_size() for z in kept if z is not None)

    def forget(self) -> int:
        """Drop the states of the subtree; return the bytes freed."""
        freed = sum(c.forget() for c in self.children) + self.bytes()
        self.children, self.x, self.law, self.x0 = [], None, None, None
        return freed


def soft_mean(values: list[float], scale: float) -> float:
    """Return ``(1/λ) log mean exp(λ v)``."""
    top = max(values)
    return top + math.log(sum(math.exp(scale * (v - top)) for v in values) / len(values)) / scale


def shares(nodes: list[Node], scale: float) -> list[float]:
    """Return the chances of a walk, ``softmax(λ v)``."""
    top = max((n.value for n in nodes), default=0.0)
    w = [math.exp(scale * (n.value - top)) for n in nodes]
    return [x / sum(w) for x in w]


def pick(nodes: list[Node], chances: list[float], generator: torch.Generator) -> Node:
    """Draw a node."""
    u = float(torch.rand((), generator=generator, dtype=torch.float64)) * sum(chances)
    for node, p in zip(nodes, chances, strict=True):
        u -= p
        if u < 0:
            return node
    return nodes[-1]
