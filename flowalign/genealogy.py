"""What a genealogy tells: how certain ``log Ẑ`` is, and who descends from whom, laid out for a picture.

The variance of ``Ẑ / Z`` can be read off one run, from which first ancestors the weight has come down (Chan & Lai
2013; Lee & Whiteley 2018, Theorem 1; unbiased for multinomial resampling):

    V = 1 - (N / (N - 1))^{m + 1} (1 - Σ_e W_e²),     W_e the final weight of those who descend from ancestor e

after m resamplings. Without any, this is the squared standard error of the mean weight. Measured here: right for
systematic resampling where the ESS calls for it (threshold .5); below zero, so of no use, where it comes at every
level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.trajectory import Trajectory

__all__ = ["Family", "Member", "evidence_error", "evidence_variance", "family"]


def evidence_error(tree: Trajectory) -> Tensor:
    """Return the standard error of ``log Ẑ`` of each row, ``√V (n_rows,)``; NaN where the genealogy cannot tell.

    V is noisy where few particles are resampled often, and may be negative; where all weight goes back to one ancestor
    it is 1 whatever the truth.
    """
    variance = evidence_variance(tree)
    return torch.where((variance > 0) & (variance < 1), variance.clamp(0, 1).sqrt(), torch.nan)


def evidence_variance(tree: Trajectory) -> Tensor:
    """Return V of each row, ``(n_rows,)``: unbiased for ``Var(Ẑ / Z)`` under multinomial resampling at fixed levels."""
    leaves, eve = tree.leaves, tree.lineage()[tree.first]
    weights = tree.weights().double().cpu()
    out = torch.full((tree.n_rows,), torch.nan, dtype=torch.float64)
    for row in range(tree.n_rows):
        mine = (leaves.row == row).nonzero().flatten()
        n = len(mine)
        if n > 1:
            heirs = torch.zeros(len(tree.at(tree.first)), dtype=torch.float64).index_add(0, eve[mine], weights[mine])
            times = sum(_resampled(tree, k, row) for k in range(tree.first + 1, len(tree.levels)))
            out[row] = 1 - (n / (n - 1)) ** (times + 1) * (1 - float((heirs**2).sum()))
    return out


def _resampled(tree: Trajectory, level: int, row: int) -> bool:
    """Return whether some node of a row has not exactly one child."""
    parents = tree.at(level).parent[tree.at(level).row == row]
    return len(parents.unique()) < len(parents)


@dataclass(frozen=True)
class Member:
    """A node of the picture.

    Attributes:
        level: of the trajectory.
        index: of the node at that level.
        column: place from left to right.
        y: place from top to bottom, in rows.
        parent: number of the member it descends from, -1 for none.
        value: reward promised there, or of the finished sample; None where nobody asked.
        weight: share of the weight of its prompt at that level.
        alive: whether a finished sample that is shown descends from it.
    """

    level: int
    index: int
    column: int
    y: float
    parent: int
    value: float | None
    weight: float
    alive: bool


@dataclass(frozen=True)
class Family:
    """The genealogy of one prompt.

    Attributes:
        members: parents before their children.
        levels: of the columns.
        height: rows.
        left_out: finished samples that are not shown, for want of room.
    """

    members: tuple[Member, ...]
    levels: tuple[int, ...]
    height: float
    left_out: int

    def lineages(self) -> list[list[Member]]:
        """Return the shown line of ancestors of each finished sample, oldest first."""
        out = []
        for m in self.members:
            if m.column == len(self.levels) - 1:
                line = [m]
                while line[0].parent >= 0:
                    line.insert(0, self.members[line[0].parent])
                out.append(line)
        return out


def family(tree: Trajectory, row: int, *, columns: int = 10, most: int = 20) -> Family:
    """Lay out the genealogy of a row: a particle system keeps its slots, a tree is drawn as a tree.

    Args:
        tree: genealogy.
        row: which prompt.
        columns: levels shown at most.
        most: nodes of a level shown at most; of more, those that the best finished samples descend from.

    Raises:
        ValueError: if the row has no finished sample.
    """
    leaves = (tree.leaves.row == row).nonzero().flatten()
    if not len(leaves):
        raise ValueError(f"row {row} of this genealogy has no finished sample.")
    levels = _spread(tree.first, len(tree.levels) - 1, columns)
    value = tree.leaves.value if tree.leaves.value is not None else tree.leaves.log_w
    order = leaves[value.detach().cpu()[leaves].argsort(descending=True, stable=True)]
    kept_leaves = order[:most].sort().values
    lines = tree.lineage()
    crowd = any(int((tree.at(k).row == row).sum()) > most for k in levels)
    shown: list[list[int]] = []
    for k in levels:
        alive = set(lines[k][kept_leaves].tolist())
        everyone = (tree.at(k).row == row).nonzero().flatten().tolist()
        shown.append([i for i in everyone if i in alive] if crowd else everyone)
    above = _parents(tree, levels, shown)
    # where every column has as many members, slots say more than a tree would
    even = len({len(s) for s in shown}) == 1
    y = _slots(shown, above) if even else _tidy(shown, above)
    members: list[Member] = []
    number: dict[tuple[int, int], int] = {}
    for c, (k, indices) in enumerate(zip(levels, shown, strict=True)):
        nodes, line = tree.at(k), set(lines[k][kept_leaves].tolist())
        log_w = nodes.log_w.detach().double().cpu()
        share = (log_w - log_w[nodes.row == row].logsumexp(0)).exp()
        for i in indices:
            number[c, i] = len(members)
            parent = number[c - 1, above[c, i]] if c else -1
            known = None if nodes.value is None else float(nodes.value[i])
            members.append(Member(k, i, c, y[c, i], parent, known, float(share[i]), i in line))
    return Family(tuple(members), tuple(levels), max(y.values()) + 1, len(leaves) - len(kept_leaves))


def _spread(first: int, last: int, columns: int) -> list[int]:
    """Return at most so many levels, evenly, with both ends."""
    n = min(columns, last - first + 1)
    return sorted({first + round(i * (last - first) / max(n - 1, 1)) for i in range(n)})


def _parents(tree: Trajectory, levels: Sequence[int], shown: Sequence[Sequence[int]]) -> dict[tuple[int, int], int]:
    """Return for each ``(column, node)`` its ancestor in the column before."""
    above = {}
    for c in range(1, len(levels)):
        for i in shown[c]:
            at = i
            for k in range(levels[c], levels[c - 1], -1):
                at = int(tree.at(k).parent[at])
            above[c, i] = at
    return above


def _slots(shown: Sequence[Sequence[int]], above: dict[tuple[int, int], int]) -> dict[tuple[int, int], float]:
    """Give every member a slot: children stand in the order of their parents, which keeps the lines apart."""
    y: dict[tuple[int, int], float] = {}
    for c, nodes in enumerate(shown):
        ranked = sorted(nodes, key=lambda i: (y[c - 1, above[c, i]] if c else 0.0, i))
        y |= {(c, i): float(s) for s, i in enumerate(ranked)}
    return y


def _tidy(shown: Sequence[Sequence[int]], above: dict[tuple[int, int], int]) -> dict[tuple[int, int], float]:
    """Stack the ends of all lines from top to bottom and put every parent in the middle of its children."""
    children: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (c, i), p in above.items():
        children.setdefault((c - 1, p), []).append((c, i))
    y: dict[tuple[int, int], float] = {}
    ends = 0

    def place(node: tuple[int, int]) -> None:
        nonlocal ends
        for child in children.get(node, []):
            place(child)
        if node in children:
            y[node] = sum(y[c] for c in children[node]) / len(children[node])
        else:
            y[node], ends = float(ends), ends + 1

    for i in shown[0]:
        place((0, i))
    return y
