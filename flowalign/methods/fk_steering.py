"""Feynman-Kac steering: particles weighted by intermediate rewards, exactly (Singhal et al. 2501.06848; TDS, DAS).

    weight of a lineage   Π G_k = exp(λ r(x0)) for every potential;  target  p(x0) exp(λ r(x0)) / Z

Weights are carried on where a level is not resampled and the last one is kept: the reference implementation drops both
and in its adaptive mode hardly steers. All weighted particles are returned, and ``log Ẑ`` (unbiased in natural scale
for a fixed schedule). ``twist`` moves the proposal along the reward's gradient and corrects the weights for it (TDS,
2306.17775); ``temper`` raises the target gradually (DAS, 2501.05803): by its geometric schedule, or adaptively on the
ESS (biased, O(1/N)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from flowalign.guidance import Twist
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.particles import finish, noisy_kernel, roll, rows_of
from flowalign.methods.promises import promise
from flowalign.options import FitOptions
from flowalign.potentials import Difference, Immediate, Maximum, Potential, Sum, Tempered
from flowalign.potentials.tempered import geometric
from flowalign.selection import Resample

__all__ = ["FKSteering"]

POTENTIALS: dict[str, Callable[..., Potential]] = {
    "difference": Difference,
    "maximum": Maximum,
    "sum": Sum,
    "immediate": Immediate,
}


@dataclass(frozen=True)
class FKSteering(Steering):
    """Feynman-Kac steering.

    Attributes:
        particles: per wanted result; all particles of a prompt form one system.
        potential: difference, maximum, sum, immediate.
        scale: λ; published: 10 with ImageReward.
        scheme: systematic, stratified, multinomial, residual, ssp.
        threshold: resample where the ESS is below this part of the particles; above 1 always.
        every: levels between potentials (and resamplings).
        noise: of the sampler: a of the flow's SDE, η of DDIM.
        lookahead: reward of the posterior mean (1), or after so many ODE steps.
        draws: more than 1: the soft mean of the rewards of so many draws around the posterior mean, in its place.
        data: deviation of clean states, which says how far those draws lie apart.
        learned: file of a value of noisy states in its place: flow-nrg's (option save) or Euphonium's (in a run's
            result, value/values.safetensors); "" for none.
        twist: strength of the gradient proposal, 1 for TDS; 0 for none. Needs a differentiable reward.
        temper: none, geometric (DAS), or adaptive on the ESS.
        gamma: of the geometric schedule.
    """

    name: ClassVar[str] = "fk-steering"
    summary: ClassVar[str] = "particles weighted and resampled by intermediate rewards (FK, TDS, DAS), with log Z"
    results: ClassVar[Literal["best", "last"]] = "last"
    reference: ClassVar[str] = """@article{singhal2025fk,
  title={A General Framework for Inference-time Scaling and Steering of Diffusion Models},
  author={Singhal, Raghav and Horvitz, Zachary and Teehan, Ryan and Ren, Mengye and Yu, Zhou and McKeown, Kathleen and
          Ranganath, Rajesh}, journal={arXiv preprint arXiv:2501.06848}, year={2025}}"""

    particles: int = 4
    potential: Literal["difference", "maximum", "sum", "immediate"] = "difference"
    scale: float = 10.0
    scheme: Literal["systematic", "stratified", "multinomial", "residual", "ssp"] = "systematic"
    threshold: float = 0.5
    every: int = 1
    noise: float = 0.7
    lookahead: int = 1
    draws: int = 1
    data: float = 1.0
    learned: str = ""
    twist: float = 0.0
    temper: Literal["none", "geometric", "adaptive"] = "none"
    gamma: float = 0.008

    def __post_init__(self) -> None:
        if self.particles < 2 or self.lookahead < 1 or self.every < 1:
            got = f"{self.particles}, {self.lookahead}, {self.every}"
            raise ValueError(f"need particles >= 2, lookahead >= 1 and every >= 1; got {got}.")
        if self.draws < 1 or self.data <= 0:
            raise ValueError(f"need draws >= 1 and data > 0; got {self.draws} and {self.data}.")
        if (self.lookahead > 1) + (self.draws > 1) + bool(self.learned) > 1:
            raise ValueError("particles are judged in one way: choose one of lookahead > 1, draws > 1 and learned.")

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield the weighted particles of all prompts, each prompt its own system in one batch.

        Raises:
            ValueError: for a gradient proposal on a reward without gradients, before any sampling.
        """
        if self.twist and not task.judge.scorer.differentiable:
            raise ValueError(
                "a twisted proposal follows the reward's gradient, and not every reward here has one. Set twist=0, or "
                "use differentiable rewards (see flowalign rewards)."
            )
        rows = rows_of(task, per_sample=False)
        tree = roll(
            rows, noisy_kernel(task.policy.process, self.noise),
            rows.enter(self.particles * int(task.draw.samples.max())),
            value=promise(
                rows, self.scale, steps=self.lookahead, draws=self.draws, data=self.data, learned=self.learned
            ),
            potential=self._potential(),
            select=Resample(self.scheme, self.threshold, self.every), guide=self._guide(task),
        )  # fmt: skip
        yield replace(finish(rows, tree), log_z=tree.log_evidence())

    def _potential(self) -> Potential:
        levels = None if self.every == 1 else (lambda k: k % self.every == 0)
        if self.temper == "none":
            return POTENTIALS[self.potential](self.scale, levels)
        # the published schedule over 100 steps, as a function of t: it keeps its shape on any grid
        return Tempered(self.scale, levels, geometric(self.gamma, 100) if self.temper == "geometric" else None)

    def _guide(self, task: Task) -> Twist | None:
        if not self.twist:
            return None
        last = float(task.times[-2])
        rise = (lambda t: 1.0) if self.temper != "geometric" else geometric(self.gamma, 100)
        # the last step's noise stays in the picture: no push there
        return Twist(lambda t: self.twist * self.scale * rise(t), window=lambda t: t > last)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings, and the demo's."""
        return {
            "published": Preset(
                cls(every=20, potential="maximum", noise=1.0), FitOptions(steps=100, size=1),
                note="SD, DDIM η = 1, 100 steps, resampling every 20. Not run here.",
            ),
            "published-das": Preset(
                cls(scheme="ssp", twist=1.0, temper="geometric", noise=1.0, scale=200.0), FitOptions(steps=100, size=1),
                note="DAS, aesthetic score with α = .005. Not run here.",
            ),
            "demo": Preset(cls(particles=8, scale=5.0), FitOptions(steps=10, size=4), guidance=False, note="shapes."),
        }  # fmt: skip
