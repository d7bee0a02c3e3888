"""GRPO-Guard: a ratio whose logarithm has mean 0 and the same spread at every step (2510.22319).

    log ρ = [(log p - log p_old)/D + mean(μ-μ_old)²/2std²] · std,      loss / (t - s)

Flow-GRPO with ``ratio="guard"``; the bias is per sample (the official script averages it over the batch by accident),
and the 1/Δt re-weighting, which one re-implementation leaves out, is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowalign.methods.base import Preset, Training
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe

__all__ = ["GRPOGuard"]


@dataclass(frozen=True)
class GRPOGuard(Training):
    """GRPO-Guard.

    Attributes:
        noise: level a of the Flow-GRPO law.
        clip: range of the guarded ratio.
        kl: weight of the penalty towards the base model.
    """

    name: ClassVar[str] = "grpo-guard"
    summary: ClassVar[str] = "Flow-GRPO with the ratio centred and equalised over steps, loss weighted by 1/Δt"
    reference: ClassVar[str] = """@article{wang2025grpoguard,
  title={{GRPO-Guard}: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping},
  author={Wang, Jing and others}, journal={arXiv preprint arXiv:2510.22319}, year={2025}}"""

    noise: float = 0.7
    clip: float = 2e-6
    kl: float = 0.0

    def recipe(self, times: Tensor) -> Recipe:
        """Return Flow-GRPO's choices with the guarded ratio and group statistics."""
        return FlowGRPO(noise=self.noise, clip=self.clip, ratio="guard", kl=self.kl, std="group").recipe(times)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings, and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(
                    iterations=4000, groups=48, size=24, batch=9, accumulate=576, lr=1e-4, filter_groups=True,
                    ema_every=8,
                ),
                Lora(),
                note="SD3.5-M on 16 GPUs. Not run here.",
            ),
            "demo": Preset(
                cls(clip=1e-4),
                FitOptions(iterations=400, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes: all weights.",
            ),
        }  # fmt: skip
