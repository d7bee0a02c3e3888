"""Flow-GRPO: policy gradient on a flow turned into an SDE (Liu et al. 2505.05470).

    x_s ~ N( x + [v + g²/2 ε̂/σ](s - t), g²(t - s) ),   g = a √(t / (1 - t))
    A   = (r - mean_group r) / (std r + 1e-4),  clamped to ±5
    L   = mean max(-A ρ, -A clip(ρ, 1 ± ε)) + β KL

``noise_law = "cps"`` takes the coefficient-preserving kernel (Flow-CPS, 2509.05952) and ``window`` confines noise and
training to a few early steps, the rest being the ODE (Flow-GRPO-Fast, MixGRPO).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from flowalign.credit import Group, Normalise
from flowalign.kernels import Ancestral, EulerMaruyama, Kernel, Windowed
from flowalign.laws import Cps, FlowGrpo
from flowalign.methods.base import Preset, Training, levels_between
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe

__all__ = ["FlowGRPO"]


@dataclass(frozen=True)
class FlowGRPO(Training):
    """Flow-GRPO.

    Attributes:
        noise: level a of the law: .7 for SD3.5, .9 FLUX, 1.2 Qwen-Image; .8 for cps.
        noise_law: flow, the paper's SDE; cps, coefficient-preserving sampling.
        window: first and last (exclusive) step that draws noise, the ODE elsewhere; none: every step draws noise. The
            sampler's last step is trained in no case. Published: none, whose last step has its noise too, so that
            a window of all steps but the last is another sampler; a window of all steps is the same one.
        clip: range of the ratio; none for no clipping.
        ratio: what is called the ratio: per_dim (published), mse (CPS's), density, guard.
        kl: weight of the penalty towards the base model.
        kl_scale: flow_grpo (the published code's), exact, velocity.
        std: advantages are divided by the standard deviation of the batch (published) or of the group.
        shared_noise: one initial noise for all samples of a prompt (``same_latent`` of the published code).
    """

    name: ClassVar[str] = "flow-grpo"
    summary: ClassVar[str] = "clipped policy gradient on the flow's SDE, group-relative advantages"
    reference: ClassVar[str] = """@inproceedings{liu2025flowgrpo,
  title={Flow-{GRPO}: Training Flow Matching Models via Online {RL}},
  author={Liu, Jie and Liu, Gongye and Liang, Jiajun and Li, Yangguang and Liu, Jiaheng and Wang, Xintao and
          Wan, Pengfei and Zhang, Di and Ouyang, Wanli},
  booktitle={Advances in Neural Information Processing Systems}, year={2025}, note={arXiv:2505.05470}}
@article{wang2025flowcps,
  title={Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching},
  author={Wang, Feng and Yu, Zihao}, journal={arXiv preprint arXiv:2509.05952}, year={2025}}"""

    noise: float = 0.7
    noise_law: Literal["flow", "cps"] = "flow"
    window: tuple[int, int] | None = None
    clip: float | None = 1e-4
    ratio: Literal["per_dim", "mse", "density", "guard"] = "per_dim"
    kl: float = 0.04
    kl_scale: Literal["flow_grpo", "exact", "velocity"] = "flow_grpo"
    std: Literal["batch", "group"] = "batch"
    shared_noise: bool = False

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices; the last step, whose noise would remain in the picture, is not trained."""
        steps = len(times) - 1
        inside: Kernel = EulerMaruyama(FlowGrpo(self.noise)) if self.noise_law == "flow" else Ancestral(Cps(self.noise))
        window = levels_between(times, *(self.window or (0, steps)))
        kernel: Kernel = inside if self.window is None else Windowed(inside, window)
        return Recipe(
            kernel,
            Clip(kernel, self.clip, self.ratio, self.kl, self.kl_scale),
            credit=Group(Normalise(scale=self.std)),
            shared_noise=self.shared_noise,
            trained=lambda level, t, s: level < max(steps - 1, 1) and window(t, s),
            keep=self.ratio == "guard",
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for SD3.5-M with PickScore, and the demo's."""
        fit = FitOptions(
            iterations=4000, groups=48, size=24, batch=9, accumulate=576, lr=3e-4, filter_groups=True, ema_every=8
        )
        one = cls(
            noise=0.6, noise_law="cps", window=(2, 3), clip=None, ratio="mse", kl=5e-4, kl_scale="velocity",
            shared_noise=True,
        )  # fmt: skip
        demo = FitOptions(iterations=400, groups=8, size=16, steps=6, batch=192, lr=2e-4, betas=(0.9, 0.99),
                          weight_decay=0.0, warmup=5)  # fmt: skip
        note = (
            "two optimiser steps per rollout, fewer where most groups have no variance and are left out. Not run here."
        )
        return {
            "published": Preset(
                cls(kl=0.01), fit, Lora(), note=f"SD3.5-M, PickScore: T = 10, guidance 4.5, {note}"
            ),
            "published-cps": Preset(
                cls(noise=0.8, noise_law="cps", clip=1e-5, ratio="mse", kl=0.0), fit, Lora(),
                note=f"Flow-CPS on SD3.5-M, {note}",
            ),
            "demo": Preset(
                one, demo, None, ema=0.97, guidance=False,
                note="shapes: all weights; of six steps one draws noise, from t = .8 to .67, and a group shares what "
                "comes before it (Flow-GRPO-Fast). Rough samples of six steps teach, ten are judged.",
            ),
            "demo-long": Preset(
                replace(one, kl=1e-3), replace(demo, lr=1e-4), None, ema=0.98, guidance=False,
                note="shapes, half an hour: smaller steps, more of them; 13 points at 99 % of the layouts.",
            ),
        }  # fmt: skip
