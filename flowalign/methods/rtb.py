"""Relative trajectory balance: the tilt ``p_ref exp(λ r)`` without any gradient of sampler or reward (2405.20971).

( log Z + Σ_k [log p_θ - log p_ref](x_{k+1} | x_k) - λ r )²       log Z per prompt, or the batch mean (VarGrad)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo, Memoryless
from flowalign.methods.base import Preset, Training
from flowalign.objectives.balance import TrajectoryBalance
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe

__all__ = ["RTB"]


@dataclass(frozen=True)
class RTB(Training):
    """Relative trajectory balance.

    Attributes:
        scale: λ, reward in log units.
        log_z: vargrad (the mean imbalance of each prompt's batch) or learned (one number per prompt).
        memoryless: sample with the memoryless law, under which one log Z can balance all lineages.
        noise: level a of the Flow-GRPO law otherwise.
        subset: part of each lineage's steps that gets a gradient, rescaled so that the gradient is unbiased.
    """

    name: ClassVar[str] = "rtb"
    summary: ClassVar[str] = "relative trajectory balance: sample in proportion to the tilted density"
    reference: ClassVar[str] = """@inproceedings{venkatraman2024rtb,
  title={Amortizing intractable inference in diffusion models for vision, language, and control},
  author={Venkatraman, Siddarth and Jain, Moksh and Scimeca, Luca and Kim, Minsu and Sendera, Marcin and others},
  booktitle={Advances in Neural Information Processing Systems}, year={2024}, note={arXiv:2405.20971}}"""

    scale: float = 10.0
    log_z: Literal["vargrad", "learned"] = "vargrad"
    memoryless: bool = True
    noise: float = 0.7
    subset: float = 1.0

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices."""
        kernel = EulerMaruyama(Memoryless() if self.memoryless else FlowGrpo(self.noise))
        return Recipe(kernel, TrajectoryBalance(kernel, self.scale, self.log_z, subset=self.subset), credit=None)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for SD 1.5, and the demo's."""
        return {
            "published": Preset(
                cls(log_z="learned", memoryless=False, subset=0.16),
                FitOptions(
                    iterations=1000, groups=8, size=4, steps=50, batch=4, accumulate=0, lr=1e-5, max_grad_norm=0.1
                ),
                Lora(rank=4, alpha=4),
                note="SD 1.5, DDIM 50 steps, 8 of 50 steps with gradient. Not run here.",
            ),
            "demo": Preset(
                cls(scale=100.0),
                FitOptions(iterations=200, groups=4, size=8, steps=10, batch=8, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes with shapes-clip. Three iterations moved nothing, 5e-4 did harm (docs/gradients.md).",
            ),
        }
