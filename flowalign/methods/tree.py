"""The tree of Diffusion Tree Sampling: states that were visited, the laws of their next steps, and soft values.

    backup   v = (1/λ) log mean_children exp(λ v)          walk   child ~ exp(λ v)

A node keeps its state and the law of its next step, so a new child costs no network call; a rollout adds every state
that it visits. One tree per prompt, all growing in one batch, from noise that is a function of (seed, prompt, round):
a tree that was saved goes on bit for bit. A memory limit forgets the states of the branches that a walk is least
likely to enter; their values stay, so the values above them remain what they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowalign.gaussian import Gaussian
from flowalign.kernels import Kernel
from flowalign.methods.particles import Rows
from flowalign.methods.tree_node import Node, pick, shares, soft_mean
from flowalign.noise import Noise, mix
from flowalign.rollout import rollout
from flowalign.trajectory import Nodes, Trajectory

__all__ = ["Tree"]


class Tree:
    """One search tree per row.

    Args:
        rows: prompts, conditions and noise.
        kernel: stochastic.
        times: of the sampler.
        scale: λ.
        limit: bytes that the states may take; None for no limit.
        keep: keep posterior means, for the pictures of a report.
        look: judge the posterior mean of every new node (``select = "lookahead"``).

    Attributes:
        rounds: rollouts per row so far.
        forgotten: by row, the largest chance of entering the forgotten branches that a walk had.
    """

    def __init__(
        self,
        rows: Rows,
        kernel: Kernel,
        times: Tensor,
        scale: float,
        *,
        limit: float | None = None,
        keep: bool = False,
        look: bool = False,
    ) -> None:
        self.rows, self.kernel, self.times, self.scale = rows, kernel, times, scale
        self.limit, self.keep, self.look = limit, keep, look
        self.roots = [Node(-1) for _ in range(len(rows.prompt))]
        self.rounds, self.size = 0, 0
        self.forgotten = [0.0] * len(self.roots)

    def grow(self, paths: list[list[Node]]) -> None:
        """Add one child at the end of each row's path, roll it out, and back its reward up: one batch for all rows."""
        seed, keys = self.rows.noise.seed, self.rows.noise.keys
        starts = self._children([p[-1] for p in paths], Noise(mix(seed, self.rounds, 1), keys))
        last = len(self.times) - 1
        direct = starts.pop(last, None)  # a child that already is data
        new: list[Nodes | None] = [None] * (last + 1)
        if starts:
            tree = rollout(
                self.rows.task.policy, self.kernel, self.times, starts, self.rows.cond,
                noise=Noise(mix(seed, self.rounds, 2), keys), n_rows=len(self.roots), keep=True,
            )  # fmt: skip
            new = list(tree.levels)
        if direct is not None:
            ends = new[last]
            new[last] = direct if ends is None else ends.join(direct)
        self._attach(new, paths)
        self.rounds += 1  # only now: a round that was cut short is made again, from the same noise
        if self.limit is not None and self.size > self.limit:
            self._shrink()

    def _children(self, parents: list[Node], noise: Noise) -> dict[int, Nodes]:
        """Return the new children by level; those of the dummy root are fresh draws of the initial noise."""
        starts: dict[int, Nodes] = {}
        fresh = [r for r, p in enumerate(parents) if p.level < 0]
        if fresh:
            rows = Rows(self.rows.prompt, self.rows.cond, noise, self.rows.task)
            starts[0] = rows.enter(1)[torch.tensor(fresh)]
        for level in sorted({p.level for p in parents if p.level >= 0}):
            at = [r for r, p in enumerate(parents) if p.level == level]
            row, laws = torch.tensor(at), [parents[r].law for r in at]
            law = Gaussian(*(torch.cat([getattr(g, k) for g in laws if g is not None]) for k in ("mean", "std")))
            z = noise.normal(level, row, torch.zeros_like(row), law.mean.shape[1:])
            starts[level + 1] = Nodes.enter(law.sample(z.to(law.mean.device)), row)
        return starts

    def _attach(self, new: list[Nodes | None], paths: list[list[Node]]) -> None:
        """Hang the new states on, and back the leaves' rewards up."""
        leaves = new[-1]
        assert leaves is not None
        with torch.no_grad():
            reward = self.rows.score(leaves.x, leaves.row).double().cpu().tolist()
            looks = self._looks(new) if self.look else {}
        chains: list[list[Node]] = [[] for _ in paths]
        for level, nodes in enumerate(new):
            for i in range(0 if nodes is None else len(nodes)):
                assert nodes is not None
                node = self._node(level, nodes, i)
                node.look = looks.get((level, i))
                chains[int(nodes.row[i])].append(node)
        value = dict(zip(leaves.row.tolist(), reward, strict=True))
        for row, (path, chain) in enumerate(zip(paths, chains, strict=True)):
            whole = [*path, *chain]
            for parent, child in zip(whole[len(path) - 1 :], chain, strict=False):
                parent.children.append(child)
            whole[-1].value = value[row]
            self.size += sum(n.bytes() for n in chain)
            for node in reversed(whole):
                node.visits += 1
                if node.children:
                    node.value = soft_mean([c.value for c in node.children], self.scale)

    def _node(self, level: int, nodes: Nodes, i: int) -> Node:
        law = None
        if nodes.step is not None:
            std, mean = nodes.step.std, nodes.step.mean
            whole = std.reshape([1] * mean.ndim) if std.numel() == 1 else std if std.ndim == mean.ndim else std[None]
            one = whole[i : i + 1] if len(whole) == len(mean) else whole
            law = Gaussian(mean[i : i + 1].clone(), one.clone())
        x0 = nodes.posterior.x0[i : i + 1].clone() if self.keep and nodes.posterior is not None else None
        return Node(level, x=nodes.x[i : i + 1].clone(), law=law, x0=x0)

    def _looks(self, new: list[Nodes | None]) -> dict[tuple[int, int], float]:
        """Judge the posterior means of all new nodes in one batch."""
        at = [(k, i) for k, n in enumerate(new[:-1]) if n is not None for i in range(len(n))]
        if not at:
            return {}
        x0 = torch.cat([n.posterior.x0 for n in new[:-1] if n is not None and n.posterior is not None])
        row = torch.cat([n.row for n in new[:-1] if n is not None])
        return dict(zip(at, self.rows.score(x0, row).double().cpu().tolist(), strict=True))

    def walk(self, row: int, generator: torch.Generator) -> Node:
        """Draw a leaf of a row's tree: at each node a child with probability ∝ exp(λ v)."""
        node = self.roots[row]
        while node.children:
            node = pick(node.living, shares(node.living, self.scale), generator)
        return node

    def leaves(self, row: int) -> list[tuple[Node, float]]:
        """Return the leaves of a row's tree with the chance that a walk ends in each."""
        out: list[tuple[Node, float]] = []
        stack = [(self.roots[row], 1.0)]
        while stack:
            node, chance = stack.pop()
            if not node.children and node.x is not None:
                out.append((node, chance))
            living = node.living
            stack += [(c, chance * p) for c, p in zip(living, shares(living, self.scale), strict=True)]
        return out

    def _shrink(self) -> None:
        """Forget the branches that a walk is least likely to enter, down to nine tenths of the limit."""
        branches: list[tuple[float, int, Node]] = []
        for row, root in enumerate(self.roots):
            stack = [(root, 1.0)]
            while stack:
                node, chance = stack.pop()
                living = node.living
                ranked = sorted(zip(shares(living, self.scale), living, strict=True), key=lambda c: c[0])
                # a node keeps its best child, so there always is a way down
                branches += [(chance * p, row, c) for p, c in ranked[:-1]]
                stack += [(c, chance * p) for p, c in ranked]
        assert self.limit is not None
        for chance, row, node in sorted(branches, key=lambda b: b[0]):
            if self.size <= 0.9 * self.limit:
                return
            if node.x is not None:
                self.size -= node.forget()
                self.forgotten[row] += chance

    # -- for a report, and for another day ----------------------------------------------------------------------------
    def nodes(self) -> Iterator[tuple[int, int, Node]]:
        """Yield ``(row, number of the parent, node)``, parents before their children; -1 for the root's own parent."""
        count = 0
        for row, root in enumerate(self.roots):
            stack = [(-1, root)]
            while stack:
                parent, node = stack.pop()
                yield row, parent, node
                stack += [(count, c) for c in reversed(node.children)]
                count += 1

    def trajectory(self) -> Trajectory:
        """Return the states that are left as one genealogy, with their soft values."""
        place: dict[int, int] = {}
        found: list[list[tuple[int, int, Node]]] = [[] for _ in self.times]
        for number, (row, parent, node) in enumerate(self.nodes()):
            if node.x is not None:
                place[number] = len(found[node.level])
                found[node.level].append((row, place.get(parent, -1), node))
        grid = self.times.tolist()
        levels = []
        for k, items in enumerate(found):
            x = torch.cat([n.x for _, _, n in items if n.x is not None])
            nodes = Nodes.enter(x, torch.tensor([r for r, _, _ in items]))
            kept = [n.x0 for _, _, n in items if n.x0 is not None]
            process = self.rows.task.policy.process
            posterior = process.posterior(x, grid[k], x0=torch.cat(kept)) if len(kept) == len(items) else None
            levels.append(
                Nodes(**vars(nodes) | {
                    "parent": torch.tensor([p for _, p, _ in items]), "posterior": posterior,
                    "value": torch.tensor([n.value for _, _, n in items]),
                })
            )  # fmt: skip
        return Trajectory(self.times, tuple(levels), torch.zeros(len(self.roots), dtype=torch.float64))

    def state_dict(self) -> dict[str, Any]:
        """Return the trees: structure as lists, states as stacked tensors."""
        table, tensors = [], []
        for row, parent, n in self.nodes():
            parts = [n.x, None if n.law is None else n.law.mean, None if n.law is None else n.law.std, n.x0]
            table.append([row, parent, n.level, n.value, n.visits, n.look])
            tensors.append(parts)
        return {
            "rounds": self.rounds, "forgotten": list(self.forgotten), "times": self.times, "scale": self.scale,
            "table": table, "tensors": tensors,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them.

        Raises:
            ValueError: for the tree of other prompts, times or scale.
        """
        rows = 1 + max(t[0] for t in state["table"])
        if not torch.equal(state["times"], self.times) or state["scale"] != self.scale or rows != len(self.roots):
            raise ValueError(
                f"the saved tree has {rows} prompts, {len(state['times']) - 1} steps and scale {state['scale']:g}; "
                f"this search has {len(self.roots)}, {len(self.times) - 1} and {self.scale:g}. Continue with the same, "
                "or choose another folder."
            )
        made: list[Node] = []
        for (row, parent, level, value, visits, look), (x, mean, std, x0) in zip(
            state["table"], state["tensors"], strict=True
        ):
            law = None if mean is None else Gaussian(mean, std)
            node = Node(level, value, visits, [], x, law, x0, look)
            made.append(node)
            if parent < 0:
                self.roots[row] = node
            else:
                made[parent].children.append(node)
        self.rounds, self.forgotten = state["rounds"], list(state["forgotten"])
        self.size = sum(n.bytes() for n in made)
