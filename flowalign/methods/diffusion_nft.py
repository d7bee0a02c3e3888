"""DiffusionNFT: reinforcement on the forward process (Zheng et al. 2509.16117).

    r  = ½ + ½ clip(A / A_max, -1, 1)
    v⁺ = β v + (1-β) v_old,   v⁻ = (1+β) v_old - β v
    L  = r ‖x̂0(v⁺) - x0‖²/w⁺ + (1-r) ‖x̂0(v⁻) - x0‖²/w⁻ + kl · mean (v - v_ref)²

Samples of the old policy, drawn by any solver, are noised again; no likelihood is needed and no guidance is used. The
penalty towards the base decides how many different pictures survive: see the demo's report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from flowalign.batches import TimeLaw
from flowalign.credit import Group, Normalise
from flowalign.kernels import EulerMaruyama, Kernel, SecondOrder
from flowalign.methods.base import Preset, Training
from flowalign.objectives.nft import DiffusionNFT as Loss
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe

__all__ = ["DiffusionNFT"]


@dataclass(frozen=True)
class DiffusionNFT(Training):
    """DiffusionNFT.

    Attributes:
        beta: mixing of the implicit policies.
        limit: advantages are divided by it and clipped to ±1.
        kl: weight of the penalty towards the base model.
        low: earliest time to which samples are noised.
        high: latest time.
        old: how the sampling policy trails: ``published``, decay min(rate·n, most), on policy at first and lagging more
            and more; ``catching-up``, 1 - min(rate·n, most), nearly frozen at first.
        rate: growth per iteration.
        most: its bound.
        solver: dpm2 (published) or euler.
        std: advantages are divided by the standard deviation of the group or of the batch.
    """

    name: ClassVar[str] = "diffusion-nft"
    summary: ClassVar[str] = "contrast of good and bad samples on the forward process; any solver, no likelihood"
    reference: ClassVar[str] = """@article{zheng2025diffusionnft,
  title={{DiffusionNFT}: Online Diffusion Reinforcement with Forward Process},
  author={Zheng, Kaiwen and Chen, Huayu and Ye, Haotian and Wang, Haoxiang and Zhang, Qinsheng and Jiang, Kai and
          Su, Hang and Ermon, Stefano and Zhu, Jun and Liu, Ming-Yu},
  journal={arXiv preprint arXiv:2509.16117}, year={2025}}"""

    beta: float = 1.0
    limit: float = 5.0
    kl: float = 1e-4
    low: float = 0.0
    high: float = 1.0
    old: Literal["published", "catching-up"] = "published"
    rate: float = 0.001
    most: float = 0.5
    solver: Literal["dpm2", "euler"] = "dpm2"
    std: Literal["group", "batch"] = "group"

    def decay(self) -> Callable[[int], float]:
        """Return the decay of the old policy by update number."""
        if self.old == "published":
            return lambda n: min(self.rate * n, self.most)
        return lambda n: 1.0 - min(self.rate * n, self.most)

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices."""
        kernel: Kernel = SecondOrder() if self.solver == "dpm2" else EulerMaruyama()
        loss = Loss(self.beta, self.limit, self.kl, TimeLaw(self.low, self.high))
        return Recipe(kernel, loss, credit=Group(Normalise(scale=self.std)), role="old", old=self.decay())

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for SD3.5-M, and the demo's."""
        shared = cls(limit=1.0, kl=0.3, low=0.3, old="catching-up", rate=0.02, solver="euler")
        fit = FitOptions(iterations=400, groups=8, size=16, steps=10, updates=2, batch=64, lr=6e-4, betas=(0.9, 0.99),
                         weight_decay=0.0, warmup=5)  # fmt: skip
        return {
            "published": Preset(
                cls(),
                FitOptions(iterations=1000, groups=48, size=24, batch=24, accumulate=0, lr=3e-4),
                Lora(),
                guidance=False,
                note="SD3.5-M: 10 steps, no guidance, one optimiser step per rollout. Not run here.",
            ),
            "unregularised": Preset(
                replace(shared, kl=0.0), fit, None, guidance=False,
                note="shapes, without the penalty: as much gain at fewer layouts and twice the drift.",
            ),
            "demo": Preset(
                shared, fit, None, guidance=False,
                note="shapes: all weights; 15 to 20 points on mixed scenes in four minutes, 97 % of the layouts.",
            ),
            "demo-long": Preset(
                shared, replace(fit, groups=12, batch=96, lr=3e-4), None, ema=0.97, guidance=False,
                note="shapes, 20 minutes: at 4e-4 or more and 8 groups the drift runs away after 80 to 180 iterations.",
            ),
        }  # fmt: skip
