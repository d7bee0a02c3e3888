"""DiffusionNFT: reinforcement on the forward process (Zheng et al. 2509.16117).

Samples of the old policy are re-noised. With the optimality ``r = ½ + ½ clip(A / A_max, -1, 1)``, the implicit positive
and negative policies ``v⁺ = β v + (1-β) v_old``, ``v⁻ = (1+β) v_old - β v`` are both pulled to the data:

    L = r ‖x̂0(v⁺) - x0‖² / w⁺ + (1-r) ‖x̂0(v⁻) - x0‖² / w⁻      w = mean |x̂0 - x0| (no gradient)

No log-probability, any solver, no guidance. Where v = v_old the two residuals coincide and the loss is reward-weighted
regression: the old policy must lag.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from flowalign.batches import Leaves, TimeLaw
from flowalign.objectives.base import Losses, Objective, Wants, summary
from flowalign.policy import Policy

__all__ = ["DiffusionNFT"]


class DiffusionNFT(Objective):
    """The contrastive forward-process loss; one term per reward, to be summed or harmonised (MARBLE).

    Args:
        beta: mixing of the implicit policies (1, or .1).
        limit: ``A_max``; advantages are divided by it and clipped to ±1.
        kl: weight of ``mean (v - v_ref)²``.
        times: where samples are re-noised.
    """

    wants: ClassVar[Wants] = "leaves"

    def __init__(self, beta: float = 1.0, limit: float = 5.0, kl: float = 1e-4, times: TimeLaw | None = None) -> None:
        super().__init__()
        if beta <= 0 or limit <= 0:
            raise ValueError(f"beta and limit must be positive; got {beta} and {limit}.")
        self.beta, self.limit, self.kl = beta, limit, kl
        self.times = times or TimeLaw()

    @property
    def roles(self) -> tuple[str, ...]:
        """The old policy, and the reference where the penalty is on."""
        return ("old", "reference") if self.kl else ("old",)

    def forward(self, policy: Policy, batch: Leaves, cond: Any = None) -> Losses:
        """Return one loss per reward column, and the penalty."""
        known = None if cond is None else cond[batch.row]
        x = batch.noised(policy.process)
        new = policy.posterior(x, batch.t, known)
        old = policy.posterior(x, batch.t, known, "old")
        b = self.beta
        # x0 is affine in v at fixed (x, t), so mixing predictions of x0 is mixing velocities
        positive = _residual(b * new.x0 + (1 - b) * old.x0, batch.x0)
        negative = _residual((1 + b) * old.x0 - b * new.x0, batch.x0)
        share = 0.5 + 0.5 * (batch.weight / self.limit).clamp(-1, 1)
        columns = share.reshape(len(batch), -1).to(positive)
        terms = {
            f"nft/{name}": ((r * positive + (1 - r) * negative) / b).mean() * self.limit
            for name, r in zip(batch.names, columns.T, strict=True)
        }
        drift = ((new.velocity - old.velocity) ** 2).flatten(1).mean(1)
        metrics = {"positive": summary(positive), "negative": summary(negative), "lag": summary(drift)}
        if self.kl:
            ref = policy.posterior(x, batch.t, known, "reference")
            gap = ((new.velocity - ref.velocity) ** 2).flatten(1).mean(1)
            terms["kl"] = self.kl * gap.mean()
            metrics["kl"] = summary(gap)
        return Losses(terms, metrics)


def _residual(pred: Tensor, x0: Tensor) -> Tensor:
    """Return ``mean (pred - x0)² / sg(mean |pred - x0|)`` per sample."""
    error = (pred - x0.to(pred)).flatten(1)
    with torch.no_grad():
        w = error.abs().mean(1).clamp_min(1e-5)
    return (error**2).mean(1) / w
