"""Balance losses of generative flow networks: sampling in proportion to ``p_ref exp(λ r)``.

Relative trajectory balance (Venkatraman et al. 2405.20971), per lineage of a chain:

    L = ( log Z + Σ_k [log p_θ(x_{k+1}|x_k) - log p_ref(x_{k+1}|x_k)] - λ r(x_K) )²

Off-policy capable, no gradient through the sampler or the reward. log Z belongs to the prompt: the batch mean of each
row stands in for it (``vargrad``), or a table learns one for every prompt (:class:`LogZ`). Unless the chain is
memoryless no constant makes the loss vanish: what the first state remembers is left over.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowalign.batches import Paths
from flowalign.kernels import Kernel
from flowalign.noise import text_key
from flowalign.objectives.base import Losses, Objective, Wants, summary
from flowalign.policy import Policy
from flowalign.protocols import Condition
from flowalign.trajectory import Transitions

__all__ = ["LogZ", "TrajectoryBalance"]


class LogZ(nn.Module):
    """A learned log normalising constant for every prompt: a table, entered by a stable hash of the prompt.

    Args:
        slots: of the table; of 1,500 prompts some 30 share one with another.
    """

    def __init__(self, slots: int = 1 << 16) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(slots))

    def forward(self, row: Tensor, cond: Any) -> Tensor:
        """Return log Z of rows ``(B,)`` of a condition; rows are the keys themselves where there are no prompts."""
        if isinstance(cond, Condition):
            row = torch.tensor([text_key(cond.prompts[r]) % len(self.table) for r in row.tolist()])
        return self.table[row.to(self.table.device) % len(self.table)]


class TrajectoryBalance(Objective):
    """Relative trajectory balance.

    Args:
        kernel: the law of a step.
        scale: λ, reward in log units.
        log_z: ``"vargrad"`` for the row's batch mean, or ``"learned"`` for one number per prompt.
        subset: fraction of each lineage's steps that get a gradient, rescaled so that the gradient is unbiased.
    """

    wants: ClassVar[Wants] = "paths"

    def __init__(self, kernel: Kernel, scale: float = 1.0, log_z: str = "vargrad", subset: float = 1.0) -> None:
        super().__init__()
        if not 0 < subset <= 1:
            raise ValueError(f"subset must lie in (0, 1]; got {subset}.")
        self.subset = subset
        if log_z not in ("vargrad", "learned"):
            raise ValueError(f"log_z must be 'vargrad' or 'learned'; got {log_z!r}.")
        self.kernel, self.scale = kernel, scale
        self.log_z = LogZ() if log_z == "learned" else None

    @property
    def roles(self) -> tuple[str, ...]:
        """The reference."""
        return ("reference",)

    def residual(self, policy: Policy, batch: Paths, cond: Any = None) -> Tensor:
        """Return the imbalance of each lineage without log Z, ``(P,)``."""
        s = batch.steps
        live = self._live(batch)
        base = self._log_prob(policy, s, cond, "reference")
        if live is None:
            gain = self._log_prob(policy, s, cond) - base
        else:
            with torch.no_grad():
                gain = self._log_prob(policy, s, cond) - base
            # value of all steps, gradient of a random subset: rescaled by its share, the gradient stays unbiased
            part = self._log_prob(policy, s[live], cond)
            share = len(live) / len(s)
            gain = gain.index_add(0, live.to(gain.device), (part - part.detach()) / share)
        path = batch.path.to(gain.device)
        return gain.new_zeros(len(batch)).index_add(0, path, gain) - self.scale * batch.reward.to(gain)

    def _log_prob(self, policy: Policy, s: Transitions, cond: Any, role: str = "current") -> Tensor:
        posterior = policy.posterior(s.x, s.t, None if cond is None else cond[s.row], role)
        return self.kernel(s.x, posterior, s.t, s.s)[0].log_prob(s.x_next)

    def _live(self, batch: Paths) -> Tensor | None:
        """Return the steps that get a gradient: the same number of each lineage, by its dice; None for all."""
        if self.subset >= 1:
            return None
        if batch.dice is None:
            raise ValueError("a subset of steps is chosen by the dice of the paths: make them by batches.paths.")
        kept = max(1, round(self.subset * batch.total))
        order = torch.argsort(batch.path.double() + batch.dice)
        count = len(batch.path) // len(batch)
        return order.reshape(len(batch), count)[:, :kept].flatten().sort().values

    def forward(self, policy: Policy, batch: Paths, cond: Any = None) -> Losses:
        """Return the squared imbalance."""
        r = self.residual(policy, batch, cond)
        if self.log_z is None:
            row = batch.row.to(r.device)
            n = int(row.max()) + 1
            count = torch.bincount(row, minlength=n).to(r).clamp_min(1)
            constant = -(r.new_zeros(n).index_add(0, row, r.detach()) / count)[row]
        else:
            constant = self.log_z(batch.row, cond).to(r)
        return Losses({"balance": ((r + constant) ** 2).mean()}, {"log_z": summary(constant), "imbalance": summary(r)})
