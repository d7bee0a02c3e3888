"""Rewards made of rewards.

    Weighted      Σ w_i r_i                                  0.5 * PickScore() + Aesthetic()
    Product       Π r_i                                      OCR() * Aesthetic()
    Clip          min(max(r, low), high)
    Standardise   (r − μ) / σ, with μ, σ frozen on the base model's samples
    LogSigmoid    log σ((r − r_ref) / τ)                     saturates above the reference, linear below
    SoftMin       −β log mean_i exp(−r_i / β)                β → ∞ mean, β → 0 min, mean − var/2β to second order
    Constrained   r + Σ λ_i (c_i − b_i), λ_i ≥ 0 by dual ascent
    Substitute    a value of the user's for samples that cannot be judged;     Masked  leaves them out of the lesson
    MicroBatch    in pieces of n;      Cached  by content, without gradients

Every one is a reward again and all nest. A reward that occurs twice in one expression is computed once per call, so
several rewards share one decode and one forward pass; :meth:`Composite.parts` returns each one's own scores.

Standardising with *frozen* statistics matters: running ones drift with the policy and hide its progress. Correlated
members (PickScore and HPS are both CLIP-H) make an ensemble too sure of itself.

References: soft-min unifies mean, worst-case and uncertainty-weighted optimisation (Coste et al., 2310.02743;
2606.09073); log-sigmoid (Wang et al., 2402.00742); Lagrange multipliers (Moskovitz et al., 2310.04373).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.protocols import Reward
from flowalign.rewards.caching import Cached, MicroBatch
from flowalign.rewards.composite import Composite
from flowalign.rewards.constrained import Constrained, Constraint
from flowalign.rewards.function import Function, reward
from flowalign.rewards.transforms import Clip, LogSigmoid, Masked, SoftMin, Standardise, Substitute, soft_min

__all__ = [
    "Cached",
    "Clip",
    "Composite",
    "Constrained",
    "Constraint",
    "Function",
    "LogSigmoid",
    "Masked",
    "MicroBatch",
    "Product",
    "SoftMin",
    "Standardise",
    "Substitute",
    "Weighted",
    "add",
    "multiply",
    "reward",
    "scale",
    "soft_min",
]


class Weighted(Composite):
    """``Σ w_i r_i``.

    Args:
        members: the rewards.
        weights: one finite number each; negative ones penalise.
    """

    def __init__(self, members: Sequence[Reward], weights: Sequence[float]) -> None:
        if len(members) != len(weights) or not all(math.isfinite(w) for w in weights):
            raise ValueError(f"wanted one finite weight for each of {len(members)} rewards; got {list(weights)}.")
        ends = [sorted(w * r for r in m.card.range) for m, w in zip(members, weights, strict=True)]
        name = " + ".join(
            m.card.name if w == 1 else f"{w:g}*{m.card.name}" for m, w in zip(members, weights, strict=True)
        )
        super().__init__(members, name, (sum(e[0] for e in ends), sum(e[1] for e in ends)))
        self.weights = tuple(float(w) for w in weights)

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the weighted sum."""
        return torch.stack([w * s for w, s in zip(self.weights, scores, strict=True)]).sum(0)


class Product(Composite):
    """``Π r_i``: every member must be good; meant for scores that are not negative."""

    def __init__(self, members: Sequence[Reward]) -> None:
        low, high = 1.0, 1.0
        for m in members:
            ends = [a * b for a in (low, high) for b in m.card.range]
            low, high = min(ends), max(ends)
        super().__init__(
            members, " * ".join(f"({m.card.name})" if " " in m.card.name else m.card.name for m in members), (low, high)
        )

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the product."""
        return torch.stack(scores).prod(0)


def add(a: Reward, b: Reward) -> Weighted:
    """Return ``a + b``; sums of sums become one sum."""
    terms = [
        (m, w)
        for r in (a, b)
        for m, w in (zip(r.members, r.weights, strict=True) if isinstance(r, Weighted) else [(r, 1.0)])
    ]
    return Weighted([m for m, _ in terms], [w for _, w in terms])


def scale(reward: Reward, factor: float) -> Weighted:
    """Return ``factor · reward``."""
    if isinstance(reward, Weighted):
        return Weighted(reward.members, [factor * w for w in reward.weights])
    return Weighted([reward], [factor])


def multiply(a: Reward, b: Reward) -> Product:
    """Return ``a · b``."""
    return Product([m for r in (a, b) for m in (r.members if isinstance(r, Product) else (r,))])
