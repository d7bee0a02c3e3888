"""Residual ∇-DB, the loss of ∇-GFlowNet: the tilt by gradients of a detailed balance (Liu et al. 2412.07775).

Off-policy in the sampler and without backpropagation through it: each transition is trained by itself, with the
reward's gradient at the posterior mean of its two ends and a learned residual flow for what that gets wrong; see
:mod:`flowalign.objectives.nabla`. It tilts, as Adjoint Matching does, from single steps in place of whole chains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowalign.kernels import Ancestral, EulerMaruyama, Kernel
from flowalign.laws import Ddim, Memoryless
from flowalign.lookahead import LookAheadGradient, PromptedFlow, strata
from flowalign.methods.base import Preset, Training
from flowalign.objectives.nabla import GradientBalance
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe

__all__ = ["NablaDB"]


@dataclass(frozen=True)
class NablaDB(Training):
    """Residual ∇-DB.

    Attributes:
        scale: λ, the reward's multiplier: inverse temperature of the tilt.
        power: the look-ahead counts as α^power on the way (published: 2, "squared"; also 1).
        reverse: weight of the reverse residual; 0 leaves it, and second derivatives of the network, out.
        scaled: weigh residuals by the step's std; false as published.
        stay: weight of the squared velocity gap to the last iteration's weights (published: 2000).
        flow: whether a residual flow is learned.
        width: of its network.
        fraction: part of the steps that an iteration trains on, one in each of equal strata (published: .1).
        memoryless: sample with the memoryless law; false for DDPM's posterior, memoryless for diffusion models.
    """

    name: ClassVar[str] = "nabla-db"
    summary: ClassVar[str] = "residual ∇-DB: differentiated detailed balance, one transition at a time, keeps diversity"
    reference: ClassVar[str] = """@inproceedings{liu2025nablagfn,
  title={Efficient Diversity-Preserving Diffusion Alignment via Gradient-Informed {GFlowNets}},
  author={Liu, Zhen and Xiao, Tim Z. and Liu, Weiyang and Bengio, Yoshua and Zhang, Dinghuai},
  booktitle={International Conference on Learning Representations}, year={2025}, note={arXiv:2412.07775}}"""

    scale: float = 50.0
    power: float = 2.0
    reverse: float = 1.0
    scaled: bool = True
    stay: float = 0.0
    flow: bool = True
    width: int = 32
    fraction: float = 1.0
    memoryless: bool = True

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices.

        Raises:
            ValueError: for a fraction outside (0, 1].
        """
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1]; got {self.fraction}.")
        kernel: Kernel = EulerMaruyama(Memoryless()) if self.memoryless else Ancestral(Ddim(1.0))
        chosen = None if self.fraction == 1 else strata(self.fraction, len(times) - 1)
        flow = (lambda shape: PromptedFlow(shape, self.width)) if self.flow else None
        return Recipe(
            kernel,
            GradientBalance(kernel, float(times[-1]), self.reverse, self.scaled, self.stay, flow),
            credit=LookAheadGradient(self.scale, self.power, chosen),
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings (SD 1.5), and the demo's."""
        return {
            "published": Preset(
                cls(scale=10_000.0, scaled=False, stay=2000.0, width=64, fraction=0.1, memoryless=False),
                FitOptions(iterations=200, groups=64, size=1, steps=50, batch=8, accumulate=0, lr=1e-3),
                Lora(rank=8, alpha=8),
                note="SD 1.5, aesthetic score, guidance 5. Not run here.",
            ),
            "demo": Preset(
                cls(scale=100.0, fraction=0.5),
                FitOptions(
                    iterations=200, groups=16, size=1, steps=10, batch=80, lr=2e-4, lr_objective=3e-4, weight_decay=0.0
                ),
                None,
                guidance=False,
                note="shapes with shapes-clip. Two or three iterations moved nothing (docs/gradients.md).",
            ),
        }
