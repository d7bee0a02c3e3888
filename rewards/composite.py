"""A reward made of rewards: each distinct member is computed once per batch, however often it occurs.

Several rewards therefore share one decode and one forward pass each; :meth:`Composite.parts` returns the leaves' own
scores next to the total, for logs and for per-reward credit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from flowalign.learner import Learner, learners_of
from flowalign.protocols import Card, Meta, Modality, Reward, check_scores
from flowalign.rewards.base import Judge

__all__ = ["Composite", "Memo", "once"]

Memo = dict[int, Tensor]


class Composite(Judge):
    """A reward made of ``members``; subclasses say how their scores combine.

    Args:
        members: the rewards.
        name: for the card.
        bounds: the range of scores.
    """

    def __init__(self, members: Sequence[Reward], name: str, bounds: tuple[float, float]) -> None:
        super().__init__()
        if not members:
            raise ValueError(f"{type(self).__name__} needs at least one reward.")
        self.members = tuple(members)
        self.networks = nn.ModuleList(m for m in members if isinstance(m, nn.Module))  # so that .to() reaches them
        self.card = _card(self.members, name, bounds)
        self.freeze()

    @abstractmethod
    def combine(self, scores: list[Tensor]) -> Tensor:
        """Combine the members' ``(B,)`` scores into ``(B,)``."""

    def learners(self) -> tuple[Learner, ...]:
        """Return what learns in the members, at any depth."""
        return learners_of(self.members)

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Score each distinct member once and combine."""
        return self.evaluate(media, prompts, meta, {})

    def evaluate(self, media: Tensor, prompts: Sequence[str], meta: Meta | None, memo: Memo) -> Tensor:
        """Score with ``memo``, which holds the rewards already computed on this batch."""
        return self.combine([once(m, media, prompts, meta, memo) for m in self.members])

    def parts(self, media: Tensor, prompts: Sequence[str], meta: Meta | None = None) -> dict[str, Tensor]:
        """Return every leaf's own ``(B,)`` scores and the ``total``, each computed once; for logs and credit."""
        memo: Memo = {}
        total = self.evaluate(media, prompts, meta, memo)
        found: dict[str, Tensor] = {}
        for leaf in {id(m): m for m in leaves_of(self) if id(m) in memo}.values():
            name, count = leaf.card.name, 1
            while name in found:  # two judges may share a name: a model with two sets of weights
                count += 1
                name = f"{leaf.card.name}#{count}"
            found[name] = memo[id(leaf)]
        return {**found, "total": total}


def once(member: Reward, media: Tensor, prompts: Sequence[str], meta: Meta | None, memo: Memo) -> Tensor:
    """Return the member's ``(B,)`` scores, float32 at least, from ``memo`` if they are there."""
    if id(member) not in memo:
        if isinstance(member, Composite):
            scores = member.evaluate(media, prompts, meta, memo)
        else:
            scores = check_scores(member(media, prompts, meta), len(media), member.card.name)
        memo[id(member)] = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return memo[id(member)]


def leaves_of(reward: Reward) -> list[Reward]:
    if isinstance(reward, Composite):
        return [leaf for m in reward.members for leaf in leaves_of(m)]
    return [reward]


def _card(members: Sequence[Reward], name: str, bounds: tuple[float, float]) -> Card:
    cards = [m.card for m in members]
    shared = set(cards[0].modality).intersection(*(c.modality for c in cards))
    if not shared:
        raise ValueError(f"{name}: the rewards share no modality: {[(c.name, c.modality) for c in cards]}.")
    licences = dict.fromkeys(c.licence for c in cards if c.licence != "-")
    weights = dict.fromkeys(c.weights for c in cards if c.weights != "-")
    return Card(
        name,
        name,
        cast("tuple[Modality, ...]", tuple(m for m in cards[0].modality if m in shared)),
        all(c.differentiable for c in cards),
        bounds,
        "; ".join(licences) or "-",
        "; ".join(weights) or "-",
        min((c.text for c in cards if c.text is not None), default=None),
        "; ".join(dict.fromkeys(c.reference for c in cards if c.reference)),
        all(c.batch for c in cards),
    )
