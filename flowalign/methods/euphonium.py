"""Euphonium: a process reward steers the sampler, and training distils the steering into the policy (2602.04928).

    sampling   mean += scale · ∇_x V_φ(x_t, t)                     late steps only
    training   log-density of the guided sample under the *unguided* mean
    credit     PPO(A_outcome) + PPO(A_process,k):  A_process from V_φ(x_{k+1}) in the group at each step

V_φ is the toolkit's latent value network, learnt from the same rollouts. With scale 0 and process weight 0 this is
DanceGRPO bit for bit, and with ``noise_law = "flow"`` Flow-GRPO; their last step, which nobody is trained on, is not
guided either: the push would stay in the picture. ``scale`` multiplies the gradient added to the mean; the kernel's
proposal adds std² times what a guide gives, so the guide gives ``scale / std² · ∇V``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.credit import Credit, Group, Levels, Normalise
from flowalign.experience import Experience
from flowalign.guidance import Along
from flowalign.kernels import EulerMaruyama, Kernel
from flowalign.laws import Constant, FlowGrpo, NoiseLaw
from flowalign.methods.base import Preset, Training, levels_between
from flowalign.methods.dance_grpo import dance_kernel
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.process import Posterior, Time
from flowalign.recipe import Recipe
from flowalign.thinning import random_steps
from flowalign.valuenet import ValueLearner

__all__ = ["DualReward", "Euphonium"]


@dataclass(frozen=True)
class DualReward(Credit):
    """Two columns per step: the outcome's advantage, and the process reward's at the state stepped to.

    Attributes:
        value: the process reward.
        weight: of the process column; 0 leaves the outcome alone, as one column.
        normalise: of both, within the group (the process reward per step).
    """

    value: ValueLearner
    weight: float = 1.0
    normalise: Normalise = field(default_factory=lambda: Normalise(unbiased=True, eps=1e-8))

    def __call__(self, experience: Experience) -> Levels:
        """Credit every step."""
        e = experience
        outcome = Group(self.normalise)(e)
        if not self.weight:
            return outcome
        out: Levels = []
        for k, (nodes, a) in enumerate(zip(e.trajectory.levels, outcome, strict=True)):
            if nodes is None or a is None:
                out.append(None)
                continue
            with torch.no_grad():
                v = self.value(nodes.x, e.trajectory.times[k].expand(len(nodes)), nodes.row).to(a)
            out.append(torch.stack([a, self.weight * self.normalise(v, e.group[nodes.row])], 1))
        return out


@dataclass(frozen=True)
class Euphonium(Training):
    """Euphonium.

    Attributes:
        eta: noise level of the law.
        noise_law: constant (DanceGRPO's, published) or flow (Flow-GRPO's).
        scale: of the gradient added to the mean (published: .01, or η²/2β with β = 3.125).
        start: fraction of the steps after which guidance begins (published: 12 of 16).
        process: weight of the process column.
        clip: range of the per-dimension ratio.
        fraction: part of each sample's steps that is trained.
        shared_noise: one initial noise per group.
        width: of the value network.
    """

    name: ClassVar[str] = "euphonium"
    summary: ClassVar[str] = "process-reward gradient in the drift, distilled; outcome and process credit"
    reference: ClassVar[str] = """@article{euphonium2026,
  title={Euphonium: Steering Video Flow Matching via Process Reward Gradient Guided Stochastic Dynamics},
  journal={arXiv preprint arXiv:2602.04928}, year={2026}}"""

    eta: float = 0.25
    noise_law: Literal["constant", "flow"] = "constant"
    scale: float = 0.01
    start: float = 0.75
    process: float = 1.0
    clip: float = 1e-4
    fraction: float = 0.6
    shared_noise: bool = True
    width: int = 64

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices; the last step is neither guided nor trained."""
        steps = len(times) - 1
        law: NoiseLaw = Constant(self.eta) if self.noise_law == "constant" else FlowGrpo(self.eta)
        kernel: Kernel = dance_kernel(self.eta, times) if self.noise_law == "constant" else EulerMaruyama(law)
        value = ValueLearner(self.width)
        guide = self._guide(times, law, value) if self.scale else None
        return Recipe(
            kernel,
            Clip(kernel, self.clip),
            credit=DualReward(value, self.process),
            guide=guide,
            shared_noise=self.shared_noise,
            trained=lambda level, t, s: level < steps - 1 or steps == 1,
            thin=random_steps(self.fraction),
            learners=(value,),
        )

    def _guide(self, times: Tensor, law: NoiseLaw, value: ValueLearner) -> Along:
        grid = torch.as_tensor(times, dtype=torch.float64)
        last = max(len(grid) - 2, 1)
        first = min(round(self.start * (len(grid) - 1)), last - 1)
        late = levels_between(times, first, last)

        def push(x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
            k = int((grid - float(t)).abs().argmin())
            g = float(law(posterior.process, float(grid[k]), float(grid[k + 1])))
            variance = g**2 * float(grid[k] - grid[k + 1])
            at = torch.full((len(x),), float(t), dtype=torch.float64)
            return self.scale / variance * value.gradient(x, at, row)

        return Along(push, where="proposal", weighted=False, window=lambda t: late(t, 0.0))

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for HunyuanVideo, and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(iterations=300, groups=8, size=8, steps=16, batch=1, accumulate=0, lr=1e-5),
                None,
                note="HunyuanVideo 480 px, 32 frames, shift 5. Not run here.",
            ),
            "demo": Preset(
                cls(eta=0.5, clip=1e-3, start=0.4),
                FitOptions(iterations=400, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes: all weights.",
            ),
        }
