"""Distil a steered sampler: search becomes training.

    weighted samples of FK steering or Diffusion Tree Sampling  →  weighted flow matching  →  the generator itself

The teacher is the frozen base model under a search; the student is the model that is trained. For a prompt, N particles
with weights W_i (summing to one) and evidence Ẑ satisfy ``E[Ẑ Σ W_i f(x_i)] = Z E_tilted[f]`` for any N, so that

    loss = mean_i  N W_i Ẑ / Z̄ · ‖v_θ(x_t) - (α̇ x_i + σ̇ ε)‖²

has the velocity of the tilted distribution as its optimum, without the bias of self-normalised weights. Z̄, a running
mean over earlier iterations of the same prompt, does not depend on the present draw: it only sets the size of the step.
What is learnt is the tilt of what the *sampler* draws; its steps are the teacher's own error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowalign.batches import TimeLaw
from flowalign.collect import Collector
from flowalign.credit import Credit, Levels
from flowalign.experience import Experience
from flowalign.kernels import EulerMaruyama
from flowalign.methods.base import Candidates, Preset, Steering, Task, Training
from flowalign.methods.dts import DTS
from flowalign.methods.fk_steering import FKSteering
from flowalign.noise import mix
from flowalign.objectives.matching import FlowMatching
from flowalign.options import FitOptions
from flowalign.recipe import Recipe
from flowalign.scorer import Bound
from flowalign.source import Draw
from flowalign.trajectory import Nodes, Trajectory, row_lse

__all__ = ["Distil", "Evidence"]


class Evidence(Credit):
    """Credits every leaf with its importance weight: ``N W_i``, times ``Ẑ / Z̄`` of its prompt.

    Args:
        evidence: whether to multiply by Ẑ / Z̄; without it weights are self-normalised, which is biased as 1/N.
    """

    def __init__(self, evidence: bool = True) -> None:
        self.evidence = evidence
        self.seen: dict[str, list[float]] = {}  # prompt → log Z̄ and how often it was seen

    def __call__(self, experience: Experience) -> Levels:
        """Return weights of mean one, roughly, for the leaves alone."""
        tree, prompts = experience.trajectory, experience.cond.prompts
        leaves = tree.leaves
        count = torch.bincount(leaves.row, minlength=tree.n_rows)
        weight = tree.weights() * count[leaves.row].to(leaves.log_w)
        if self.evidence:
            gain = torch.tensor([self._relative(prompts[r], z) for r, z in enumerate(tree.log_evidence().tolist())])
            weight = weight * gain.to(weight)[leaves.row.to(weight.device)]
        out: Levels = [None] * len(tree.levels)
        out[-1] = weight
        return out

    def _relative(self, prompt: str, log_z: float) -> float:
        """Return ``Ẑ / Z̄`` of the draws before this one, and count it in."""
        mean, n = self.seen.get(prompt, [log_z, 0.0])
        both = torch.tensor([mean, log_z], dtype=torch.float64)
        parts = torch.tensor([n, 1.0], dtype=torch.float64).log()
        self.seen[prompt] = [float((both + parts).logsumexp(0) - torch.tensor(n + 1.0).log()), n + 1]
        return float(torch.tensor(log_z - mean).exp())

    def state_dict(self) -> dict[str, Any]:
        """Return the running evidence by prompt."""
        return {"seen": {k: list(v) for k, v in self.seen.items()}} if self.seen else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.seen = {k: list(v) for k, v in state.get("seen", {}).items()}


@dataclass(frozen=True)
class Distil(Training):
    """Distil a steered sampler.

    Attributes:
        teacher: fk (weighted particles, ``fit.size`` in one system) or dts (``fit.size`` walks of one tree per prompt).
        scale: λ of the tilt ``p exp(λ r)``.
        noise: of the teacher's sampler: a of the flow's SDE, η of DDIM.
        threshold: fk: resample where the ESS is below this part of the particles.
        potential: fk: difference, maximum, sum, immediate.
        rounds: dts: rollouts per prompt.
        widen: dts: C of progressive widening.
        power: dts: α of progressive widening.
        evidence: weights carry Ẑ, so that their mean is unbiased for any number of particles.
        frozen: the teacher searches the frozen base; False lets it search the student, whose tilt then grows.
        low: earliest time of the re-noised samples.
    """

    name: ClassVar[str] = "distil"
    summary: ClassVar[str] = "weighted samples of a search (FK, DTS) as data for weighted flow matching"
    reference: ClassVar[str] = """@article{singhal2025fk,
  title={A General Framework for Inference-time Scaling and Steering of Diffusion Models},
  author={Singhal, Raghav and Horvitz, Zachary and Teehan, Ryan and Ren, Mengye and Yu, Zhou and McKeown, Kathleen and
          Ranganath, Rajesh}, journal={arXiv preprint arXiv:2501.06848}, year={2025},
  note={the teacher; its distillation by weighted flow matching is this project's}}"""

    teacher: Literal["fk", "dts"] = "fk"
    scale: float = 5.0
    noise: float = 0.7
    threshold: float = 0.5
    potential: Literal["difference", "maximum", "sum", "immediate"] = "difference"
    rounds: int = 32
    widen: float = 1.0
    power: float = 0.5
    evidence: bool = True
    frozen: bool = True
    low: float = 0.02

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices; the kernel is that of the plain samples, which this method draws none of."""
        return Recipe(
            EulerMaruyama(),
            FlowMatching(TimeLaw(low=self.low)),
            credit=Evidence(self.evidence and self.teacher == "fk"),
            role="reference" if self.frozen else "current",
            search=self.search,
        )

    def method(self, size: int) -> Steering:
        """Return the teacher's search for ``size`` samples of a prompt."""
        if self.teacher == "fk":
            return FKSteering(
                size, self.potential, self.scale, threshold=self.threshold, noise=self.noise
            )  # fmt: skip
        return DTS(
            self.rounds, self.scale, widen=self.widen, power=self.power, noise=self.noise, report=self.rounds
        )  # fmt: skip

    def search(self, collector: Collector, draw: Draw, judge: Bound, iteration: int) -> Trajectory:
        """Let the teacher search; return its samples and their weights as leaves without a past."""
        size = int(draw.samples.max())
        wanted = torch.ones_like(draw.samples) if self.teacher == "fk" else draw.samples
        task = Task(
            collector.pipeline, collector.policy, judge, replace(draw, samples=wanted),
            collector.pipeline.times(collector.steps), mix(collector.seed, iteration),
        )  # fmt: skip
        found: Candidates | None = None
        with collector.policy.playing("reference" if self.frozen else "current"), torch.no_grad():
            for latest in self.method(size).search(task):
                found = latest
        assert found is not None
        leaves = replace(Nodes.enter(found.x.detach(), found.row), log_w=found.log_w.detach())
        rows = len(draw.prompts)
        carried = row_lse(leaves.log_w, leaves.row, rows) - torch.bincount(leaves.row, minlength=rows).log()
        log_z = (
            torch.zeros(rows, dtype=torch.float64) if found.log_z is None else found.log_z.double() - carried.double()
        )
        return Trajectory(task.times[-1:], (leaves,), log_z.double())

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the demo's settings; there is no paper to publish any."""
        fit = FitOptions(iterations=200, groups=8, size=16, steps=10, updates=2, batch=128, lr=2e-4, weight_decay=0.0)
        return {
            "published": Preset(cls(noise=1.0), fit, note="no paper: the project's own. Not run on a large model."),
            "demo": Preset(cls(), fit, None, guidance=False, note="shapes: all weights, FK as the teacher."),
            "tree": Preset(cls("dts"), fit, None, guidance=False, note="shapes: all weights, DTS as the teacher."),
        }
