"""RLCM: policy gradient on a consistency model's few steps (Oertell et al. 2404.03673).

    x_s ~ N( α_s f_θ(x_t, t), σ_s² )        all noise of a step is fresh; the last step, into data, draws none

Schedulers of few-step models may end their grid just before data (diffusers' at σ = .001). A step into such a time
draws next to no noise; its density would be far sharper than the others' and outweigh them, so it is not trained.

Loss: PPO's clip, or REBEL (2404.16767): regress the difference of log-ratios of two samples of a group on the
difference of their advantages, ``((Δ log ρ)/η - ΔA)²``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from flowalign.credit import Group, Normalise
from flowalign.kernels import Ancestral, Kernel
from flowalign.laws import Consistency
from flowalign.methods.base import Preset, Training
from flowalign.objectives.base import Losses, summary
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.prepare import Lora
from flowalign.recipe import Recipe
from flowalign.trajectory import Transitions

__all__ = ["RLCM", "Rebel"]


class Rebel(Clip):
    """REBEL's regression on pairs of the minibatch: neighbours in its order are compared."""

    def __init__(self, kernel: Kernel, eta: float = 1.0) -> None:
        super().__init__(kernel, None)
        self.eta = eta

    def forward(self, policy: Policy, batch: Transitions, cond: Any = None) -> Losses:
        """Return the squared error of the relative reward."""
        posterior = policy.posterior(batch.x, batch.t, None if cond is None else cond[batch.row])
        law, _ = self.kernel(batch.x, posterior, batch.t, batch.s)
        log_ratio = self.log_ratio(law, batch)
        assert batch.weight is not None
        advantage = batch.weight.to(log_ratio)
        gap = (log_ratio - log_ratio.roll(1)) / self.eta - (advantage - advantage.roll(1))
        loss = (gap**2).mean()
        return Losses({"policy": loss}, {"gap": summary(gap.abs()), "ratio": summary(log_ratio.exp())})


@dataclass(frozen=True)
class RLCM(Training):
    """RLCM.

    Attributes:
        clip: range of the per-dimension ratio.
        least: steps that end at an earlier time than this are sampled and not trained.
        loss: clip (PPO) or rebel.
        eta: REBEL's inverse step size.
    """

    name: ClassVar[str] = "rlcm"
    summary: ClassVar[str] = "policy gradient on the few stochastic steps of a consistency model"
    reference: ClassVar[str] = """@article{oertell2024rlcm,
  title={{RL} for Consistency Models: Faster Reward Guided Text-to-Image Generation},
  author={Oertell, Owen and Chang, Jonathan D. and Zhang, Yiyi and Brantley, Kiant{\\'e} and Sun, Wen},
  journal={arXiv preprint arXiv:2404.03673}, year={2024}}"""

    clip: float = 1e-4
    least: float = 0.01
    loss: Literal["clip", "rebel"] = "clip"
    eta: float = 1.0

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices: two steps or more, since the last one is deterministic."""
        kernel = Ancestral(Consistency())
        objective = Clip(kernel, self.clip) if self.loss == "clip" else Rebel(kernel, self.eta)
        return Recipe(
            kernel, objective, credit=Group(Normalise(eps=1e-6, clamp=10.0)), trained=lambda level, t, s: s > self.least
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for LCM-Dreamshaper, and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(
                    iterations=100, groups=16, size=16, steps=8, batch=8, accumulate=0, lr=1e-4, max_grad_norm=5.0
                ),
                Lora(rank=8, alpha=8),
                note="LCM_Dreamshaper_v7, guidance 8. Not run here.",
            ),
            "demo": Preset(
                cls(clip=1e-3),
                FitOptions(iterations=200, groups=8, size=16, steps=4, batch=128, lr=3.5e-4, betas=(0.9, 0.99),
                           weight_decay=0.0, warmup=5),
                None,
                guidance=False,
                note="shapes-turbo: all weights; +6.0+-2.2 points of count in 13 iterations (one seed).",
            ),
        }  # fmt: skip
