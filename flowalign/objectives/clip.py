"""The clipped policy gradient over transitions: DDPO, Flow-GRPO, DanceGRPO, CPS, MixGRPO, GRPO-Guard, trees.

    loss = mean max( -A ρ, -A clip(ρ, 1-ε, 1+ε) ) + β KL

What the papers call the ratio ρ is not always the ratio of densities, and the clip range depends on which one it is:

    density   log ρ = log p - log p_old                                  the true density over all D dimensions
    per_dim   log ρ = (log p - log p_old) / D                            everyone who descends from ddpo-pytorch
    mse       log ρ = (log p - log p_old) · 2 std² / D                   CPS: -mean(x' - μ)², no variance, no constants
    guard     log ρ = [(log p - log p_old)/D + mean(μ-μ_old)²/2std²]·std GRPO-Guard (2510.22319): mean 0, same spread at
                                                                         every step; the loss is divided by (t - s)

KL scales, named because β was published with each: ``exact`` (the Gaussians' own, per dimension), ``flow_grpo`` (that
code divides by the square of what it calls the noise: g² and not g² Δt for the SDE, but the step's own variance for
CPS, whose noise is no rate), ``velocity`` (mean squared difference of the velocities).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowalign.gaussian import Gaussian, sum_dims
from flowalign.kernels import EulerMaruyama, Kernel, Windowed
from flowalign.objectives.base import Losses, Objective, Wants, summary
from flowalign.policy import Policy
from flowalign.process import Posterior
from flowalign.trajectory import Transitions, pick

__all__ = ["Clip"]

Ratio = Literal["density", "per_dim", "mse", "guard"]
KlScale = Literal["exact", "flow_grpo", "velocity"]


class Clip(Objective):
    """Clipped policy gradient.

    Args:
        kernel: the law under which the steps were taken.
        epsilon: clip range, or (below, above); None for no clipping.
        ratio: see the module.
        kl: β.
        kl_scale: see the module.
        reach: widens the clip range with the advantage, ``ε (1 + reach · min(|A|, 1))`` (Dynamic-TreeRPO's
            reward-conditioned range; the paper's constants are not public).
        supervised: weight of ``‖x̂0 - target‖²`` of the steps that the batch has a target for (LayerTuning-RL).
    """

    wants: ClassVar[Wants] = "transitions"

    def __init__(
        self,
        kernel: Kernel,
        epsilon: float | tuple[float, float] | None = 1e-4,
        ratio: Ratio = "per_dim",
        kl: float = 0.0,
        kl_scale: KlScale = "flow_grpo",
        reach: float = 0.0,
        supervised: float = 0.0,
    ) -> None:
        super().__init__()
        self.kernel, self.ratio, self.kl, self.kl_scale = kernel, ratio, kl, kl_scale
        self.reach, self.supervised = reach, supervised
        self.epsilon = (epsilon, epsilon) if isinstance(epsilon, float) else epsilon
        if self.epsilon is not None and not (0 < self.epsilon[0] < 1 and self.epsilon[1] > 0):
            raise ValueError(f"the clip range must lie in (0, 1); got {epsilon}. None switches clipping off.")

    @property
    def roles(self) -> tuple[str, ...]:
        """The reference, where the KL is on."""
        return ("reference",) if self.kl else ()

    def forward(self, policy: Policy, batch: Transitions, cond: Any = None) -> Losses:
        """Return ``policy`` and ``kl`` losses of a minibatch of steps with advantages."""
        posterior = self._posterior(policy, batch, cond)
        law, _ = self.kernel(batch.x, posterior, batch.t, batch.s, batch.carry)
        log_ratio = self.log_ratio(law, batch)
        ratio = log_ratio.exp()
        assert batch.weight is not None
        # one column per credit (outcome, process): their clipped losses are added, not their advantages
        advantage = batch.weight.to(ratio).reshape(len(batch), -1)
        loss = self.surrogate(ratio, advantage).sum(1)
        if self.ratio == "guard":
            loss = loss / (batch.t - batch.s).to(loss)
        terms, metrics = {"policy": loss.mean()}, self._metrics(ratio, advantage)
        if self.supervised and batch.target is not None:
            pull = sum_dims((posterior.x0 - batch.target.to(posterior.x0)) ** 2) / batch.x[0].numel()
            # a sample that is already good needs the teacher less: the weight falls from 1 to 0 with its advantage
            need = torch.sigmoid(-batch.weight.to(pull).reshape(len(batch), -1).mean(1))
            taught = torch.ones_like(pull) if batch.taught is None else batch.taught.to(pull)
            terms["supervised"] = self.supervised * (taught * need * pull).mean()
        if self.kl:
            kl = self._kl(policy, posterior, law, batch, cond)
            terms["kl"] = self.kl * kl.mean()
            metrics["kl"] = summary(kl)
        return Losses(terms, metrics)

    def _posterior(self, policy: Policy, batch: Transitions, cond: Any, role: str = "current") -> Posterior:
        """Ask the network once about each state; siblings of a tree or of a shared start step from the same one."""
        shared = batch.sources()
        first, inverse = (None, None) if shared is None else shared
        x, t, row = (v if first is None else pick(v, first) for v in (batch.x, batch.t, batch.row))
        posterior = policy.posterior(x, t, None if cond is None else cond[row], role)
        return posterior if inverse is None else posterior[inverse]

    def surrogate(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """Return ``max(-A ρ, -A clip(ρ))``, ``(M, C)``, of ratios ``(M,)`` and advantages ``(M, C)``."""
        gain = advantage * ratio[:, None]
        if self.epsilon is None:
            return -gain
        low, high = self._range(advantage)
        return -torch.minimum(gain, advantage * torch.minimum(torch.maximum(ratio[:, None], low), high))

    def _range(self, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest ratio that are let through, ``(M, C)`` each."""
        assert self.epsilon is not None
        widen = 1 + self.reach * advantage.detach().abs().clamp_max(1.0)
        return 1 - self.epsilon[0] * widen, 1 + self.epsilon[1] * widen

    def log_ratio(self, law: Gaussian, batch: Transitions) -> Tensor:
        """Return the logarithm of what this method calls the ratio, ``(M,)``."""
        delta = law.log_prob(batch.x_next) - batch.log_prob
        dims = batch.x[0].numel()
        if self.ratio == "density":
            return delta
        if self.ratio == "per_dim":
            return delta / dims
        variance = sum_dims((law.std**2).expand_as(law.mean)) / dims
        if self.ratio == "mse":
            return delta * 2 * variance / dims
        if batch.mean is None:
            raise ValueError("the guarded ratio needs the old means: run the rollout with keep=True.")
        bias = sum_dims((law.mean - batch.mean) ** 2) / dims / (2 * variance)
        return (delta / dims + bias) * variance.sqrt()

    def _kl(self, policy: Policy, posterior: Posterior, law: Gaussian, batch: Transitions, cond: Any) -> Tensor:
        ref = self._posterior(policy, batch, cond, "reference")
        dims = batch.x[0].numel()
        if self.kl_scale == "velocity":
            return sum_dims((posterior.velocity - ref.velocity) ** 2) / dims
        other, _ = self.kernel(batch.x, ref, batch.t, batch.s, batch.carry)
        kl = law.kl(other) / dims
        rate = self.kernel.inside if isinstance(self.kernel, Windowed) else self.kernel
        by_time = self.kl_scale == "flow_grpo" and isinstance(rate, EulerMaruyama)
        return kl * (batch.t - batch.s).to(kl) if by_time else kl

    def _metrics(self, ratio: Tensor, advantage: Tensor) -> dict[str, Tensor]:
        r = ratio.detach()
        out = {"ratio": r.mean(), "ratio_gap": (r - 1).abs().max()}
        if self.epsilon is not None:
            low, high = self._range(advantage)
            out["clipped"] = ((r[:, None] < low) | (r[:, None] > high)).float().mean()
        return out
