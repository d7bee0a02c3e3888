"""Rollover budget forcing: what one step does not need of its tries, a later step may spend (Kim et al. 2503.19385).

    start      of ``init`` noises go on from the one whose posterior mean has the greatest reward
    each step  draw children, a few at a time, until one's reward beats the best so far: go on from it, and let the
               tries that are left roll over; once quota and rollover are spent go on from the best child

The reward of a state is that of its posterior mean. The stochastic sampler of the paper runs on a variance-preserving
path (:mod:`flowalign.methods.converted`) with diffusion ``g(t) = a t²``. Each wanted result is a search of its own;
their tries share batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.kernels import EulerMaruyama, Kernel
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.candidates import best_by_row
from flowalign.methods.converted import Converted, Power, vp_path
from flowalign.methods.particles import Rows, finish, noisy_kernel, rows_of
from flowalign.noise import Noise, mix
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.step import advance, evaluate
from flowalign.trajectory import Nodes, Trajectory
from flowalign.values import Tweedie

__all__ = ["RBF", "Walk"]


@dataclass(frozen=True)
class RBF(Steering):
    """Rollover budget forcing.

    Attributes:
        init: noises per wanted result to choose the start from.
        quota: tries that every step brings; what is left rolls over.
        batch: tries of a search evaluated at a time.
        path: vp converts a flow to the variance-preserving path of the paper; own stays on the model's.
        noise: a of ``g = a t²`` on the vp path; else of the sampler: a of the flow's SDE, η of DDIM.
    """

    name: ClassVar[str] = "rbf"
    summary: ClassVar[str] = "step by step take the first child that beats the best so far; unused tries roll over"
    results: ClassVar[Literal["best", "last"]] = "last"
    reference: ClassVar[str] = """@article{kim2025inference,
  title={Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing},
  author={Kim, Jaihoon and Yoon, Taehoon and Hwang, Jisung and Sung, Minhyuk},
  journal={arXiv preprint arXiv:2503.19385}, year={2025}}"""

    init: int = 25
    quota: int = 22
    batch: int = 2
    path: Literal["vp", "own"] = "vp"
    noise: float = 3.0

    def __post_init__(self) -> None:
        if min(self.init, self.quota, self.batch) < 1:
            raise ValueError(f"init, quota and batch must be at least 1; got {self.init}, {self.quota}, {self.batch}.")
        if self.noise <= 0:
            raise ValueError(
                f"rollover budget forcing needs a stochastic sampler, or all children of a state are the same; noise = "
                f"{self.noise} draws none. Use 3 on the vp path, .7 on a flow's own, 1 for DDIM."
            )

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield the finished samples."""
        rows = rows_of(task, per_sample=True)
        with torch.no_grad():
            yield finish(rows, Walk(self, rows).run())

    def sampler(self, task: Task) -> tuple[Policy, Kernel]:
        """Return what is evaluated and the law of a step."""
        policy = task.policy
        if self.path == "own":
            return policy, noisy_kernel(policy.process, self.noise)
        seen = Converted(policy.denoiser, vp_path())
        converted = Policy(seen, policy.roles, policy.ledger, policy.chunk, policy.context, policy.frozen)
        return converted, EulerMaruyama(Power(self.noise))

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings (FLUX-schnell, at most 500 evaluations), and the demo's."""
        return {
            "published": Preset(cls(), FitOptions(steps=10, size=1), note="FLUX-schnell, 500 evaluations. Not run."),
            "demo": Preset(
                cls(4, 4, 2, "own", 0.7), FitOptions(steps=10, size=4), guidance=False, note="shapes, on its own path."
            ),
        }


class Walk:
    """One walk of all searches, in step.

    Args:
        method: its settings.
        rows: one per search.

    Attributes:
        tries: children drawn, by level and search.
        spare: tries left of each search.
    """

    def __init__(self, method: RBF, rows: Rows) -> None:
        self.method, self.rows = method, rows
        self.policy, self.kernel = method.sampler(rows.task)
        # a converted path has no grid of its own: the sampler's times are taken as times of that path
        self.times = rows.task.times
        self.value = Tweedie(rows.score)
        self.spare = torch.zeros(len(rows.prompt), dtype=torch.long)
        self.tries: list[Tensor] = []
        self.drawn = 0

    def run(self) -> Trajectory:
        """Return the lineages that were gone along."""
        grid, n = self.times.tolist(), len(self.rows.prompt)
        first = self._valued(self._start(self.rows.enter(self.method.init)), grid[0])
        assert first.value is not None
        nodes = first[best_by_row(first.value, first.row, n)]
        best = _values(nodes)
        levels = [nodes.bare()]
        for k in range(len(grid) - 1):
            self.spare += self.method.quota
            # the last child is data, and its own reward decides
            nodes = self._step(nodes, best, grid[k], grid[k + 1], k)
            best = torch.maximum(best, _values(nodes))
            levels.append(nodes.bare())
        return Trajectory(self.times, tuple(levels), torch.zeros(n, dtype=torch.float64))

    def _start(self, nodes: Nodes) -> Nodes:
        if self.method.path == "own":
            return nodes
        assert isinstance(self.policy.denoiser, Converted)
        # the pipeline's noise belongs to its own first time, where it is σ ε
        sigma = self.rows.task.policy.process(float(self.times[0]))[1]
        ratio = self.policy.process(float(self.times[0]))[1] / sigma
        return Nodes.enter(nodes.x * float(ratio), nodes.row)

    def _valued(self, nodes: Nodes, t: float) -> Nodes:
        if t > 0:
            return evaluate(self.policy, nodes, t, self.rows.cond, value=self.value)
        return replace(nodes, value=self.rows.score(nodes.x, nodes.row))

    def _step(self, nodes: Nodes, best: Tensor, t: float, s: float, level: int) -> Nodes:
        """Return the child that each search goes on from."""
        n = len(nodes)
        kept: Nodes | None = None
        top, tries = torch.full((n,), -torch.inf, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
        active = torch.arange(n)
        while len(active):
            count = self.spare[active].clamp_max(self.method.batch)
            parents = active.repeat_interleave(count)
            noise = Noise(mix(self.rows.noise.seed, self.drawn, 5), self.rows.noise.keys)
            self.drawn += 1
            _, children = advance(
                self.policy, self.kernel, nodes, t, s, level=level, noise=noise, cond=self.rows.cond, parents=parents
            )
            children = self._valued(children, s)
            kept, top = self._take(kept, top, children)
            self.spare[active] -= count
            tries[active] += count
            active = active[(top[active] <= best[active]) & (self.spare[active] > 0)]
        self.tries.append(tries)
        assert kept is not None
        return kept

    def _take(self, kept: Nodes | None, top: Tensor, children: Nodes) -> tuple[Nodes, Tensor]:
        """Return the best child of each search so far, in the order of searches, and its reward."""
        pool = children if kept is None else kept.join(children)
        value, top = _values(pool), top.clone()
        index = torch.zeros(len(top), dtype=torch.long)
        for r in range(len(top)):
            mine = (pool.row == r).nonzero().flatten()
            index[r] = mine[value[mine].argmax()]
            top[r] = value[index[r]]
        return pool[index], top


def _values(nodes: Nodes) -> Tensor:
    assert nodes.value is not None
    return nodes.value.detach().double().cpu()
