"""Losses that turn comparisons, verdicts and scores into rewards. Δ = r_a − r_b throughout.

    Bradley-Terry            P(a > b) = σ(Δ)
    with ties (BTT)          P(a > b) = σ(Δ − log k),   P(tie) = (k² − 1) σ(Δ − log k) σ(−Δ − log k),   k > 1
    win-tie (SoliReward)     win  −log σ(Δ),   tie  −log σ(Δ − m) − log σ(−Δ − m)
    Gaussian (HPSv3)         −log E[σ(z)],  z ~ N(μ_a − μ_b, σ_a² + σ_b²)

The tie term of SoliReward is BTT's with m = log k, but for the constant log(k² − 1); m = 0 pulls equals together the
hardest. SoliReward's data are single items labelled good or bad: every good one is paired with every bad one of the
batch *across prompts*, and items of equal label are ties.

References: Bradley & Terry 1952; Rao & Kupper 1967 (ties), VideoAlign (2501.13918); SoliReward (2512.22170).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["binary_pairs", "bradley_terry", "bradley_terry_ties", "gaussian_preference", "win_tie"]


def bradley_terry(
    a: Float[Tensor, "n"], b: Float[Tensor, "n"], label: Int[Tensor, "n"], margin: float = 0.0
) -> Float[Tensor, "n"]:
    """Return each pair's loss; ``label`` is +1 where a wins, −1 where b does; ties (0) contribute nothing."""
    return F.softplus(margin - label * (a - b)) * label.abs()


def bradley_terry_ties(
    a: Float[Tensor, "n"], b: Float[Tensor, "n"], label: Int[Tensor, "n"], k: float = 5.0
) -> Float[Tensor, "n"]:
    """Return ``−log P(label)`` of the Rao-Kupper model; the three outcomes' probabilities sum to one.

    Raises:
        ValueError: ``k ≤ 1``, which leaves ties no probability.
    """
    if k <= 1:
        raise ValueError(f"k must be above 1 (5 as published), or ties are impossible; got {k}.")
    log_k = math.log(k)
    win, lose = F.logsigmoid(a - b - log_k), F.logsigmoid(b - a - log_k)
    tie = win + lose + math.log(k**2 - 1)
    return -torch.where(label > 0, win, torch.where(label < 0, lose, tie))


def win_tie(
    a: Float[Tensor, "n"], b: Float[Tensor, "n"], label: Int[Tensor, "n"], margin: float = 0.0, tie_weight: float = 1.0
) -> Float[Tensor, "n"]:
    """Return SoliReward's loss: Bradley-Terry for wins, a pull together for ties, weighted."""
    gap = a - b
    tie = -F.logsigmoid(gap - margin) - F.logsigmoid(-gap - margin)
    return torch.where(label == 0, tie_weight * tie, F.softplus(-label * gap))


def gaussian_preference(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], label: Int[Tensor, "n"]
) -> Float[Tensor, "n"]:
    """Return ``−log P`` of the winner for Gaussians ``(μ, σ)``; ties contribute nothing."""
    from flowalign.rewards.hps3 import preference

    p = torch.where(label > 0, preference(a, b), preference(b, a))
    return -p.clamp_min(1e-12).log() * label.abs()


def binary_pairs(
    good: Tensor, generator: torch.Generator | None = None, ties: int | None = None
) -> tuple[Int[Tensor, "m"], Int[Tensor, "m"], Int[Tensor, "m"]]:
    """Pair single items by their verdicts, whatever their prompts.

    Args:
        good: ``(N,)`` bool.
        generator: draws which ties are kept.
        ties: how many pairs of equal label to keep; as many as there are wins if None.

    Returns:
        Indices a and b and labels: +1 for a good against a bad one, 0 for two of equal label.
    """
    yes, no = good.nonzero().flatten(), (~good).nonzero().flatten()
    a, b = (v.flatten() for v in torch.meshgrid(yes, no, indexing="ij"))
    same = torch.cat([torch.combinations(v, 2) for v in (yes, no)])
    keep = len(a) if ties is None else ties
    same = same[torch.randperm(len(same), generator=generator)[:keep]]
    label = torch.cat([torch.ones(len(a), dtype=torch.long), torch.zeros(len(same), dtype=torch.long)])
    return torch.cat([a, same[:, 0]]), torch.cat([b, same[:, 1]]), label
