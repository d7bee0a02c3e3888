"""TurningPoint-GRPO: a step that turns the trend is credited with all that follows (2602.06422).

With ``R_k`` the reward of the ODE completion after k stochastic steps, ``R_ode = R_0`` and ``R_sde = R_K``,

    d_k = R_k - R_{k-1},     s_k = sign(d_k) · sign(R_sde - R_ode)
    k turns  iff  s_{k-1} < 0 < s_k  (the first step: s_1 > 0, optional)  and  sign(d_k) sign(R_sde - R_k) > 0
    credit of step k:  R_sde - R_{k-1} where it turns, d_k elsewhere;  normalised in the group at each step
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.credit import Credit, Levels, Normalise
from flowalign.experience import Experience
from flowalign.kernels import Ancestral, Windowed
from flowalign.laws import Cps
from flowalign.methods.base import Preset, Training, levels_between
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe

__all__ = ["TPGRPO", "TurningPoints", "turning_points"]


def turning_points(rewards: Tensor, first: bool = False) -> Tensor:
    """Return the credit of each step, ``(K, N)``, from the completions' rewards ``(K + 1, N)``.

    Args:
        rewards: ``R_0 ... R_K`` of each sample.
        first: whether the first step can be a turning point.
    """
    d = rewards[1:] - rewards[:-1]
    s = d.sign() * (rewards[-1] - rewards[0]).sign()
    before = torch.cat([torch.full_like(s[:1], -1.0 if first else 0.0), s[:-1]])
    lasting = d.sign() * (rewards[-1] - rewards[1:]).sign() > 0
    return torch.where((before < 0) & (s > 0) & lasting, rewards[-1] - rewards[:-1], d)


@dataclass(frozen=True)
class TurningPoints(Credit):
    """Step increments with aggregated credit at turning points.

    Attributes:
        normalise: per step within the group.
        first: whether the first step can turn.
        steps: ODE steps of a completion; None for all that remain.
    """

    normalise: Normalise = field(default_factory=Normalise)
    first: bool = False
    steps: int | None = None

    def __call__(self, experience: Experience) -> Levels:
        """Credit chains; each level's completions share one staircase."""
        e = experience
        raw = turning_points(torch.stack(e.completions(self.steps)), self.first)
        group = e.group[e.trajectory.leaves.row]
        return [None, *(self.normalise(c, group) for c in raw)]


@dataclass(frozen=True)
class TPGRPO(Training):
    """TurningPoint-GRPO.

    Attributes:
        noise: level of the cps kernel.
        window: first and last (exclusive) stochastic step; none for all but the last. 8 steps were best.
        first: whether the first step can be a turning point.
        completion: ODE steps of a completion; none for all that remain.
        clip: range of the cps ratio.
        kl: weight of the penalty towards the base model.
    """

    name: ClassVar[str] = "tp-grpo"
    summary: ClassVar[str] = "step increments; turning points carry the aggregated long-term reward"
    reference: ClassVar[str] = """@article{tpgrpo2026,
  title={TurningPoint-{GRPO}: Alleviating Sparse Reward by Modeling Step-wise and Long-term Sampling Effects},
  journal={arXiv preprint arXiv:2602.06422}, year={2026}}"""

    noise: float = 0.8
    window: tuple[int, int] | None = None
    first: bool = False
    completion: int | None = None
    clip: float = 1e-5
    kl: float = 0.0

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices."""
        window = levels_between(times, *(self.window or (0, max(len(times) - 2, 1))))
        kernel = Windowed(Ancestral(Cps(self.noise)), window)
        return Recipe(
            kernel,
            Clip(kernel, self.clip, "mse", self.kl),
            credit=TurningPoints(first=self.first, steps=self.completion),
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for SD3.5-M, and the demo's."""
        return {
            "published": Preset(
                cls(window=(0, 8)),
                FitOptions(iterations=2000, groups=48, size=24, batch=9, accumulate=0, lr=3e-4),
                Lora(),
                note="SD3.5-M, T = 10, 32 H20. Not run here.",
            ),
            "demo": Preset(
                cls(window=(0, 4), clip=1e-3),
                FitOptions(iterations=400, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes: all weights.",
            ),
        }
