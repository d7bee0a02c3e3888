"""G²RPO: one stochastic step at a time, judged at several granularities (Granular-GRPO, 2510.01982).

One ODE from one noise; at step k a group branches with one SDE step and goes on by the ODE, so the rewards of the group
differ by that step alone. From the states after the step the ODE is done again with strides λ = 1, 2, ...; the
advantage is normalised per stride and per reward among the siblings of a branch, and summed. One forward serves them
all before the branch; one level is trained per iteration, in turn.

With stride λ the completion of ``x_{k+1}`` visits levels k+2, k+2+λ, k+2+2λ, ... and data time, as published; where the
published grid ends before data time, its x̂0 is decoded, which is the same.

Different from the published: there one ODE of a prompt serves all levels, every k branching from it, with an optimiser
step each. Here each level is an iteration with prompts, noises and a prefix of its own, sampled by the newest policy:
the prefix of level k costs k evaluations a group, where the anchor's costs those of the last level once for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.credit import Credit, Levels, Normalise
from flowalign.experience import Experience
from flowalign.kernels import EulerMaruyama, Windowed
from flowalign.laws import FlowGrpo
from flowalign.methods.base import Preset, Training
from flowalign.noise import Noise
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.recipe import Recipe
from flowalign.rollout import rollout
from flowalign.trajectory import Nodes
from flowalign.windows import BranchAt, Cycle

__all__ = ["G2RPO", "Granular"]


@dataclass(frozen=True)
class Granular(Credit):
    """Advantages of the branched step from completions at several strides.

    Attributes:
        window: says which level branched.
        strides: λ; 1 is the rollout itself.
        normalise: per stride and per reward within the branch.
    """

    window: Cycle
    strides: tuple[int, ...] = (1, 2)
    normalise: Normalise = field(default_factory=lambda: Normalise(unbiased=True, eps=1e-8, clamp=None))
    clamp: float = 5.0

    def __call__(self, experience: Experience) -> Levels:
        """Credit the step into level k + 1 only."""
        e = experience
        level = self.window.bounds[0] + 1
        nodes = e.trajectory.at(level)
        branch = nodes.parent  # another one began with another noise: its rewards differ by more than this step
        total = torch.zeros(len(nodes), dtype=e.total.dtype, device=e.total.device)
        for stride in self.strides:
            rewards = e.rewards if stride == 1 else self._coarse(e, nodes, level, stride)
            for name, r in rewards.items():
                total = total + e.weights[name] * self.normalise(r.detach().to(total), branch)
        out: Levels = [None] * len(e.trajectory.levels)
        out[level] = total.clamp(-self.clamp, self.clamp)
        return out

    def _coarse(self, e: Experience, nodes: Nodes, level: int, stride: int) -> Mapping[str, Tensor]:
        """Complete the branched states by one step of the grid and every ``stride``-th time after it, to data time."""
        rest = e.trajectory.times[level:]
        x = nodes.x
        if len(rest) > 1:
            grid = torch.cat([rest[:1], rest[1:-1:stride], rest[-1:]])
            start = Nodes.enter(nodes.x.detach(), nodes.row)
            x = rollout(
                e.policy, EulerMaruyama(), grid, start, e.cond, noise=Noise(0), n_rows=e.trajectory.n_rows
            ).leaves.x
        with torch.no_grad():
            return e.scores(x, nodes.row)


@dataclass(frozen=True)
class G2RPO(Training):
    """Granular-GRPO.

    Attributes:
        noise: level a of the one stochastic step.
        levels: which steps branch, in turn.
        width: samples per branch; the group size must be a multiple of it.
        strides: granularities of the completion.
        clip: range of the per-dimension ratio.
    """

    name: ClassVar[str] = "g2rpo"
    summary: ClassVar[str] = "one stochastic step in an ODE, advantages over several denoising granularities"
    reference: ClassVar[str] = """@article{g2rpo2025,
  title={{G2RPO}: Granular {GRPO} for Precise Reward in Flow Models}, author={Zhou, Yujie and others},
  journal={arXiv preprint arXiv:2510.01982}, year={2025}}"""

    noise: float = 0.7
    levels: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    width: int = 12
    strides: tuple[int, ...] = (1, 2)
    clip: float = 1e-4

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices.

        Raises:
            ValueError: for levels outside the sampler.
        """
        window = Cycle(times, self.levels)
        kernel = Windowed(EulerMaruyama(FlowGrpo(self.noise)), window)
        return Recipe(
            kernel,
            Clip(kernel, self.clip),
            credit=Granular(window, self.strides),
            select=BranchAt(window, self.width),
            roots=lambda n: max(1, n // self.width),
            learners=(window,),
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for FLUX.1-dev, and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(iterations=301 * 8, groups=16, size=12, steps=16, batch=1, accumulate=0, lr=2e-6),
                None,
                note="FLUX.1-dev 720 px, shift 3, 16 GPUs; one iteration here is one level there, with prompts and "
                "noises of its own. Not run here.",
            ),
            "demo": Preset(
                cls(levels=(0, 1, 2, 3), width=16, clip=1e-3),
                FitOptions(iterations=400, groups=8, size=16, steps=10, batch=128, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes: all weights.",
            ),
        }
