"""The lean adjoint of Adjoint Matching (Domingo-Enrich et al. 2409.08861), on this project's own chain.

For the chain ``x_{k+1} ~ N(m_k(x_k), s_k²)`` of the frozen reference, along trajectories of the current policy,

    a_K = -λ ∇r(x_K),    a_k = J_{m_k}(x_k)ᵀ a_{k+1}

and the optimal mean shift at step k is ``-s_k² a_{k+1}``: the adjoint *after* the step (every public implementation
pairs a_k, which under-tilts by 20 % at 10 steps). One vector-Jacobian product of the frozen network per step; only one
step's graph is alive at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.credit import Credit, Levels
from flowalign.experience import Experience
from flowalign.kernels import Kernel
from flowalign.policy import Policy
from flowalign.trajectory import Trajectory

__all__ = ["LeanAdjoint", "lean_adjoint", "reward_gradient"]


def reward_gradient(score: Callable[[Tensor, Tensor], Tensor], x: Tensor, row: Tensor) -> Tensor:
    """Return ``∇r`` of each sample, ``(B, *)``: of the sum, so that no sample is scaled by the batch size.

    Raises:
        ValueError: if the reward gives no gradient.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        r = score(leaf, row)
        if not r.requires_grad:
            raise ValueError(
                "this method differentiates the reward, and the reward gave no gradient (card.differentiable is "
                "False, or it detaches its input). Use a policy-gradient method, or a differentiable reward."
            )
        (g,) = torch.autograd.grad(r.sum(), leaf)
    return g


def lean_adjoint(
    policy: Policy,
    kernel: Kernel,
    trajectory: Trajectory,
    terminal: Tensor,
    cond: Any = None,
    *,
    role: str = "reference",
    last: int | None = None,
) -> list[Tensor | None]:
    """Return the adjoint ``a_k (N, *)`` at every level, by vector-Jacobian products of the reference's step mean.

    Args:
        policy: with the role of the base model.
        kernel: the law of a step; its std must not depend on x.
        trajectory: chains (each node one child).
        terminal: ``a_K = -λ ∇r(x_K)``.
        cond: conditions by row.
        role: whose Jacobian.
        last: only the last so many levels (truncated adjoint); all when None.

    Raises:
        ValueError: for a trajectory that branches.
    """
    k_end = len(trajectory.levels) - 1
    out: list[Tensor | None] = [None] * (k_end + 1)
    out[k_end] = a = terminal.detach()
    times = trajectory.times.tolist()
    stop = trajectory.first if last is None else max(trajectory.first, k_end - last)
    for k in range(k_end - 1, stop - 1, -1):
        nodes, parent = trajectory.at(k), trajectory.at(k + 1).parent
        if len(nodes) != len(parent) or (parent != torch.arange(len(nodes))).any():
            raise ValueError("the lean adjoint follows chains; this trajectory branches or was resampled.")
        with policy.playing(role), torch.enable_grad():
            x = nodes.x.detach().requires_grad_()
            posterior = policy.posterior(x, times[k], None if cond is None else cond[nodes.row])
            mean = kernel(x, posterior, times[k], times[k + 1], nodes.carry)[0].mean
            (a,) = torch.autograd.grad(mean, x, grad_outputs=a.to(mean))
        policy.ledger.gradients += len(x)
        out[k] = a
    return out


@dataclass(frozen=True)
class LeanAdjoint(Credit):
    """Credits each step with the adjoint after it: entry k is ``a_k``, which the step *into* level k gets.

    Attributes:
        kernel: of the rollout; memoryless where the target is the tilt of the data law.
        scale: λ.
        last: truncate the adjoint to so many last steps; all when None.
    """

    kernel: Kernel
    scale: float = 1.0
    last: int | None = None

    def __call__(self, experience: Experience) -> Levels:
        """Differentiate the reward at the leaves and carry the gradient back through the reference."""
        e, leaves = experience, experience.trajectory.leaves
        terminal = -self.scale * reward_gradient(e.judge, leaves.x, leaves.row)
        return lean_adjoint(e.policy, self.kernel, e.trajectory, terminal, e.cond, last=self.last)
