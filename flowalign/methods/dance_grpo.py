"""DanceGRPO: constant noise, one initial noise per group, a random part of the steps (Xue et al. 2505.07818).

    mean = x + [v + η²/2 ε̂/σ](s - t),  std = η √(t - s)       A = (r - mean_group) / (std_group + 1e-8), unbiased std

The last step is the ODE's, which leads to x̂0: what is decoded and judged holds no noise of a step.
Its two tricks: all samples of a group start from the same noise, and of a large group only the best and worst are
trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowalign.credit import Group, Normalise
from flowalign.kernels import EulerMaruyama, Windowed
from flowalign.laws import Constant
from flowalign.methods.base import Preset, Training, levels_between
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe
from flowalign.thinning import Thin, chain, extremes, random_steps

__all__ = ["DanceGRPO", "dance_kernel"]


def dance_kernel(eta: float, times: Tensor) -> Windowed:
    """Return constant noise on all steps but the last, which ends at x̂0; a sampler of one step draws noise there.

    Args:
        eta: noise level.
        times: ``(K + 1,)`` of the sampler.
    """
    return Windowed(EulerMaruyama(Constant(eta)), levels_between(times, 0, max(len(times) - 2, 1)))


@dataclass(frozen=True)
class DanceGRPO(Training):
    """DanceGRPO.

    Attributes:
        eta: noise level: .3 FLUX, .25 HunyuanVideo.
        clip: range of the per-dimension ratio.
        fraction: part of each sample's steps that is trained, drawn per sample.
        keep: train on the best and the worst so many samples of a group each; 0 for all.
        shared_noise: one initial noise per group.
        per_reward: normalise each reward in the group, then add.
    """

    name: ClassVar[str] = "dance-grpo"
    summary: ClassVar[str] = "constant noise, shared initial noise, random part of the steps, best and worst samples"
    reference: ClassVar[str] = """@article{xue2025dancegrpo,
  title={{DanceGRPO}: Unleashing {GRPO} on Visual Generation}, author={Xue, Zeyue and Wu, Jie and Gao, Yu and others},
  journal={arXiv preprint arXiv:2505.07818}, year={2025}}"""

    eta: float = 0.3
    clip: float = 1e-4
    fraction: float = 0.6
    keep: int = 0
    shared_noise: bool = True
    per_reward: bool = False

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices; the last step draws no noise and is not trained."""
        kernel = dance_kernel(self.eta, times)
        parts: list[Thin] = [extremes(self.keep, self.keep)] if self.keep else []
        return Recipe(
            kernel,
            Clip(kernel, self.clip),
            credit=Group(Normalise(unbiased=True, eps=1e-8), self.per_reward),
            shared_noise=self.shared_noise,
            thin=chain(*parts, random_steps(self.fraction)),
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for FLUX.1-dev, and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(
                    iterations=300, groups=8, size=12, steps=16, batch=1, accumulate=0, lr=1e-5, max_grad_norm=0.01
                ),
                None,
                ema=0.995,
                note="FLUX.1-dev 720 px, shift 3, guidance embedding 3.5, all weights; the recipe for 8 GPUs, with one "
                "optimiser step a rollout. Not run here.",
            ),
            "published-video": Preset(
                cls(eta=0.25, keep=4),
                # two optimiser steps a rollout: each after 4 of a prompt's 8 kept samples, with 9 of 15 steps of each
                FitOptions(iterations=300, groups=8, size=24, steps=16, batch=1, accumulate=8 * 4 * 9, lr=1e-5),
                None,
                note="HunyuanVideo 480 px, 53 frames, shift 5, guidance 6: the best 4 and the worst 4 of 24 (bestofn "
                "is 8 in the code). Not run here.",
            ),
            "demo": Preset(
                cls(clip=1e-3, eta=0.5),
                FitOptions(iterations=400, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes: all weights.",
            ),
            "demo-lora": Preset(cls(clip=1e-3), FitOptions(lr=1e-3), Lora(), guidance=False),
        }
