"""Talk2Move: choose the exit step by reward variance, train up to it, jump to the end (2601.02356).

Before training, for each candidate K: sample K stochastic steps, take one step to the data, and measure the variance of
the rewards within groups; the K with the largest has the most to learn from. The candidates share one chain, left at
each K, so that they cost the evaluations of the longest alone. Training then runs K stochastic steps and
the jump: K + 1 network calls in place of all of them. Groups may hold textual variations of one instruction
(``Prompt.variants``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowalign.credit import Group, Normalise
from flowalign.experience import Experience
from flowalign.kernels import EulerMaruyama, Windowed
from flowalign.laws import FlowGrpo
from flowalign.methods.base import Preset, Training
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Learner, Recipe

__all__ = ["Exit", "Talk2Move"]


class Exit(Learner):
    """The exit step, chosen once before training and kept.

    Args:
        times: of the sampler.
        candidates: exit steps to try.
        rounds: rollouts to measure on.
    """

    def __init__(self, times: Tensor, candidates: tuple[int, ...], rounds: int = 1) -> None:
        steps = len(times) - 1
        bad = [k for k in candidates if not 1 <= k < steps]
        if bad or not candidates:
            raise ValueError(
                f"exit steps must lie in 1 to {steps - 1} for {steps} sampling steps; got {list(candidates)}."
            )
        self.times = torch.as_tensor(times, dtype=torch.float64)
        self.candidates, self.rounds, self.step = candidates, rounds, candidates[0]
        self.variances: dict[int, float] = {}

    def grid(self, grid: Tensor) -> Tensor:
        """Return the first ``step`` steps and a jump to the last time."""
        return torch.cat([grid[: self.step + 1], grid[-1:]])

    def inside(self, t: float, s: float) -> bool:
        """Return whether the step from t is one of the stochastic ones."""
        return int((self.times - t).abs().argmin()) < self.step

    def before(self, collector: Any, source: Any, options: Any) -> None:
        """Measure the reward variance of each candidate on one shared chain, and keep the best."""
        from flowalign.collect import collect

        self.step = max(self.candidates)  # the candidates' chains are the beginnings of the longest one's
        spread: dict[int, list[float]] = {k: [] for k in self.candidates}
        keeping = replace(collector, recipe=replace(collector.recipe, keep=True))
        for i in range(self.rounds):
            e = collect(keeping, source.draw(i, options.groups, options.size), -1 - i)
            for k in self.candidates:
                total, row = self._leave(e, k)
                group = e.group[row]
                spread[k] += [float(total[group == g].var(correction=0)) for g in group.unique()]
        self.variances = {k: sum(v) / len(v) for k, v in spread.items()}
        self.step = max(self.variances, key=lambda k: self.variances[k])

    def _leave(self, e: Experience, k: int) -> tuple[Tensor, Tensor]:
        """Return rewards and rows ``(N,)`` of the chain left after k steps: the network was asked there already."""
        leaves = e.trajectory.leaves
        if k == self.step:
            return e.total.detach().cpu(), leaves.row
        nodes = e.trajectory.at(k)
        assert nodes.posterior is not None
        t, end = float(e.trajectory.times[k]), float(e.trajectory.times[-1])
        with torch.no_grad(), e.policy.ledger.phase("reward"):
            ends = EulerMaruyama()(nodes.x, nodes.posterior, t, end)[0].mean
            return e.judge(ends, nodes.row).detach().cpu(), nodes.row

    def state_dict(self) -> dict[str, Any]:
        """Return the choice."""
        return {"step": self.step, "variances": {str(k): v for k, v in self.variances.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.step = int(state["step"])
        self.variances = {int(k): float(v) for k, v in state["variances"].items()}


@dataclass(frozen=True)
class Talk2Move(Training):
    """Talk2Move.

    Attributes:
        noise: level a of the Flow-GRPO law.
        exits: candidate exit steps.
        rounds: rollouts on which the candidates are measured.
        clip: range of the per-dimension ratio.
        kl: weight of the penalty towards the base model.
    """

    name: ClassVar[str] = "talk2move"
    summary: ClassVar[str] = "exit step chosen by reward variance; train up to it, then jump to the end"
    reference: ClassVar[str] = """@article{talk2move2026,
  title={{Talk2Move}: Reinforcement Learning for Text-Instructed Object-Level Geometric Transformation in Scenes},
  journal={arXiv preprint arXiv:2601.02356}, year={2026}}"""

    noise: float = 1.0
    exits: tuple[int, ...] = (2, 4, 6, 8)
    rounds: int = 1
    clip: float = 2e-4
    kl: float = 0.0

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices."""
        exit_ = Exit(times, tuple(k for k in self.exits if k < len(times) - 1), self.rounds)
        kernel = Windowed(EulerMaruyama(FlowGrpo(self.noise)), exit_.inside)
        return Recipe(
            kernel,
            Clip(kernel, self.clip, kl=self.kl),
            credit=Group(Normalise()),
            grid=exit_.grid,
            learners=(exit_,),
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for Qwen-Image-Edit, and the demo's."""
        fit = FitOptions(iterations=400, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0)
        return {
            "published": Preset(
                cls(),
                replace(fit, iterations=1000, size=12, batch=1, accumulate=0, lr=1e-4),
                Lora(rank=64, alpha=128),
                note="Qwen-Image-Edit on 16 H200 after a supervised cold start, whose rank 64 and learning rate 1e-4 "
                "are taken here: those of the policy gradient are not known. Not run here.",
            ),
            "demo": Preset(cls(clip=1e-3), fit, None, guidance=False, note="shapes-edit: all weights."),
        }
