"""Beam search over the stochastic sampler: keep the states whose posterior means the reward likes best.

    every few steps   of width × children states of a search keep the ``width`` best by  r(E[x0 | x_t]),
                      each with ``children`` children

One child per beam is best-of-N over the SDE; one beam is a blockwise search (CoDe, 2502.00968; SVDD's argmax at
``every = 1``). Each wanted result is a search of its own; all run in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.candidates import best_by_row, take
from flowalign.methods.particles import finish, noisy_kernel, roll, rows_of
from flowalign.options import FitOptions
from flowalign.potentials import Difference
from flowalign.selection import Top
from flowalign.values import Completion, Tweedie, Value

__all__ = ["Beam"]


@dataclass(frozen=True)
class Beam(Steering):
    """Beam search.

    Attributes:
        width: states kept per wanted result.
        children: of each kept state.
        every: steps between choices.
        noise: of the sampler: a of the flow's SDE, η of DDIM.
        lookahead: rank by the reward of the posterior mean (1), or after so many ODE steps.
    """

    name: ClassVar[str] = "beam"
    summary: ClassVar[str] = "keep the few states whose posterior means the reward likes best, branch, go on"
    results: ClassVar[Literal["best", "last"]] = "last"
    reference: ClassVar[str] = """@article{singh2025code,
  title={CoDe: Blockwise Control for Denoising Diffusion Models},
  author={Singh, Anuj and Mukherjee, Sayak and Beirami, Ahmad and Jamali-Rad, Hadi},
  journal={arXiv preprint arXiv:2502.00968}, year={2025}}"""

    width: int = 2
    children: int = 4
    every: int = 5
    noise: float = 0.7
    lookahead: int = 1

    def __post_init__(self) -> None:
        if self.width < 1 or self.children < 1 or self.every < 1 or self.lookahead < 1:
            raise ValueError(f"width, children, every and lookahead must be at least 1; got {self}.")

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield the best finished state of each beam.

        Raises:
            ValueError: for no noise: the children of a state would be copies of each other.
        """
        rows = rows_of(task, per_sample=True)
        keep = {k: self.width for k in range(self.every, len(task.times) - 1, self.every)}
        value: Value = Tweedie(rows.score)
        if self.lookahead > 1:
            value = Completion(task.policy, rows.score, rows.cond, self.lookahead)
        tree = roll(
            rows, noisy_kernel(task.policy.process, self.noise), rows.enter(self.width * self.children),
            value=value, potential=Difference(1.0, lambda k: k in keep), select=Top(keep, self.children),
        )  # fmt: skip
        found = finish(rows, tree)
        best = take(found, best_by_row(found.total, tree.leaves.row, len(rows.prompt)))
        yield Candidates(best.x, best.row, best.rewards, best.total, best.log_w, tree)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return blocks of five steps at the pipeline's usual number, and the demo's."""
        return {
            "published": Preset(
                cls(1, 4, 5, noise=1.0), FitOptions(steps=100, size=1), note="CoDe: 4 children, blocks of 5 steps. [M]"
            ),
            "demo": Preset(cls(2, 2, 3), FitOptions(steps=10, size=4), guidance=False, note="shapes."),
        }
