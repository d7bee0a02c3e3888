"""MixGRPO: the SDE in a moving window, the ODE elsewhere (Li et al. 2507.21802), and Flow-GRPO-Fast.

Noise, log-probabilities and gradients are confined to a window of a few steps. ``progressive`` slides it from noise to
data, ``random`` draws it anew each iteration, by default from the early half (Flow-GRPO-Fast). Flash: after the window
the rest of the grid is compressed and taken by DPM-Solver++(2M).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.credit import Group, Normalise
from flowalign.kernels import Ancestral, EulerMaruyama, Kernel, SecondOrder, Windowed
from flowalign.laws import Cps, FlowGrpo
from flowalign.methods.base import Preset, Training
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe
from flowalign.windows import Random, Sliding, Window

__all__ = ["MixGRPO"]


@dataclass(frozen=True)
class MixGRPO(Training):
    """MixGRPO and Flow-GRPO-Fast.

    Attributes:
        noise: level of the law inside the window.
        noise_law: flow (MixGRPO) or cps (Flow-GRPO-Fast).
        width: steps in the window: 4 MixGRPO, 2 to 3 Fast.
        strategy: progressive or random.
        period: iterations between moves of a progressive window.
        stop: first step that no window reaches; none for the last step (progressive) or the second half (random).
        flash: part of the steps after the window that is left, taken by DPM-Solver++(2M); 1 for the plain ODE.
        clip: range of the ratio.
        shared_noise: one initial noise per group.
        per_reward: normalise each reward in the group, then add (``advantage_aggr``).
        std: advantages are divided by the standard deviation of the group (unbiased, + 1e-8: MixGRPO's) or of the batch
            (population, + 1e-4: Flow-GRPO's).
        seed: of the random strategy.
    """

    name: ClassVar[str] = "mix-grpo"
    summary: ClassVar[str] = "noise and gradients in a moving window of steps, the ODE elsewhere (also Flow-GRPO-Fast)"
    reference: ClassVar[str] = """@article{li2025mixgrpo,
  title={{MixGRPO}: Unlocking Flow-based {GRPO} Efficiency with Mixed {ODE-SDE}}, author={Li, Junzhe and others},
  journal={arXiv preprint arXiv:2507.21802}, year={2025}}"""

    noise: float = 0.7
    noise_law: Literal["flow", "cps"] = "flow"
    width: int = 4
    strategy: Literal["progressive", "random"] = "progressive"
    period: int = 25
    stop: int | None = None
    flash: float = 1.0
    clip: float = 1e-4
    shared_noise: bool = True
    per_reward: bool = True
    std: Literal["group", "batch"] = "group"
    seed: int = 0

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices; the window never reaches the last step, whose noise would stay in the picture.

        Raises:
            ValueError: for a window or a ``stop`` that do not fit the sampler.
        """
        window = self._window(times)
        inside: Kernel = EulerMaruyama(FlowGrpo(self.noise)) if self.noise_law == "flow" else Ancestral(Cps(self.noise))
        kernel = Windowed(inside, window, SecondOrder() if self.flash < 1 else EulerMaruyama())
        rule = Normalise(scale="batch") if self.std == "batch" else Normalise(unbiased=True, eps=1e-8)
        return Recipe(
            kernel,
            Clip(kernel, self.clip, "mse" if self.noise_law == "cps" else "per_dim"),
            credit=Group(rule, self.per_reward),
            shared_noise=self.shared_noise,
            grid=lambda grid: compressed(grid, window.bounds[1], self.flash),
            learners=(window,),
        )

    def _window(self, times: Tensor) -> Window:
        steps = len(times) - 1
        if self.stop is not None and not self.width <= self.stop <= max(self.width, steps - 1):
            raise ValueError(
                f"stop = {self.stop} does not fit a window of {self.width} in {steps} steps, of which the last is not "
                f"trained: use {self.width} to {max(self.width, steps - 1)}."
            )
        if self.strategy == "random":
            return Random(times, self.width, self.stop, self.seed)
        stop = max(self.width, steps - 1) if self.stop is None else self.stop
        return Sliding(times, self.width, 1, self.period, stop)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings (FLUX; Flash; Fast on SD3.5-M), and the demo's."""
        # four optimiser steps a rollout: each after 3 of a prompt's 12 samples, with the window's 4 steps of each
        fit = FitOptions(iterations=300, groups=8, size=12, steps=25, batch=1, accumulate=8 * 3 * 4, lr=1e-5)
        fast = cls(
            noise=0.8, noise_law="cps", width=2, strategy="random", clip=1e-5, shared_noise=False, per_reward=False,
            std="batch",
        )  # fmt: skip
        return {
            "published": Preset(cls(), fit, None, note="FLUX.1-dev, T = 25, all weights. Not run here."),
            "published-flash": Preset(cls(period=20, flash=0.4), fit, None, note="MixGRPO-Flash. Not run here."),
            "published-fast": Preset(
                fast,
                FitOptions(
                    iterations=4000, groups=48, size=24, batch=9, accumulate=128, filter_groups=True, ema_every=8
                ),
                Lora(),
                guidance=False,
                note="Flow-GRPO-Fast, SD3.5-M, no guidance, two optimiser steps per rollout. Not run here.",
            ),
            "demo": Preset(
                cls(clip=1e-3, width=3, period=10),
                FitOptions(iterations=400, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes: all weights.",
            ),
        }  # fmt: skip


def compressed(grid: Tensor, end: int, part: float) -> Tensor:
    """Return the grid with the steps after level ``end`` thinned to a part of them, end points kept."""
    rest = len(grid) - 1 - end
    if part >= 1 or rest < 2:
        return grid
    keep = torch.linspace(end, len(grid) - 1, max(1, round(rest * part)) + 1).round().long()
    return torch.cat([grid[:end], grid[keep.unique()]])
