"""SVDD: of M children of each state go on with one, drawn by its value (Li et al. 2408.08252).

m ~ softmax(λ V(x^m)),  λ → ∞ is the argmax that the published image code takes (and that over-optimises)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.particles import finish, noisy_kernel, roll, rows_of
from flowalign.noise import NoiseSource
from flowalign.options import FitOptions
from flowalign.potentials import Immediate
from flowalign.selection.base import Chosen, Selection, by_row
from flowalign.values import Tweedie

__all__ = ["SVDD", "PickOne"]


@dataclass(frozen=True)
class PickOne(Selection):
    """Of each row's nodes keep one, and give it ``children`` children; at the last step one child.

    Attributes:
        children: M.
        last: the last level with a step.
        greedy: argmax in place of a draw.
    """

    children: int
    last: int
    greedy: bool = False

    def __call__(self, level: int, log_w: Tensor, row: Tensor, n_rows: int, noise: NoiseSource) -> Chosen:
        """Choose by the weights, which start afresh: this is a search step, not importance sampling."""
        nodes = by_row(row, n_rows)
        w = log_w.detach().double().cpu()[nodes]
        if self.greedy:
            best = w.argmax(1)
        else:
            cdf = w.softmax(1).cumsum(1)
            u = noise.uniform(level, n_rows, 1) * cdf[:, -1:]
            best = torch.searchsorted(cdf, u, right=True)[:, 0].clamp_max(w.shape[1] - 1)
        parents = nodes.gather(1, best[:, None])[:, 0].repeat_interleave(1 if level == self.last else self.children)
        return Chosen(parents, log_w.new_zeros(len(parents)), log_w.new_zeros(n_rows))


@dataclass(frozen=True)
class SVDD(Steering):
    """SVDD.

    Attributes:
        children: M per step; published: 20.
        scale: λ = 1/α of the softmax.
        greedy: take the best child.
        noise: of the sampler: a of the flow's SDE, η of DDIM.
    """

    name: ClassVar[str] = "svdd"
    summary: ClassVar[str] = "value-weighted choice among M children at every step"
    results: ClassVar[Literal["best", "last"]] = "last"
    reference: ClassVar[str] = """@article{li2024svdd,
  title={Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding},
  author={Li, Xiner and Zhao, Yulai and Wang, Chenyu and Scalia, Gabriele and Eraslan, Gokcen and others},
  journal={arXiv preprint arXiv:2408.08252}, year={2024}}"""

    children: int = 20
    scale: float = 10.0
    greedy: bool = False
    noise: float = 0.7

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield one result per wanted sample."""
        if self.children < 2:
            raise ValueError(f"a choice needs at least 2 children; got {self.children}.")
        rows = rows_of(task, per_sample=True)
        tree = roll(
            rows, noisy_kernel(task.policy.process, self.noise), rows.enter(1),
            value=Tweedie(rows.score), potential=Immediate(self.scale),
            select=PickOne(self.children, len(task.times) - 2, self.greedy),
        )  # fmt: skip
        found = finish(rows, tree)
        yield Candidates(found.x, found.row, found.rewards, found.total, torch.zeros_like(found.log_w), tree)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings, and the demo's."""
        return {
            "published": Preset(cls(greedy=True, noise=1.0), FitOptions(steps=50, size=1), note="SD 1.5, η = 1."),
            "demo": Preset(cls(children=4, scale=5.0), FitOptions(steps=10, size=4), guidance=False, note="shapes."),
        }
