"""Transformations of scores, and the ensemble of all ensembles, the soft minimum.

Standardising with *frozen* statistics matters: running ones drift with the policy and hide its progress. Correlated
members (PickScore and HPS are both CLIP-H) make an ensemble too sure of itself.

    soft_min_β(r) = −β log mean_i exp(−r_i / β)        β → ∞ mean, β → 0 min, mean − var/2β to second order
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.protocols import Meta, Reward, check_scores
from flowalign.rewards.base import Unjudged
from flowalign.rewards.composite import Composite, Memo

__all__ = ["Clip", "LogSigmoid", "Masked", "SoftMin", "Standardise", "Substitute", "soft_min"]


class Clip(Composite):
    """``min(max(r, low), high)``; no gradient outside: a reward that is good enough stops pulling."""

    def __init__(self, member: Reward, low: float = -math.inf, high: float = math.inf) -> None:
        if not low < high:
            raise ValueError(f"wanted low < high; got {low}, {high}.")
        a, b = member.card.range
        super().__init__([member], f"clip({member.card.name})", (min(max(a, low), high), max(min(b, high), low)))
        self.low, self.high = low, high

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the clipped score."""
        return scores[0].clamp(self.low, self.high)


class Standardise(Composite):
    """``(r − mean) / std`` with statistics of the base model, frozen.

    Args:
        member: the reward.
        mean: of the member's scores on the base model's samples.
        std: their standard deviation, positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, member: Reward, mean: float, std: float) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(
                f"standardising {member.card.name!r} wants a finite mean and a positive std; got {mean}, {std}. A std "
                "of zero means that the base model's samples all score the same: nothing can be learned from them."
            )
        low, high = ((v - mean) / std for v in member.card.range)
        super().__init__([member], f"z({member.card.name})", (low, high))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64))

    @classmethod
    def fit(cls, member: Reward, scores: Float[Tensor, "n"]) -> Standardise:
        """Take the statistics from ``scores`` ``(N,)`` of the base model; two at least, not all equal."""
        if scores.ndim != 1 or len(scores) < 2:
            raise ValueError(f"wanted at least two scores (N,) of the base model; got {tuple(scores.shape)}.")
        check_scores(scores, len(scores), member.card.name)
        return cls(member, scores.double().mean().item(), scores.double().std().item())

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the standardised score."""
        return (scores[0] - self.mean.to(scores[0])) / self.std.to(scores[0])


class LogSigmoid(Composite):
    """``log σ((r − reference) / temperature)``: what is below the reference weighs, what is above it saturates.

    The sum of several is the log-probability that all are better than their references.
    """

    def __init__(self, member: Reward, reference: float = 0.0, temperature: float = 1.0) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature must be positive; got {temperature}.")
        ends = torch.tensor([(v - reference) / temperature for v in member.card.range], dtype=torch.float64)
        low, high = nn.functional.logsigmoid(ends).tolist()
        super().__init__([member], f"logsigmoid({member.card.name})", (low, high))
        self.reference, self.temperature = reference, temperature

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the log-sigmoid."""
        return nn.functional.logsigmoid((scores[0] - self.reference) / self.temperature)


def soft_min(scores: Float[Tensor, "m b"], beta: float) -> Float[Tensor, "b"]:
    """Return ``−β log mean_m exp(−r_m / β)``; the mean at β = ∞, the minimum at β = 0."""
    if beta == math.inf:
        return scores.mean(0)
    if beta == 0:
        return scores.amin(0)
    return -beta * (torch.logsumexp(-scores / beta, 0) - math.log(len(scores)))


class SoftMin(Composite):
    """An ensemble, pessimistic by ``beta``: members should be standardised first.

    Args:
        members: two rewards or more.
        beta: ∞ for the mean, 0 for the worst case; ``1 / (2λ)`` is ``mean − λ·var`` to second order.
    """

    def __init__(self, members: Sequence[Reward], beta: float) -> None:
        if not beta >= 0:
            raise ValueError(f"beta must be 0 (min) to inf (mean); got {beta}.")
        low, high = min(m.card.range[0] for m in members), max(m.card.range[1] for m in members)
        super().__init__(members, f"softmin({', '.join(m.card.name for m in members)})", (low, high))
        self.beta = beta

    @classmethod
    def uncertainty_weighted(cls, members: Sequence[Reward], coefficient: float) -> SoftMin:
        """Return the soft-min that is ``mean − coefficient · variance`` to second order."""
        if coefficient < 0:
            raise ValueError(f"the coefficient of the variance must not be negative; got {coefficient}.")
        return cls(members, math.inf if coefficient == 0 else 1 / (2 * coefficient))

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the soft minimum over members."""
        return soft_min(torch.stack(scores), self.beta)


class Masked(Composite):
    """``member``, with samples that cannot be judged left out of the lesson.

    Each of them gets the mean score of the judged samples of its prompt, or of all where none of its prompt is judged:
    in a group that compares its members its advantage is zero, and it moves nobody else's mean.
    """

    def __init__(self, member: Reward) -> None:
        super().__init__([member], member.card.name, member.card.range)

    def evaluate(self, media: Tensor, prompts: Sequence[str], meta: Meta | None, memo: Memo) -> Tensor:
        """Score the member; fill in the means where it cannot judge.

        Raises:
            Unjudged: no sample at all can be judged.
        """
        try:
            return super().evaluate(media, prompts, meta, memo)
        except Unjudged as error:
            known = [i for i in range(len(prompts)) if i not in error.reasons]
            if not known:
                raise
            scores, everyone = error.scores.to(media.device).clone(), error.scores[known].mean()
            for i in error.reasons:
                mine = [j for j in known if prompts[j] == prompts[i]]
                scores[i] = error.scores[mine].mean() if mine else everyone
            return scores

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the member's scores."""
        return scores[0]


class Substitute(Composite):
    """``member``, and ``value`` for samples that cannot be judged: the user's own choice, never a default."""

    def __init__(self, member: Reward, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"the value for samples that cannot be judged must be finite; got {value}.")
        low, high = member.card.range
        super().__init__([member], member.card.name, (min(low, value), max(high, value)))
        self.value = value

    def evaluate(self, media: Tensor, prompts: Sequence[str], meta: Meta | None, memo: Memo) -> Tensor:
        """Score the member; fill in the value where it cannot judge."""
        try:
            return super().evaluate(media, prompts, meta, memo)
        except Unjudged as error:
            missing = torch.tensor(sorted(error.reasons))
            return error.scores.to(media.device).index_fill(0, missing.to(media.device), self.value)

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the member's scores."""
        return scores[0]
