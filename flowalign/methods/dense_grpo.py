"""DenseGRPO: every step is credited with its own gain, and explores as much as pays (2601.20218).

    R_k  = r(ODE(x_k)),   ΔR_k = R_{k+1} - R_k,   A_k = (ΔR_k - mean_group) / std_group         per step
    ψ(t) ← ψ(t) ± ε₂  as often as  |#{ΔR_k > 0} - #{ΔR_k < 0}| < ε₁ or not                       before training, then
    frozen

ψ(t) is the diffusion of the SDE itself: it takes the place of a √(t/(1-t)). Balanced signs mean that the noise neither
drowns the step's effect nor is too small to explore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowalign.credit import Gains, Normalise
from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo, Table
from flowalign.methods.base import Preset, Training
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.process import Rectified
from flowalign.recipe import Learner, Recipe

__all__ = ["Calibration", "DenseGRPO"]


class Calibration(Learner):
    """Algorithm 1: tune ψ(t) until the gains of each step are balanced in sign.

    Args:
        table: ψ, changed in place.
        gains: how a step's gain is measured.
        rounds: rollouts to calibrate on.
        tolerance: ε₁, difference of the counts that passes for balance, for 24 samples; scaled with their number.
        step: ε₂.
        floor: smallest ψ.
    """

    def __init__(
        self, table: Table, gains: Gains, rounds: int, tolerance: float = 2.0, step: float = 0.01, floor: float = 0.01
    ) -> None:
        self.table, self.gains, self.rounds = table, gains, rounds
        self.tolerance, self.step, self.floor = tolerance, step, floor

    def before(self, collector: Any, source: Any, options: Any) -> None:
        """Calibrate on ``rounds`` rollouts of the untrained policy."""
        from flowalign.collect import collect

        for i in range(self.rounds):
            e = collect(collector, source.draw(i, options.groups, options.size), -1 - i)
            self.update(self.gains.gains(e))

    def update(self, gains: list[Tensor]) -> None:
        """Move ψ by one step at each level, given the raw gains ``(N,)`` of each."""
        move = []
        for gain in gains[: len(self.table.values)]:
            lean = (gain > 0).sum() - (gain < 0).sum()
            balanced = lean.abs() < self.tolerance * max(1.0, len(gain) / 24)
            move.append(self.step if balanced else -self.step)
        self.table.values = (self.table.values + torch.tensor(move, dtype=torch.float64)).clamp_min(self.floor)

    def state_dict(self) -> dict[str, Any]:
        """Return ψ."""
        return self.table.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ψ."""
        self.table.load_state_dict(dict(state))


@dataclass(frozen=True)
class DenseGRPO(Training):
    """DenseGRPO.

    Attributes:
        noise: level a from which ψ(t) = a √(t/(1-t)) starts.
        completion: ODE steps of a completion; none for all that remain (best in the paper; 1 is worse than Flow-GRPO).
        rounds: rollouts of the calibration; 0 keeps ψ as it starts.
        tolerance: ε₁ for a group of 24.
        step: ε₂.
        clip: range of the per-dimension ratio.
        kl: weight of the penalty towards the base model.
    """

    name: ClassVar[str] = "dense-grpo"
    summary: ClassVar[str] = "each step is credited with the gain of its ODE completion; noise calibrated per step"
    reference: ClassVar[str] = """@inproceedings{densegrpo2026,
  title={{DenseGRPO}: From Sparse to Dense Reward for Flow Matching Model Alignment},
  booktitle={International Conference on Learning Representations}, year={2026}, note={arXiv:2601.20218}}"""

    noise: float = 0.7
    completion: int | None = None
    rounds: int = 20
    tolerance: float = 2.0
    step: float = 0.01
    clip: float = 1e-4
    kl: float = 0.04

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices; the last step is not trained."""
        grid = torch.as_tensor(times, dtype=torch.float64)
        law = FlowGrpo(self.noise)
        start = torch.stack([law(Rectified(), float(t), float(s)) for t, s in pairwise(grid)])
        table = Table(grid[:-1], start)
        kernel, gains = EulerMaruyama(table), Gains(Normalise(), self.completion)
        last = len(grid) - 2
        return Recipe(
            kernel,
            Clip(kernel, self.clip, kl=self.kl),
            credit=gains,
            trained=lambda level, t, s: level < last or last == 0,
            learners=(Calibration(table, gains, self.rounds, self.tolerance, self.step),),
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for SD3.5-M, and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(iterations=4500, groups=48, size=24, batch=9, accumulate=0, lr=3e-4),
                Lora(),
                note="SD3.5-M GenEval on 16 A100, T = 10, n = t. The paper's batch of 144, accumulated 8 times, is "
                "read as 16 GPUs x 9 samples, 8 times: the 48 groups of 24 of one rollout, one optimiser step. Not run "
                "here.",
            ),
            "demo": Preset(
                cls(clip=1e-3, kl=0.0, rounds=10),
                FitOptions(iterations=400, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes: all weights.",
            ),
        }
