"""Residual ∇-DB: detailed balance of a flow network, differentiated (Liu et al. 2412.07775).

Differentiating ``log p_θ(x'|x) - log p_ref(x'|x) = V(x') - V(x)`` at both ends of a step, with ``∇V = ∇R̃ + ∇F_φ`` (R̃:
:mod:`flowalign.lookahead`; F_φ: what it misses, 0 at data time), gives two residuals that vanish at the optimum,

    forward    ∇_{x'} log p_θ - ∇_{x'} log p_ref - ∇F_φ(x') - ∇R̃(x')
    reverse    ∇_x   log p_θ - ∇_x   log p_ref + ∇F_φ(x)  + ∇R̃(x)

    L = ½ mean ‖w forward‖² + (ρ/2) mean ‖w reverse‖² + κ mean (v_θ - v_old)²        w = std of the step, or 1

∇_{x'} log p_θ - ∇_{x'} log p_ref is (m_θ - m_ref)/std²: with w = std the first term is Adjoint Matching's regression
onto a one-step adjoint. The reverse one needs second derivatives of the network. ∇F_φ is the gradient of a network, so
the field is conservative, as it must be; at data time it is left out, and no target is ever set to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowalign.gaussian import Gaussian, sum_dims
from flowalign.kernels import Kernel
from flowalign.objectives.base import Losses, Objective, Wants, summary
from flowalign.policy import Policy
from flowalign.trajectory import Transitions

__all__ = ["GradientBalance"]


class GradientBalance(Objective):
    """The two residuals; the transitions' credit is ``(M, 2, *)``, ∇R̃ before and after the step.

    Args:
        kernel: the law of a step.
        end: data time, where F_φ is 0.
        reverse: ρ; 0 leaves the reverse residual out.
        scaled: w = std, so that all steps count alike; else 1, as published.
        stay: κ, towards the sampler's own weights of the last iteration.
        flow: shape of a state → network ``(x, t, row, cond) → (B,)``; None for none.
    """

    wants: ClassVar[Wants] = "transitions"
    shaped: ClassVar[bool] = True

    def __init__(
        self,
        kernel: Kernel,
        end: float = 0.0,
        reverse: float = 1.0,
        scaled: bool = True,
        stay: float = 0.0,
        flow: Callable[[tuple[int, ...]], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if reverse < 0 or stay < 0:
            raise ValueError(f"reverse and stay must not be negative; got {reverse} and {stay}.")
        self.kernel, self.end, self.reverse, self.scaled, self.stay = kernel, end, reverse, scaled, stay
        self.make = flow
        self.flow: nn.Module | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The reference, and the old policy where it is to be kept near."""
        return ("reference", "old") if self.stay else ("reference",)

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Make the residual flow."""
        if self.make is not None and self.flow is None:
            self.flow = self.make(shape)

    def residuals(self, policy: Policy, batch: Transitions, cond: Any = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the forward and reverse residuals, ``(M, *)`` each, and the current velocity.

        Raises:
            ValueError: for a credit of another shape.
        """
        if batch.weight is None or batch.weight.shape[1:] != (2, *batch.x.shape[1:]):
            raise ValueError("∇-DB needs the credit (∇R̃ before, ∇R̃ after) of each step: LookAheadGradient.")
        x, y = batch.x.detach().requires_grad_(self.reverse > 0), batch.x_next.detach()
        known = None if cond is None else cond[batch.row]
        # fused attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH) if self.reverse else nullcontext():
            posterior = policy.posterior(x, batch.t, known)
        law, _ = self.kernel(x, posterior, batch.t, batch.s)
        base, back = self._base(policy, batch, known)
        before, after = batch.weight.to(law.mean).unbind(1)
        live = law.std > 0  # an atom has no density to differentiate
        std = torch.where(live, law.std, 1.0)
        late = (batch.s <= self.end + 1e-9).to(law.mean.device).reshape(-1, *[1] * (x.ndim - 1))
        gap = (law.mean - base) / std**2
        ahead = gap - torch.where(late, 0.0, self._pull(y, batch.s, batch.row, cond)) - after
        weight = torch.where(live, law.std if self.scaled else torch.ones_like(law.std), 0.0)
        if not self.reverse:
            return weight * ahead, None, posterior.velocity
        own = self._score(law, y, x, create_graph=True)
        behind = own - back + self._pull(batch.x, batch.t, batch.row, cond) + before
        return weight * ahead, weight * behind, posterior.velocity

    def _base(self, policy: Policy, batch: Transitions, known: Any) -> tuple[Tensor, Tensor]:
        """Return the reference's step mean and ``∇_x log p_ref(x'|x)``, both without a graph."""
        with policy.playing("reference"), torch.set_grad_enabled(self.reverse > 0):
            x = batch.x.detach().requires_grad_(self.reverse > 0)
            law, _ = self.kernel(x, policy.posterior(x, batch.t, known), batch.t, batch.s)
            back = self._score(law, batch.x_next.detach(), x, create_graph=False) if self.reverse else x
        return law.mean.detach(), back.detach()

    @staticmethod
    def _score(law: Gaussian, y: Tensor, x: Tensor, *, create_graph: bool) -> Tensor:
        """Return ``∇_x log N(y; mean(x), std²)``; 0 where the step is an atom."""
        std = torch.where(law.std > 0, law.std, 1.0)
        spread = torch.where(law.std > 0, -0.5 * ((y - law.mean) / std) ** 2, 0.0)
        return torch.autograd.grad(spread.sum(), x, create_graph=create_graph)[0]

    def _pull(self, x: Tensor, t: Tensor, row: Tensor, cond: Any) -> Tensor:
        """Return ``∇F_φ(x)``, with a graph for φ."""
        if self.flow is None:
            return torch.zeros_like(x)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.flow(leaf, t, row, cond).sum(), leaf, create_graph=True)[0]

    def forward(self, policy: Policy, batch: Transitions, cond: Any = None) -> Losses:
        """Return the terms."""
        ahead, behind, v = self.residuals(policy, batch, cond)
        terms = {"forward": 0.5 * sum_dims(ahead**2).mean()}
        if behind is not None:
            terms["reverse"] = 0.5 * self.reverse * sum_dims(behind**2).mean()
        if self.stay:
            old = policy.posterior(batch.x, batch.t, None if cond is None else cond[batch.row], "old").velocity
            terms["stay"] = self.stay * ((v - old) ** 2).mean()
        return Losses(terms, {"residual": summary(sum_dims(ahead.detach() ** 2).sqrt())})
