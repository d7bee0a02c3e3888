"""Diffusion Tree Sampling and Tree Search: an anytime tree over denoising states (Jain et al. 2506.20701).

    select    while a node has C·N^α children or more: a child ~ exp(λ v) (DTS), or argmax v + c √(log N / N_child)
    (DTS*) expand    a new child by the sampler's own step (free of network calls: the node's law is kept)
    roll out  to data, adding every state to the tree
    back up   v = (1/λ) log mean_children exp(λ v) along the path

Samples are drawn by *walking* the finished tree, child ~ exp(λ v); "all visited leaves" are mostly base samples.
Boltzmann selection biases the root value low (unlucky children are never visited again, measured in
reference/steering.md); ``select = "uniform"`` chooses without looking at values, and then E[exp(λ v_root)] = Z exactly.
All prompts grow one tree each in one batch; more rounds continue the same tree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.kernels import Kernel
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.particles import Rows, noisy_kernel, rows_of
from flowalign.noise import Noise, mix
from flowalign.options import FitOptions
from flowalign.rollout import advance, rollout
from flowalign.trajectory import Nodes, Trajectory

__all__ = ["DTS", "Tree"]


@dataclass
class Node:
    """Bookkeeping of one node; its state lies in the tree's trajectory."""

    level: int
    index: int
    value: float = -math.inf
    visits: int = 0
    children: list[Node] = field(default_factory=list)


class Tree:
    """One search tree per row, all states in one genealogy.

    Args:
        rows: prompts, conditions and noise.
        kernel: stochastic.
        times: of the sampler.
        scale: λ.
    """

    def __init__(self, rows: Rows, kernel: Kernel, times: Tensor, scale: float) -> None:
        self.rows, self.kernel, self.times, self.scale = rows, kernel, times, scale
        self.roots = [Node(-1, -1) for _ in range(len(rows.prompt))]
        self.states: Trajectory | None = None
        self.rewards: list[float] = []
        self.rounds = 0

    def grow(self, paths: list[list[Node]]) -> None:
        """Add one child at the end of each row's path, roll it out, and back its reward up: one batch for all rows."""
        starts = self._expand(paths)
        noise = Noise(mix(self.rows.noise.seed, self.rounds, 2), self.rows.noise.keys)
        self.rounds += 1
        policy, last = self.rows.task.policy, len(self.times) - 1
        direct = starts.pop(last, None)  # a child that already is data
        new: Trajectory | None = None
        if starts:
            new = rollout(
                policy, self.kernel, self.times, starts, self.rows.cond, noise=noise, n_rows=len(self.roots), keep=True
            )
        if direct is not None:
            levels = [None] * last if new is None else list(new.levels[:last])
            ends = direct if new is None else new.leaves.join(direct)
            new = Trajectory(self.times, (*levels, ends), torch.zeros(len(self.roots), dtype=torch.float64))
        assert new is not None
        self._attach(new, paths)

    def _expand(self, paths: list[list[Node]]) -> dict[int, Nodes]:
        """Return the new children by level; those of the dummy root are fresh draws of the initial noise."""
        noise = Noise(mix(self.rows.noise.seed, self.rounds, 1), self.rows.noise.keys)
        starts: dict[int, Nodes] = {}
        roots = [r for r, path in enumerate(paths) if path[-1].level < 0]
        if roots:
            fresh = Rows(self.rows.prompt, self.rows.cond, noise, self.rows.task).enter(1)
            starts[0] = fresh[torch.tensor(roots)]
        grid = self.times.tolist()
        for level in sorted({path[-1].level for path in paths if path[-1].level >= 0}):
            index = torch.tensor([path[-1].index for path in paths if path[-1].level == level])
            assert self.states is not None
            parents = self.states.at(level)[index]
            _, child = advance(
                self.rows.task.policy, self.kernel, parents, grid[level], grid[level + 1], level=level, noise=noise,
                cond=self.rows.cond,
            )  # fmt: skip
            entry = Nodes.enter(child.x, child.row, origin=index)
            starts[level + 1] = entry if level + 1 not in starts else starts[level + 1].join(entry)
        return starts

    def _attach(self, new: Trajectory, paths: list[list[Node]]) -> None:
        """Join the new states on, make their nodes, and back the leaves' rewards up."""
        offset = [
            0 if self.states is None or n is None else len(n)
            for n in (self.states.levels if self.states else new.levels)
        ]
        leaves = new.leaves
        with torch.no_grad():
            reward = self.rows.score(leaves.x, leaves.row).double().cpu().tolist()
        lineage = new.lineage()
        self.states = new if self.states is None else self.states.graft(new)
        self.rewards += reward
        for i, r in enumerate(reward):
            path = list(paths[int(leaves.row[i])])
            for level in range(path[-1].level + 1, len(self.times)):
                node = Node(level, offset[level] + int(lineage[level][i]))
                path[-1].children.append(node)
                path.append(node)
            path[-1].value = r
            for node in reversed(path):
                node.visits += 1
                if node.children:
                    v = torch.tensor([c.value for c in node.children], dtype=torch.float64) * self.scale
                    node.value = float(torch.logsumexp(v, 0) - math.log(len(v))) / self.scale

    def walk(self, row: int, generator: torch.Generator) -> Node:
        """Draw a leaf of a row's tree: at each node a child with probability ∝ exp(λ v)."""
        node = self.roots[row]
        while node.children:
            v = torch.tensor([c.value for c in node.children], dtype=torch.float64) * self.scale
            node = node.children[int(torch.multinomial(v.softmax(0), 1, generator=generator))]
        return node


@dataclass(frozen=True)
class DTS(Steering):
    """Diffusion Tree Sampling, and Search.

    Attributes:
        rounds: rollouts per prompt; the budget may end the search before.
        scale: λ of the soft values.
        select: boltzmann (DTS), uct (DTS*), or uniform (unbiased log Z).
        widen: C of progressive widening.
        power: α of progressive widening.
        explore: c of UCT.
        noise: of the sampler: a of the flow's SDE, η of DDIM.
        report: rounds between results shown.
    """

    name: ClassVar[str] = "dts"
    summary: ClassVar[str] = "an anytime tree over denoising states: samples by soft values, or search (DTS*)"
    results: ClassVar[Literal["best", "last"]] = "last"
    reference: ClassVar[str] = """@article{jain2025dts,
  title={Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models},
  author={Jain, Vineet and Sareen, Kusha and Pedramfar, Mohammad and Ravanbakhsh, Siamak},
  journal={arXiv preprint arXiv:2506.20701}, year={2025}}"""

    rounds: int = 64
    scale: float = 10.0
    select: Literal["boltzmann", "uct", "uniform"] = "boltzmann"
    widen: float = 2.0
    power: float = 0.8
    explore: float = 1.0
    noise: float = 0.7
    report: int = 16

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield results as the trees grow: walked samples (DTS), or the best leaves so far (DTS*)."""
        rows = rows_of(task, per_sample=False)
        tree = Tree(rows, noisy_kernel(task.policy.process, self.noise), task.times, self.scale)
        for i in range(self.rounds):
            with torch.no_grad():
                tree.grow([self.path(root, mix(task.seed, i, r)) for r, root in enumerate(tree.roots)])
            if (i + 1) % self.report == 0 or i + 1 == self.rounds:
                yield self._results(task, tree)

    def path(self, root: Node, seed: int) -> list[Node]:
        """Return the nodes from the root to the one that gets a child."""
        g = torch.Generator().manual_seed(seed)
        path = [root]
        while path[-1].children and len(path[-1].children) >= self.widen * max(path[-1].visits, 1) ** self.power:
            path.append(self._choose(path[-1], g))
        # data cannot be expanded: the node before gets another child
        return path[:-1] if path[-1].visits and not path[-1].children and path[-1].level >= 0 else path

    def _choose(self, node: Node, g: torch.Generator) -> Node:
        if self.select == "uniform":
            return node.children[int(torch.randint(len(node.children), (), generator=g))]
        v = torch.tensor([c.value for c in node.children], dtype=torch.float64)
        if self.select == "boltzmann":
            return node.children[int(torch.multinomial((self.scale * v).softmax(0), 1, generator=g))]
        n = torch.tensor([c.visits for c in node.children], dtype=torch.float64)
        return node.children[int((v + self.explore * (math.log(max(node.visits, 1)) / n).sqrt()).argmax())]

    def _results(self, task: Task, tree: Tree) -> Candidates:
        assert tree.states is not None
        leaves, g = tree.states.leaves, torch.Generator().manual_seed(mix(task.seed, tree.rounds, 3))
        reward = torch.tensor(tree.rewards)
        index: list[int] = []
        for r, wanted in enumerate(task.draw.samples.tolist()):
            mine = (leaves.row == r).nonzero().flatten()
            if self.select == "uct":
                index += mine[reward[mine].argsort(descending=True, stable=True)][:wanted].tolist()
            else:
                index += [tree.walk(r, g).index for _ in range(wanted)]
        at = torch.tensor(index)
        x, row = leaves.x[at.to(leaves.x.device)], leaves.row[at]
        rewards = task.judge(x, tree.rows.prompt[row])
        total = torch.stack([task.judge.scorer.weights[k] * r for k, r in rewards.items()]).sum(0)
        return Candidates(x, tree.rows.prompt[row], rewards, total, torch.zeros(len(at)), tree.states)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return settings for sampling and for search; the paper's own C, α and c were not available to us."""
        return {
            "published": Preset(cls(noise=1.0), FitOptions(steps=50, size=1), note="C, α, c unverified. Not run here."),
            "search": Preset(cls(select="uct"), FitOptions(steps=10, size=1), guidance=False, note="DTS*, shapes."),
            "demo": Preset(cls(rounds=32, scale=5.0), FitOptions(steps=10, size=4), guidance=False, note="shapes."),
        }
