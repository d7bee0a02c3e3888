"""The one sampling loop.

Per level: join what enters here → ONE posterior per node → value → potential → selection (indexes state, posterior and
memory; costs no network call) → unguided law → proposal → sample. The single step is :mod:`flowalign.step`. A
generator: a notebook plots while it runs, the command line logs, a budget stops it. It never yields while a gradient
mode is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowalign.guidance import Guide
from flowalign.kernels import Kernel
from flowalign.noise import NoiseSource
from flowalign.policy import Policy, final_posterior
from flowalign.potentials.base import Potential
from flowalign.selection.base import Selection
from flowalign.step import advance, evaluate
from flowalign.trajectory import Nodes, Trajectory
from flowalign.values import Value

__all__ = ["Stage", "Tape", "advance", "evaluate", "rollout", "walk"]


@dataclass(frozen=True)
class Tape:
    """Which levels carry a graph: all from ``first`` on (DRaFT-K: ``first = steps - K``). One draw per rollout.

    Attributes:
        first: the state entering this level is cut from what came before.
        checkpoint: recompute network activations in the backward pass.
    """

    first: int = 0
    checkpoint: bool = False

    def on(self, level: int) -> bool:
        """Return whether the step from this level is taped."""
        return level >= self.first


class Stage(NamedTuple):
    """What :func:`walk` yields at each level: evaluated, weighted nodes and ``log Z`` so far."""

    level: int
    t: float
    nodes: Nodes
    log_z: Tensor


def walk(
    policy: Policy,
    kernel: Kernel,
    times: Tensor,
    start: Mapping[int, Nodes] | Nodes,
    cond: Any = None,
    *,
    noise: NoiseSource,
    n_rows: int | None = None,
    guide: Guide | None = None,
    value: Value | None = None,
    potential: Potential | None = None,
    select: Selection | None = None,
    tape: Tape | None = None,
    role: str = "current",
) -> Iterator[Stage]:
    """Yield the nodes of each level, evaluated and weighted, from the first entry to data time.

    Arguments are those of :func:`rollout`.
    """
    entries = dict(start) if isinstance(start, Mapping) else {0: start}
    grid = _check(times, entries, potential, value, guide, tape)
    rows = n_rows if n_rows is not None else 1 + max(int(n.row.max()) for n in entries.values())
    nodes: Nodes | None = None
    log_z = torch.zeros(rows, dtype=torch.float64)
    final = len(grid) - 1
    for level in range(min(entries), final + 1):
        if level in entries:
            nodes = entries[level] if nodes is None else nodes.join(entries[level])
        assert nodes is not None
        t, taped = grid[level], tape is not None and tape.on(level)
        if tape is not None and level == tape.first and level > min(entries):
            nodes = replace(nodes, x=nodes.x.detach(), carry=_cut(nodes.carry))
        wanted = value if potential is None or potential.active(level, level == final) else None
        with torch.set_grad_enabled(taped):
            if level == final:
                nodes = _finish(policy, nodes, wanted)
            else:
                asked = wanted if guide is None or not guide.through_network else value
                again = tape is not None and tape.checkpoint
                nodes = evaluate(policy, nodes, t, cond, value=asked, guide=guide, role=role, checkpoint=again)
        if potential is not None and wanted is not None:
            assert nodes.value is not None
            gain, trace = potential(level, t, nodes.value, nodes.trace, nodes.log_w, nodes.row, rows, level == final)
            nodes = replace(nodes, log_w=nodes.log_w + gain, trace=trace)
        if level == final:
            yield Stage(level, t, nodes, log_z)
            return
        chosen = None if select is None else select(level, nodes.log_w, nodes.row, rows, noise)
        parents, log_w = (None, None) if chosen is None else (chosen.parents, chosen.log_w)
        if chosen is not None:
            log_z = log_z + chosen.dlog_z.double().cpu()
        with torch.set_grad_enabled(taped):
            nodes, children = advance(
                policy, kernel, nodes, t, grid[level + 1], level=level, noise=noise, cond=cond, guide=guide,
                parents=parents, log_w=log_w, role=role,
            )  # fmt: skip
        yield Stage(level, t, nodes, log_z)
        nodes = children


def rollout(
    policy: Policy,
    kernel: Kernel,
    times: Tensor,
    start: Mapping[int, Nodes] | Nodes,
    cond: Any = None,
    *,
    noise: NoiseSource,
    n_rows: int | None = None,
    guide: Guide | None = None,
    value: Value | None = None,
    potential: Potential | None = None,
    select: Selection | None = None,
    tape: Tape | None = None,
    role: str = "current",
    keep: bool = False,
) -> Trajectory:
    """Sample, and return the whole genealogy.

    Args:
        policy: the generator.
        kernel: the law of a step.
        times: ``(K + 1,)`` falling times in [0, 1].
        start: nodes entering at level 0, or by level: completions of all nodes of all levels then run as one staircase.
        cond: conditions, indexed by the nodes' rows.
        noise: where randomness comes from.
        n_rows: number of rows; from the nodes when None.
        guide: gradient guidance.
        value: what a state promises; recorded at every level, or where the potential asks for it.
        potential: weights lineages by their values.
        select: who has offspring.
        tape: which steps carry a graph; none when None.
        role: whose weights.
        keep: keep posteriors and laws in the trajectory: they cost memory and make expanding a node again free.

    Raises:
        ValueError: for times that do not fall or lie outside [0, 1], entries at levels that do not exist, a potential
            without a value.
    """
    levels: list[Nodes | None] = [None] * len(times)
    stage = None
    for stage in walk(
        policy, kernel, times, start, cond, noise=noise, n_rows=n_rows, guide=guide, value=value,
        potential=potential, select=select, tape=tape, role=role,
    ):  # fmt: skip
        levels[stage.level] = stage.nodes if keep else stage.nodes.bare()
    assert stage is not None
    return Trajectory(torch.as_tensor(times, dtype=torch.float64).cpu(), tuple(levels), stage.log_z)


def _finish(policy: Policy, nodes: Nodes, value: Value | None) -> Nodes:
    """Value the finished samples; the network has nothing to say at data time."""
    if value is None:
        return nodes
    return replace(nodes, value=value(nodes.x, final_posterior(nodes.x, policy.process), 0.0, nodes.row))


def _cut(carry: Any) -> Any:
    if isinstance(carry, Tensor):
        return carry.detach()
    return tuple(_cut(c) for c in carry) if isinstance(carry, tuple) else carry


def _check(
    times: Tensor,
    entries: Mapping[int, Nodes],
    potential: Potential | None,
    value: Value | None,
    guide: Guide | None,
    tape: Tape | None,
) -> list[float]:
    grid = torch.as_tensor(times, dtype=torch.float64).tolist()
    falls = len(grid) >= 2 and all(a > b for a, b in pairwise(grid))
    if not falls or grid[0] > 1 or grid[-1] < 0:
        raise ValueError(f"times must fall strictly inside [0, 1] with at least one step; got {grid}.")
    if not entries or min(entries) < 0 or max(entries) >= len(grid) - 1:
        raise ValueError(f"nodes may enter at levels 0 to {len(grid) - 2}; got entries at {sorted(entries)}.")
    if guide is not None and guide.through_network and tape is not None:
        raise ValueError(
            "a guide that differentiates the network cannot be taped: its own gradient would need second derivatives. "
            "Sample with the guide first and train on the samples, or leave the guide out."
        )
    if potential is not None and len(entries) > 1:
        raise ValueError(
            f"a potential follows every lineage from one level, and nodes enter at levels {sorted(entries)}: their "
            "weights would not be comparable. Roll out once per entry level, or leave the potential out."
        )
    if potential is not None and value is None:
        raise ValueError("a potential weighs values: give rollout(value=...) too, e.g. Tweedie(score).")
    return grid
