"""Preferences between samples: Diffusion-DPO on flows (Wallace et al. 2311.12908; Flow-DPO in 2501.13918).

    L = -log σ( -β/2 [ (‖v - u_w‖² - ‖v_ref - u_w‖²) - (‖v - u_l‖² - ‖v_ref - u_l‖²) ] )

with one time and one noise for both members of a pair, ``u = α̇ x0 + σ̇ ε`` and norms averaged over dimensions (β 100
online, 2,000-5,000 offline).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn.functional import logsigmoid

from flowalign.batches import Pairs, TimeLaw
from flowalign.gaussian import per_sample
from flowalign.objectives.base import Losses, Objective, Wants, summary, velocity_error
from flowalign.policy import Policy

__all__ = ["FlowDPO"]


class FlowDPO(Objective):
    """Preference loss on re-noised pairs.

    Args:
        beta: inverse temperature on the mean squared velocity error.
        times: where pairs are re-noised.
        weighted: weight each pair by its normalised reward gap (DP²O-SR's intra-group weight).
    """

    wants: ClassVar[Wants] = "pairs"

    def __init__(self, beta: float = 100.0, times: TimeLaw | None = None, weighted: bool = False) -> None:
        super().__init__()
        self.beta, self.weighted = beta, weighted
        self.times = times or TimeLaw()

    @property
    def roles(self) -> tuple[str, ...]:
        """The reference."""
        return ("reference",)

    def forward(self, policy: Policy, batch: Pairs, cond: Any = None) -> Losses:
        """Return the preference loss; winner and loser run as one batch."""
        x0 = torch.cat([batch.win, batch.lose])
        t, noise = batch.t.repeat(2), batch.noise.repeat(2, *[1] * (batch.noise.ndim - 1))
        known = None if cond is None else cond[batch.row.repeat(2)]
        x = policy.process.diffuse(x0, t, noise)
        da, ds = (per_sample(c, x) for c in policy.process.rates(t))
        target = da * x0 + ds * noise
        margin = velocity_error(policy, x, t, target, known) - velocity_error(policy, x, t, target, known, "reference")
        win, lose = margin.chunk(2)
        logit = -0.5 * self.beta * (win - lose)
        loss = -logsigmoid(logit)
        if self.weighted:
            loss = loss * (batch.weight / batch.weight.mean()).to(loss)
        return Losses({"dpo": loss.mean()}, {"accuracy": summary((logit > 0).float()), "margin": summary(logit)})
