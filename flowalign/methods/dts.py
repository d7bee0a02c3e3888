"""Diffusion Tree Sampling and Tree Search: an anytime tree over denoising states (Jain et al. 2506.20701).

    select    while a node has C·N^α children or more: a child ~ exp(λ v) (DTS), or argmax v + c √(log N / N_child)
    (DTS*) expand    a new child by the sampler's own step (free of network calls: the node's law is kept)
    roll out  to data, adding every state to the tree
    back up   v = (1/λ) log mean_children exp(λ v) along the path

Samples are drawn by *walking* the finished tree, child ~ exp(λ v); "all visited leaves" are mostly base samples.

Boltzmann selection biases the root value low: which children are averaged over depends on what they were found to be
worth, and unlucky ones are never visited again (measured in reference/steering.md). Two selections have no such bias,
and then ``E[exp(λ v_root)] = Z`` for any number of rounds:

    uniform     chooses without looking
    lookahead   sample splitting: chooses a child ~ exp(λ r(x̂0)) by the reward of its own posterior mean, a function of
                its state alone, so that the rollouts below it serve its value and never the choice

All prompts grow one tree each in one batch; more rounds continue the same tree, bit for bit, also on another day.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from flowalign.ledger import BudgetSpent
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.particles import noisy_kernel, rows_of
from flowalign.methods.tree import Tree
from flowalign.methods.tree_node import Node, pick, shares
from flowalign.noise import mix
from flowalign.options import FitOptions

__all__ = ["DTS", "Tree"]

STATE = "tree.pt"


@dataclass(frozen=True)
class DTS(Steering):
    """Diffusion Tree Sampling, and Search.

    Attributes:
        rounds: rollouts per prompt; the budget may end the search before.
        scale: λ of the soft values.
        select: boltzmann (DTS), uct (DTS*); uniform or lookahead for an unbiased log Z.
        widen: C of progressive widening.
        power: α of progressive widening.
        explore: c of UCT.
        noise: of the sampler: a of the flow's SDE, η of DDIM.
        report: rounds between results shown.
        memory: MiB that the states of the trees may take; the branches that a walk is least likely to enter are
            forgotten then, and their values kept. None for no limit.
    """

    name: ClassVar[str] = "dts"
    summary: ClassVar[str] = "an anytime tree over denoising states: samples by soft values, or search (DTS*)"
    results: ClassVar[Literal["best", "last"]] = "last"
    resumable: ClassVar[bool] = True
    reference: ClassVar[str] = """@article{jain2025dts,
  title={Diffusion Tree Sampling: Scalable inference-time alignment of diffusion models},
  author={Jain, Vineet and Sareen, Kusha and Pedramfar, Mohammad and Ravanbakhsh, Siamak},
  journal={arXiv preprint arXiv:2506.20701}, year={2025}}"""

    rounds: int = 64
    scale: float = 10.0
    select: Literal["boltzmann", "uct", "uniform", "lookahead"] = "boltzmann"
    widen: float = 2.0
    power: float = 0.8
    explore: float = 1.0
    noise: float = 0.7
    report: int = 16
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.report < 1 or self.widen <= 0 or self.scale <= 0 or not 0 <= self.power <= 1:
            got = f"{self.rounds}, {self.report}, {self.widen}, {self.scale}, {self.power}"
            raise ValueError(f"need rounds >= 1, report >= 1, widen > 0, scale > 0 and 0 <= power <= 1; got {got}.")
        if self.memory is not None and self.memory <= 0:
            raise ValueError(f"memory is a number of MiB greater than 0, or None for no limit; got {self.memory}.")

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield results as the trees grow: walked samples (DTS), or the best leaves so far (DTS*).

        With a folder the trees are read from there and saved whenever results are shown, and when a budget ends.
        """
        tree = self.tree(task)
        shown = -1
        while tree.rounds < self.rounds:
            try:
                with torch.no_grad():
                    self.round(task, tree)
            except BudgetSpent:
                self._save(task, tree)
                if tree.rounds and tree.rounds != shown:
                    yield self._results(task, tree)
                raise
            if tree.rounds % self.report == 0 or tree.rounds == self.rounds:
                self._save(task, tree)
                shown = tree.rounds
                yield self._results(task, tree)
        if shown < 0:  # continued, and already as large as was asked for
            yield self._results(task, tree)

    def tree(self, task: Task) -> Tree:
        """Return empty trees, or those saved in the task's folder."""
        rows, kernel = rows_of(task, per_sample=False), noisy_kernel(task.policy.process, self.noise)
        tree = Tree(
            rows, kernel, task.times, self.scale, limit=None if self.memory is None else self.memory * 2**20,
            keep=task.keep, look=self.select == "lookahead",
        )  # fmt: skip
        path = _path(task)
        if path is not None and path.is_file():
            tree.load_state_dict(torch.load(path, weights_only=True))
        return tree

    def round(self, task: Task, tree: Tree) -> None:
        """Do one round: every prompt's tree gets one more rollout."""
        tree.grow([self.path(root, mix(task.seed, tree.rounds, r)) for r, root in enumerate(tree.roots)])

    def path(self, root: Node, seed: int) -> list[Node]:
        """Return the nodes from the root to the one that gets a child."""
        g = torch.Generator().manual_seed(seed)
        path = [root]
        while path[-1].living and self._full(path[-1]):
            path.append(self._choose(path[-1], g))
        # data, and a state whose next step draws no noise, cannot be expanded: the node before gets another child
        while path[-1].final:
            path.pop()
        return path

    def _full(self, node: Node) -> bool:
        return node.final or len(node.children) >= self.widen * max(node.visits, 1) ** self.power

    def _choose(self, node: Node, g: torch.Generator) -> Node:
        living = node.living
        if self.select == "uniform":
            return pick(living, [1.0] * len(living), g)
        if self.select == "boltzmann":
            return pick(living, shares(living, self.scale), g)
        if self.select == "lookahead":
            looks = [0.0 if c.look is None else c.look for c in living]
            return pick(living, [math.exp(self.scale * (v - max(looks))) for v in looks], g)
        bonus = [self.explore * math.sqrt(math.log(max(node.visits, 1)) / max(c.visits, 1)) for c in living]
        return max(zip(living, bonus, strict=True), key=lambda c: c[0].value + c[1])[0]

    def _results(self, task: Task, tree: Tree) -> Candidates:
        """Return walked samples, or the best leaves; what is known of them is not judged again."""
        found: list[tuple[int, Node]] = []
        g = torch.Generator().manual_seed(mix(task.seed, tree.rounds, 3))
        for r, wanted in enumerate(task.draw.samples.tolist()):
            if self.select == "uct":
                best = sorted((leaf for leaf, _ in tree.leaves(r)), key=lambda n: -n.value)
                found += [(r, n) for n in best[:wanted]]
            else:
                found += [(r, tree.walk(r, g)) for _ in range(wanted)]
        row = torch.tensor([r for r, _ in found])
        x = torch.cat([n.x for _, n in found if n.x is not None])
        total = torch.tensor([n.value for _, n in found])
        weights = task.judge.scorer.weights
        if len(weights) == 1 and next(iter(weights.values())):
            name, weight = next(iter(weights.items()))
            rewards = {name: total / weight}
        else:
            with task.policy.ledger.within(None), torch.no_grad():
                rewards = task.judge(x, tree.rows.prompt[row])
        # UCT visits by value and by count: its root is a search's, and no estimate of anything
        log_z = None if self.select == "uct" else self.scale * torch.tensor([root.value for root in tree.roots])
        kept = tree.trajectory() if task.keep else None
        return Candidates(x, tree.rows.prompt[row], rewards, total, torch.zeros(len(row)), kept, log_z)

    def _save(self, task: Task, tree: Tree) -> None:
        path = _path(task)
        if path is not None and tree.rounds:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(tree.state_dict(), path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)  # never half a tree

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return settings for sampling and for search; the paper's own C, α and c were not available to us."""
        return {
            "published": Preset(cls(noise=1.0), FitOptions(steps=50, size=1), note="C, α, c unverified. Not run here."),
            "search": Preset(cls(select="uct"), FitOptions(steps=10, size=1), guidance=False, note="DTS*, shapes."),
            "demo": Preset(cls(rounds=32, scale=5.0), FitOptions(steps=10, size=4), guidance=False, note="shapes."),
        }


def _path(task: Task) -> Path | None:
    return None if task.folder is None else task.folder / STATE
