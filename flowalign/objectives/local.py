"""Forward-looking balance: credit for each step, or for any few of them, before the sample is finished.

With a log-flow ``Φ_k = R̃_k(x_k) + F_φ(x_k)`` inside the chain, ``Φ_K = λ r(x_K)`` at its end and ``Φ_0 = log Z`` at its
start (R̃: :mod:`flowalign.lookahead`; Pan et al. 2302.01687, relative to a reference as in 2405.20971),

    L = mean_k ( Φ_k + Σ_{j=k}^{k+n-1} [log p_θ - log p_ref](x_{j+1} | x_j) - Φ_{k+n} )²

over all windows of ``span`` n steps. n = 1 is detailed balance, the whole chain is relative trajectory balance. The
optimum is that of trajectory balance for any n; only how fast a reward finds the step that earned it differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowalign.batches import Paths
from flowalign.kernels import Kernel
from flowalign.objectives.balance import LogZ
from flowalign.objectives.base import Losses, Objective, Wants, summary
from flowalign.policy import Policy

__all__ = ["LocalBalance"]


class LocalBalance(Objective):
    """Forward-looking balance over windows of steps; the paths' credit is ``(M, 2)``, R̃ before and after each step.

    Args:
        kernel: the law of a step.
        span: n; windows longer than the chain are the whole chain.
        log_z: ``"vargrad"`` for the row's batch mean of the windows at the start, or ``"learned"``, one number per
            prompt.
        flow: shape of a state → network ``(x, t, row, cond) → (B,)`` of the residual flow; None for none.
    """

    wants: ClassVar[Wants] = "paths"
    shaped: ClassVar[bool] = True

    def __init__(
        self,
        kernel: Kernel,
        span: int = 1,
        log_z: str = "vargrad",
        flow: Callable[[tuple[int, ...]], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if span < 1:
            raise ValueError(f"span must be at least 1 step; got {span}.")
        if log_z not in ("vargrad", "learned"):
            raise ValueError(f"log_z must be 'vargrad' or 'learned'; got {log_z!r}.")
        self.kernel, self.span, self.make = kernel, span, flow
        self.log_z = LogZ() if log_z == "learned" else None
        self.flow: nn.Module | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The reference."""
        return ("reference",)

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Make the residual flow."""
        if self.make is not None and self.flow is None:
            self.flow = self.make(shape)

    def residual(self, policy: Policy, batch: Paths, cond: Any = None) -> Tensor:
        """Return the imbalance of each window of each lineage, ``(windows, P)``, the first without log Z if VarGrad."""
        s, n = batch.steps, len(batch)
        order = torch.argsort(s.level * n + batch.path)  # by level, and in it by lineage
        s = s[order]
        known = None if cond is None else cond[s.row]
        laws = [self.kernel(s.x, policy.posterior(s.x, s.t, known, r), s.t, s.s)[0] for r in ("current", "reference")]
        gain = (laws[0].log_prob(s.x_next) - laws[1].log_prob(s.x_next)).reshape(-1, n)
        phi = self._flows(s, cond, n).to(gain)
        span = min(self.span, len(gain))
        total = torch.cat([gain.new_zeros(1, n), gain.cumsum(0)])
        return phi[:-span] - phi[span:] + total[span:] - total[:-span]

    def _flows(self, s: Any, cond: Any, n: int) -> Tensor:
        """Return ``Φ`` at every level of every lineage, ``(K + 1, P)``."""
        if s.weight is None or s.weight.ndim != 2:
            raise ValueError("forward-looking balance needs the credit (R̃ before, R̃ after) of each step: LookAhead.")
        before, after = s.weight.reshape(-1, n, 2).unbind(2)
        inner = before[1:]
        if self.flow is not None and len(inner):
            inner = inner + self.flow(s.x[n:], s.t[n:], s.row[n:], cond).reshape(-1, n).to(inner)
        start = torch.zeros_like(before[:1]) if self.log_z is None else self.log_z(s.row[:n], cond).to(before)[None]
        return torch.cat([start, inner, after[-1:]])

    def forward(self, policy: Policy, batch: Paths, cond: Any = None) -> Losses:
        """Return the mean squared imbalance."""
        r = self.residual(policy, batch, cond)
        if self.log_z is None:
            row = batch.row.to(r.device)
            count = torch.bincount(row).to(r).clamp_min(1)
            mean = r.new_zeros(len(count)).index_add(0, row, r[0].detach()) / count
            r = torch.cat([r[:1] - mean[row], r[1:]])
        return Losses({"balance": (r**2).mean()}, {"imbalance": summary(r.abs())})
