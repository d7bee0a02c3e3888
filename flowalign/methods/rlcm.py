"""RLCM: policy gradient on a consistency model's few steps (Oertell et al. 2404.03673).

    x_s ~ N( α_s f_θ(x_t, t), σ_s² )        all noise of a step is fresh; the last step, into data, draws none

Schedulers of few-step models may end their grid just before data (diffusers' at σ = .001). A step into such a time
draws next to no noise; its density would be far sharper than the others' and outweigh them, so it is not trained.

Loss: PPO's clip on each step, or REBEL (2404.16767): regress the difference of log-ratios of two samples of a prompt on
the difference of their advantages, ``(Δ log ρ / η - ΔA)²``, where ``log ρ`` is that of the whole chain, summed over its
steps. A sample is compared with one of its own prompt: what the prompt alone is worth cancels there, and only there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowalign.batches import Paths
from flowalign.credit import Group, Normalise
from flowalign.kernels import Ancestral, Kernel
from flowalign.laws import Consistency
from flowalign.methods.base import Preset, Training
from flowalign.nodes import ranks
from flowalign.objectives.base import Losses, Objective, Wants, summary
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.prepare import Lora
from flowalign.recipe import Recipe

__all__ = ["RLCM", "Rebel"]


class Rebel(Objective):
    """REBEL's regression on pairs of chains of one prompt: the first and second of it in a minibatch, and so on.

    Args:
        kernel: the law under which the steps were taken.
        eta: inverse weight of the log-ratio.
    """

    wants: ClassVar[Wants] = "paths"
    paired: ClassVar[bool] = True
    epsilon: ClassVar[None] = None

    def __init__(self, kernel: Kernel, eta: float = 1.0) -> None:
        super().__init__()
        self.kernel, self.eta = kernel, eta

    def forward(self, policy: Policy, batch: Paths, cond: Any = None) -> Losses:
        """Return the squared error of the relative reward; a chain without a partner in the minibatch is left out."""
        s = batch.steps
        posterior = policy.posterior(s.x, s.t, None if cond is None else cond[s.row])
        law, _ = self.kernel(s.x, posterior, s.t, s.s)
        delta = (law.log_prob(s.x_next) - s.log_prob) / s.x[0].numel()
        path, zero = batch.path.to(delta.device), delta.new_zeros(len(batch))
        log_ratio = zero.index_add(0, path, delta)
        assert s.weight is not None
        # every step of a chain has the chain's advantage
        advantage = zero.index_add(0, path, s.weight.to(delta)) / torch.bincount(path, minlength=len(batch))
        first, second = (i.to(delta.device) for i in partners(batch.row))
        gap = (log_ratio[first] - log_ratio[second]) / self.eta - (advantage[first] - advantage[second])
        pairs, ratio = max(len(first), 1), log_ratio.detach().exp()
        return Losses(
            {"policy": (gap**2).sum() / pairs},
            {"gap": gap.detach().abs().sum() / pairs, "ratio": summary(ratio), "ratio_gap": (ratio - 1).abs().max()},
        )


def partners(row: Tensor) -> tuple[Tensor, Tensor]:
    """Return whom to compare: the first and second of each row ``(B,)``, the third and fourth, ..."""
    by_row = torch.argsort(row, stable=True)
    odd = ranks(row)[by_row] % 2 == 1
    second = odd.nonzero().flatten()
    return by_row[second - 1], by_row[second]


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
