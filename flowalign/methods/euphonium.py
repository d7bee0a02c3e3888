"""Euphonium: a process reward steers the sampler, and training distils the steering into the policy (2602.04928).

    sampling   mean += c · ∇_x V_φ(x_t, t)                          late steps only
               c = scale, or g²/2β with the law's noise g;  times t - s, over the gradient's norm, where asked for
    training   log-density of the guided sample under the *unguided* mean
    credit     PPO(A_outcome) + PPO(A_process,k):  A_process from V_φ(x_{k+1}) in the group at each step

V_φ is the toolkit's latent value network, learnt from the same rollouts and saved with the result; ``gradient="spsa"``
takes the zero-order gradient of the reward of x̂0 in its place, ``mean_i (r(x̂0 + σu_i) - r(x̂0 - σu_i)) / 2σ · u_i``,
which is applied as if it were that of x_t, as published. The published code credits a step with V of the state it
leaves, and late steps alone; here it is the state stepped to, which the step had a part in, at every step.

With scale 0 and process weight 0 this is DanceGRPO bit for bit; with ``noise_law="flow"``, ``std="batch"``,
``fraction=1`` and ``shared_noise=False`` besides, Flow-GRPO without its penalty. Their last step, which nobody is
trained on, is not guided either: the push would stay in the picture. The kernel's proposal adds std² times what a
guide gives, so the guide gives ``c / std² · ∇V``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.credit import Credit, Group, Levels, Normalise
from flowalign.experience import Experience
from flowalign.guidance import Along, Guide
from flowalign.kernels import EulerMaruyama, Kernel
from flowalign.laws import Constant, FlowGrpo, NoiseLaw
from flowalign.methods.base import Preset, Training, levels_between
from flowalign.methods.dance_grpo import dance_kernel
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.process import Posterior, Time
from flowalign.recipe import Recipe
from flowalign.spsa import Judged, Spsa, unit
from flowalign.thinning import random_steps
from flowalign.valuenet import ValueLearner

__all__ = ["DualReward", "Euphonium"]

NORMALISE = {"group": Normalise(unbiased=True, eps=1e-8), "batch": Normalise(scale="batch")}


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
    normalise: Normalise = NORMALISE["group"]

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
        std: advantages over the deviation of the group (DanceGRPO's: unbiased, + 1e-8) or of the batch (Flow-GRPO's:
            population, + 1e-4).
        scale: of the gradient added to the mean (published: .01); 0 for no guidance.
        beta: β of g²/2β, which is then the scale, ``scale`` being left out; none for ``scale`` itself.
        dt: the scale is times the step's length (the published script's choice).
        norm: the gradient of each sample is divided by its norm.
        gradient: of the value network, or SPSA's of the reward of the posterior mean: two decodes and judgements for
            each probe at each guided step.
        probes: directions of SPSA.
        probe: their length σ.
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
    std: Literal["group", "batch"] = "group"
    scale: float = 0.01
    beta: float | None = None
    dt: bool = False
    norm: bool = False
    gradient: Literal["network", "spsa"] = "network"
    probes: int = 1
    probe: float = 0.01
    start: float = 0.75
    process: float = 1.0
    clip: float = 1e-4
    fraction: float = 0.6
    shared_noise: bool = True
    width: int = 64

    def __post_init__(self) -> None:
        if self.beta is not None and (self.beta <= 0 or self.scale == 0):
            raise ValueError(f"need beta > 0 and scale != 0 (it guides); got {self.beta} and {self.scale}.")
        if self.probes < 1 or self.probe <= 0:
            raise ValueError(f"need probes >= 1 and probe > 0; got {self.probes} and {self.probe}.")

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
            credit=DualReward(value, self.process, NORMALISE[self.std]),
            guide=guide,
            shared_noise=self.shared_noise,
            trained=lambda level, t, s: level < steps - 1 or steps == 1,
            thin=random_steps(self.fraction),
            learners=(value,),
        )

    def _guide(self, times: Tensor, law: NoiseLaw, value: ValueLearner) -> Guide:
        grid = torch.as_tensor(times, dtype=torch.float64)
        last = max(len(grid) - 2, 1)
        first = min(round(self.start * (len(grid) - 1)), last - 1)
        late = levels_between(times, first, last)

        def factor(posterior: Posterior, t: Time) -> float:
            k = int((grid - float(t)).abs().argmin())
            g = float(law(posterior.process, float(grid[k]), float(grid[k + 1])))
            dt = float(grid[k] - grid[k + 1])
            c = self.scale if self.beta is None else g**2 / (2 * self.beta)
            return c * (dt if self.dt else 1.0) / (g**2 * dt)

        def push(x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
            at = torch.full((len(x),), float(t), dtype=torch.float64)
            found = value.gradient(x, at, row)
            return factor(posterior, t) * (unit(found) if self.norm else found)

        def judged(x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
            found = probing(posterior.x0, float(t), row)
            return factor(posterior, t) * (unit(found) if self.norm else found)

        def window(t: float) -> bool:
            return late(t, 0.0)

        if self.gradient == "network":
            return Along(push, where="proposal", weighted=False, window=window)
        probing = Spsa(self.probes, self.probe)
        return Judged(judged, where="proposal", weighted=False, window=window, probing=probing)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for HunyuanVideo, and the demo's."""
        return {
            "published": Preset(
                cls(dt=True),
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
