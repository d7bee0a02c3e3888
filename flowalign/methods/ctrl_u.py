"""Ctrl-U: reward gradients weighed by how sure the reward is of itself (Zhang et al. 2410.11236).

A clean sample is noised ``n`` times over to one time t ≤ t_max and brought back in one step each; the reward of what
differs by noise alone should agree, and where it does not it is no guide:

    ℓ_ij = relu(τ - r(x̂0_ij)),   U_i = mean_{j < j'} |r_ij - r_ij'|,   L = mean_ij ℓ_ij e^{-U_i} + β mean_i U_i

U carries gradients too, as published: a sample can become cheaper by becoming surer. ``ceiling`` τ must lie above the
rewards, or e^{-U} weighs nothing. The published runs add the pre-training loss: ``restraint.pretrain`` or ``.mix``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowalign.batches import TimeLaw
from flowalign.collect import Collector
from flowalign.growth import Clean, Growth, clean_states, ends, fresh_noise, judged
from flowalign.kernels import EulerMaruyama
from flowalign.methods.base import Preset, Training
from flowalign.noise import mix
from flowalign.objectives.backprop import Grown
from flowalign.objectives.base import Losses, Objective, Wants, summary
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.recipe import Recipe
from flowalign.rollout import Tape
from flowalign.scorer import Bound
from flowalign.source import Draw

__all__ = ["CtrlU", "Doubted", "Noisings"]


class Noisings(Growth):
    """Grows one-step predictions of several noisings of each clean sample, all of one noising after the other.

    Args:
        count: noisings of a sample, at one time of its own.
        latest: largest time.
        start: whose samples are noised.
    """

    def __init__(self, count: int, latest: float, start: Clean) -> None:
        self.count, self.latest, self.start = count, latest, start

    def __call__(self, collector: Collector, draw: Draw, judge: Bound, iteration: int, tape: Tape) -> Grown:
        """Return the predictions with their rewards, ``(count · N)``."""
        x0, row = clean_states(collector, draw, judge, iteration, self.start)
        g = torch.Generator().manual_seed(mix(collector.seed, iteration, 41, draw.keys[0]))
        t = TimeLaw(0.02, self.latest).draw(len(x0), g).repeat(self.count)
        noise = torch.cat([fresh_noise(collector, draw, iteration, 42 + j, row, x0) for j in range(self.count)])
        x0, row = x0.repeat(self.count, *[1] * (x0.ndim - 1)), row.repeat(self.count)
        x = collector.policy.process.diffuse(x0, t, noise)
        with torch.enable_grad():
            end = collector.policy.posterior(x, t, judge.cond[row], checkpoint=tape.checkpoint).x0
        return Grown(ends(end, row), *judged(collector, judge, end, row))


class Doubted(Objective):
    """The uncertainty-weighted reward loss of ``count`` predictions of each sample.

    Args:
        count: predictions of a sample, in blocks of one of each.
        ceiling: τ.
        doubt: β, weight of the uncertainty itself.
    """

    wants: ClassVar[Wants] = "grown"

    def __init__(self, count: int = 2, ceiling: float = 1.0, doubt: float = 0.1) -> None:
        super().__init__()
        self.count, self.ceiling, self.doubt = count, ceiling, doubt

    def forward(self, policy: Policy, batch: Grown, cond: Any = None) -> Losses:
        """Return the weighted reward loss and the uncertainty.

        Raises:
            ValueError: if the reward gives no gradient.
        """
        if not batch.total.requires_grad:
            raise ValueError("Ctrl-U differentiates the reward, and this one returned scores without a graph.")
        r = batch.total.reshape(self.count, -1)
        gaps = torch.stack([(r[i] - r[j]).abs() for i, j in combinations(range(self.count), 2)])
        doubt = gaps.mean(0)
        loss = torch.relu(self.ceiling - r) * torch.exp(-doubt)
        terms = {"reward": loss.mean(), "doubt": self.doubt * doubt.mean()}
        return Losses(terms, {"reward": summary(r), "uncertainty": summary(doubt)})


@dataclass(frozen=True)
class CtrlU(Training):
    """Ctrl-U.

    Attributes:
        count: noisings of each sample.
        latest: largest time they are noised to (published: 400 of 1000 steps).
        ceiling: τ, above the best reward there is.
        doubt: β.
        start: what is noised: data (each prompt's meta["media"]; published), or the policy's own samples.
        checkpoint: recompute activations in the backward pass.
    """

    name: ClassVar[str] = "ctrl-u"
    summary: ClassVar[str] = "reward gradients weighed by the reward's own uncertainty over several noisings"
    reference: ClassVar[str] = """@article{zhang2024ctrlu,
  title={Ctrl-U: Robust Conditional Image Generation via Uncertainty-aware Reward Modeling},
  author={Zhang, Guiyu and Gao, Huan-ang and Jiang, Zijian and Zhao, Hao and Zheng, Zhedong},
  journal={arXiv preprint arXiv:2410.11236}, year={2024}}"""

    count: int = 2
    latest: float = 0.4
    ceiling: float = 1.0
    doubt: float = 0.1
    start: Clean = "samples"
    checkpoint: bool = True

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices.

        Raises:
            ValueError: for fewer than two noisings, or times outside (.02, 1].
        """
        if self.count < 2 or not 0.02 < self.latest <= 1:
            raise ValueError(
                f"uncertainty needs count >= 2 noisings, at times up to latest in (.02, 1]; got {self.count} and "
                f"{self.latest}."
            )
        return Recipe(
            EulerMaruyama(), Doubted(self.count, self.ceiling, self.doubt), credit=None,
            growth=Noisings(self.count, self.latest, self.start), tape=lambda i: Tape(0, self.checkpoint),
        )  # fmt: skip

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings (ControlNet on SD 1.5), and the demo's."""
        return {
            "published": Preset(
                cls(start="data"), FitOptions(iterations=55_000, groups=256, size=1, steps=20, batch=8, accumulate=0,
                                              lr=1e-5), None, note="With restraint.pretrain 1. Not run here.",
            ),
            "demo": Preset(
                cls(), FitOptions(iterations=200, groups=8, size=4, steps=10, batch=32, accumulate=0, lr=1e-4,
                                  weight_decay=0.0), None, guidance=False, note="shapes with shapes-clip.",
            ),
        }  # fmt: skip
