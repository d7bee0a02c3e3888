"""The lean adjoint of Adjoint Matching (Domingo-Enrich et al. 2409.08861), on this project's own chain.

For the chain ``x_{k+1} ~ N(m_k(x_k), s_k²)`` of the frozen reference, along trajectories of the current policy,

    a_K = -λ ∇r(x_K),    a_k = J_{m_k}(x_k)ᵀ a_{k+1}

and the optimal mean shift at step k is ``-s_k² a_{k+1}``: the adjoint *after* the step (every public implementation
pairs a_k, which under-tilts by 20 % at 10 steps). One vector-Jacobian product of the frozen network per step; only one
step's graph is alive at a time. Three solvers:

    exact       a_k = J_kᵀ a_{k+1} at every step
    truncated   the same over the last steps only; the earlier ones get no credit
    linear      a_k = (Π_{j ≥ k} A_j) a_K, A_j the slope of m_j for data N(·, c²): no network call; exact where the
                velocity is linear (for the memoryless SDE and small steps a_t = (1-t) c² / ((1-t)² c² + t²) a_K: the
                closed form of 2605.11480, c = 1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowalign.credit import Credit, Levels
from flowalign.experience import Experience
from flowalign.kernels import Kernel
from flowalign.policy import Policy
from flowalign.process import Posterior, Process
from flowalign.trajectory import Nodes, Trajectory

__all__ = ["LeanAdjoint", "lean_adjoint", "linear_adjoint", "reward_gradient", "slopes"]


def reward_gradient(score: Callable[[Tensor, Tensor], Tensor], x: Tensor, row: Tensor) -> Tensor:
    """Return ``∇r`` of each sample, ``(B, *)``: of the sum, so that no sample is scaled by the batch size.

    Raises:
        ValueError: if the reward gives no gradient.
        FloatingPointError: if the gradient is not finite.
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
    return _finite(g, "the reward's gradient")


def _finite(a: Tensor, what: str) -> Tensor:
    """Return ``a (B, *)`` if it is finite."""
    bad = (~torch.isfinite(a).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"{what} is not finite for sample {bad[0]} ({len(bad)} of {len(a)} samples); nothing was updated, and the "
            "weights are the last good ones. Lower the reward's scale, take the network out of half precision, or "
            "truncate the adjoint."
        )
    return a


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
        FloatingPointError: for an adjoint that is not finite, with the step at which it began.
    """
    k_end = len(trajectory.levels) - 1
    out: list[Tensor | None] = [None] * (k_end + 1)
    out[k_end] = a = terminal.detach()
    times = trajectory.times.tolist()
    stop = trajectory.first if last is None else max(trajectory.first, k_end - last)
    for k in range(k_end - 1, stop - 1, -1):
        nodes = _chained(trajectory, k)
        with policy.playing(role), torch.enable_grad():
            x = nodes.x.detach().requires_grad_()
            posterior = policy.posterior(x, times[k], None if cond is None else cond[nodes.row])
            mean = kernel(x, posterior, times[k], times[k + 1], nodes.carry)[0].mean
            (a,) = torch.autograd.grad(mean, x, grad_outputs=a.to(mean))
        policy.ledger.gradients += len(x)
        out[k] = a = _finite(a, f"the adjoint carried back over step {k} (t = {times[k]:.4g})")
    return out


def _chained(trajectory: Trajectory, k: int) -> Nodes:
    """Return the nodes of a level that each have one child."""
    nodes, parent = trajectory.at(k), trajectory.at(k + 1).parent
    if len(nodes) != len(parent) or (parent != torch.arange(len(nodes))).any():
        raise ValueError("the lean adjoint follows chains; this trajectory branches or was resampled.")
    return nodes


def slopes(process: Process, kernel: Kernel, times: Tensor, spread: float) -> Tensor:
    """Return ``A_k = dm_k/dx`` of every step for data ``N(·, spread²)``, ``(K,)`` float64, read off the kernel itself.

    Args:
        process: the noising process.
        kernel: without memory.
        times: ``(K + 1,)``.
        spread: std of the data, the same in every coordinate.
    """
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    out = []
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        alpha, sigma = process(t)
        var = alpha**2 * spread**2 + sigma**2
        posterior = Posterior(alpha * spread**2 / var * x, sigma / var * x, process, t)
        mean = kernel(x, posterior, t, s)[0].mean
        out.append((mean[1] - mean[0])[0])
    return torch.stack(out)


def linear_adjoint(
    process: Process, kernel: Kernel, trajectory: Trajectory, terminal: Tensor, spread: float
) -> list[Tensor | None]:
    """Return the adjoint at every level as if the data were ``N(·, spread²)``: products of slopes, no network.

    Args:
        process: the noising process.
        kernel: the law of a step, without memory.
        trajectory: chains.
        terminal: ``a_K``.
        spread: std of the data.

    Raises:
        ValueError: for a trajectory that branches, or a spread that is not positive.
    """
    if not spread > 0:
        raise ValueError(f"the spread of the data must be positive; got {spread}.")
    a = terminal.detach()
    out: list[Tensor | None] = [None] * trajectory.first
    steps = slopes(process, kernel, trajectory.times, spread)
    for k in range(trajectory.first, len(steps)):
        _chained(trajectory, k)
        out.append(a * steps[k:].prod().to(a))
    return [*out, a]


@dataclass(frozen=True)
class LeanAdjoint(Credit):
    """Credits each step with the adjoint after it: entry k is ``a_k``, which the step *into* level k gets.

    Attributes:
        kernel: of the rollout; memoryless where the target is the tilt of the data law.
        scale: λ.
        last: truncate the adjoint to so many last steps; all when None.
        solver: exact, or linear; see the module.
        spread: std of the data for the linear solver; that of the finished samples when None.
        noiseless: take the reward's gradient at the mean of the last step in place of the sample (the published runs,
            whose last step still adds noise); one more network call.
    """

    differentiates = True

    kernel: Kernel
    scale: float = 1.0
    last: int | None = None
    solver: Literal["exact", "linear"] = "exact"
    spread: float | None = None
    noiseless: bool = False

    def __call__(self, experience: Experience) -> Levels:
        """Differentiate the reward at the leaves and carry the gradient back through the reference."""
        e, tree = experience, experience.trajectory
        end = self._last_mean(e) if self.noiseless else tree.leaves.x
        terminal = -self.scale * reward_gradient(e.judge, end, tree.leaves.row)
        if self.solver == "exact":
            return lean_adjoint(e.policy, self.kernel, tree, terminal, e.cond, last=self.last)
        spread = float(tree.leaves.x.std(0, correction=0).mean()) if self.spread is None else self.spread
        out = linear_adjoint(e.policy.process, self.kernel, tree, terminal, spread)
        first = 0 if self.last is None else len(out) - 1 - self.last
        return [a if k >= first else None for k, a in enumerate(out)]

    def _last_mean(self, e: Experience) -> Tensor:
        """Return the mean of the reference's last step, ``(N, *)``."""
        tree = e.trajectory
        k = len(tree.levels) - 2
        nodes, (t, s) = _chained(tree, k), tree.times[-2:].tolist()
        posterior = e.policy.posterior(nodes.x, t, None if e.cond is None else e.cond[nodes.row], "reference")
        return self.kernel(nodes.x, posterior, t, s, nodes.carry)[0].mean
