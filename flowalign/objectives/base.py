"""What every objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flowalign.batches import TimeLaw
from flowalign.policy import Policy

__all__ = ["Losses", "Objective", "velocity_error"]

Wants = Literal["transitions", "leaves", "pairs", "paths", "grown"]


class Losses(NamedTuple):
    """Scalar losses by name, to be added or harmonised, and detached metrics by name."""

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


class Objective(nn.Module, ABC):
    """A loss over batches of one kind.

    Its own parameters (log Z, flow networks) are trained with the policy's. ``roles`` names the policy roles that it
    evaluates, so that the loop prepares them and no reference pass happens where none is used.

    Attributes:
        wants: what it trains on.
        shaped: whether something in it depends on the shape of a state; see prepare.
        paired: whether it compares two samples of a prompt: they then lie side by side in the order of minibatches.
        times: of re-noised samples.
    """

    wants: ClassVar[Wants]
    shaped: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    times: TimeLaw = TimeLaw()

    @property
    def roles(self) -> tuple[str, ...]:
        """The policy roles that the loss evaluates besides ``current``."""
        return ()

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Hear the shape of one state before training, and make what depends on it; asked where ``shaped``."""

    @abstractmethod
    def forward(self, policy: Policy, batch: Any, cond: Any = None) -> Losses:
        """Return the losses of a batch whose rows index ``cond``."""


def velocity_error(policy: Policy, x: Tensor, t: Tensor, target: Tensor, cond: Any, role: str = "current") -> Tensor:
    """Return ``mean_d (v(x, t) - target)²`` per sample, ``(B,)``."""
    v = policy.posterior(x, t, cond, role).velocity
    return ((v - target.to(v)) ** 2).flatten(1).mean(1)


def summary(x: Tensor) -> Tensor:
    """Return the detached mean: a metric must not hold the graph."""
    return torch.as_tensor(x).detach().float().mean()
