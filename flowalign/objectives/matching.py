"""Regressions: onto data (flow matching), and onto the lean adjoint (Adjoint Matching, 2409.08861).

FlowMatching      w(x0) ‖v(x_t) - (α̇ x0 + σ̇ ε)‖²             SFT, RAFT, Flow-RWR, distilling a steered sampler
AdjointMatching   ½ ‖ (m_θ - m_ref)/std + std a_{k+1} ‖²       optimum: m_θ = m_ref - std² a_{k+1}
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from flowalign.batches import Leaves, TimeLaw
from flowalign.gaussian import per_sample, sum_dims
from flowalign.kernels import Kernel
from flowalign.objectives.base import Losses, Objective, Wants, summary, velocity_error
from flowalign.policy import Policy
from flowalign.trajectory import Transitions

__all__ = ["AdjointMatching", "FlowMatching"]


class FlowMatching(Objective):
    """Weighted conditional flow matching: the weight of a sample multiplies its squared velocity error.

    Args:
        times: where samples are re-noised.
    """

    wants: ClassVar[Wants] = "leaves"

    def __init__(self, times: TimeLaw | None = None) -> None:
        super().__init__()
        self.times = times or TimeLaw()

    def forward(self, policy: Policy, batch: Leaves, cond: Any = None) -> Losses:
        """Return the weighted mean; negative weights are refused, they have no minimum."""
        x = batch.noised(policy.process)
        da, ds = (per_sample(c, x) for c in policy.process.rates(batch.t))
        target = da * batch.x0 + ds * batch.noise.to(x)
        error = velocity_error(policy, x, batch.t, target, None if cond is None else cond[batch.row])
        weight = batch.weight.to(error)
        return Losses({"flow_matching": (weight * error).mean()}, {"error": summary(error)})


class AdjointMatching(Objective):
    """Regression of the control onto the lean adjoint carried by ``batch.weight`` ``(M, *)`` = a_{k+1}.

    Args:
        kernel: the memoryless kernel of the rollout.
        clip: largest loss per step and sample (the paper's LCT = 1.6 λ²); larger ones give no gradient. None for none.
    """

    wants: ClassVar[Wants] = "transitions"

    def __init__(self, kernel: Kernel, clip: float | None = None) -> None:
        super().__init__()
        self.kernel, self.clip = kernel, clip

    @property
    def roles(self) -> tuple[str, ...]:
        """The reference."""
        return ("reference",)

    def forward(self, policy: Policy, batch: Transitions, cond: Any = None) -> Losses:
        """Return the mean regression error, summed over dimensions."""
        known = None if cond is None else cond[batch.row]
        law, _ = self.kernel(batch.x, policy.posterior(batch.x, batch.t, known), batch.t, batch.s)
        base, _ = self.kernel(batch.x, policy.posterior(batch.x, batch.t, known, "reference"), batch.t, batch.s)
        assert batch.weight is not None
        control = (law.mean - base.mean) / law.std
        loss = 0.5 * sum_dims((control + law.std * batch.weight.to(control)) ** 2)
        metrics = {"control": summary(sum_dims(control**2).sqrt())}
        if self.clip is not None:
            metrics["clipped"] = summary((loss > self.clip).float())
            loss = torch.where(loss > self.clip, loss.detach(), loss)
        return Losses({"adjoint": loss.mean()}, metrics)
