"""The one sampling loop.

Per level: join what enters here → ONE posterior per node → value → potential → selection (indexes state, posterior and
memory; costs no network call) → unguided law → proposal → sample. A generator: a notebook plots while it runs, the
command line logs, a budget stops it. It never yields while a gradient mode is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowalign.gaussian import Gaussian
from flowalign.guidance import Guide
from flowalign.kernels import Kernel
from flowalign.noise import NoiseSource
from flowalign.policy import Policy, final_posterior
from flowalign.potentials.base import Potential
from flowalign.selection.base import Selection
from flowalign.trajectory import Nodes, Trajectory, pick, ranks
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


def evaluate(
    policy: Policy,
    nodes: Nodes,
    t: float,
    cond: Any = None,
    *,
    value: Value | None = None,
    guide: Guide | None = None,
    role: str = "current",
    checkpoint: bool = False,
) -> Nodes:
    """Ask the network once about each node, and the value and the guide about the answer.

    Nodes that were evaluated before are not evaluated again.
    """
    guide = guide if guide is not None and guide.active(t) else None
    deep = guide is not None and guide.through_network
    asked = (value is not None and nodes.value is None) or (guide is not None and nodes.gradient is None)
    if nodes.posterior is not None and not asked:
        return nodes
    x = nodes.x.detach().requires_grad_() if deep else nodes.x
    with torch.set_grad_enabled(deep or torch.is_grad_enabled()):
        posterior = nodes.posterior
        if posterior is None or deep:
            known = None if cond is None else cond[nodes.row]
            posterior = policy.posterior(x, t, known, role, checkpoint=checkpoint and not deep)
        v = None if value is None else value(x, posterior, t, nodes.row)
        g = None if guide is None else guide.gradient(x, posterior, t, nodes.row, v)
    if deep:
        policy.ledger.gradients += len(x)
        posterior, v, g = posterior.detach(), None if v is None else v.detach(), None if g is None else g.detach()
    return replace(nodes, posterior=posterior, value=v, gradient=g)


def advance(
    policy: Policy,
    kernel: Kernel,
    nodes: Nodes,
    t: float,
    s: float,
    *,
    level: int,
    noise: NoiseSource,
    cond: Any = None,
    guide: Guide | None = None,
    parents: Tensor | None = None,
    log_w: Tensor | None = None,
    role: str = "current",
    checkpoint: bool = False,
) -> tuple[Nodes, Nodes]:
    """Take one step from level to level + 1.

    Args:
        policy: evaluated only where a node has no posterior yet.
        kernel: the law of the step.
        nodes: where to step from.
        t: their time.
        s: where to go.
        level: number of the step, for the noise.
        noise: where randomness comes from.
        cond: conditions by row.
        guide: shifts the proposal or the posterior; its gradient is taken from the nodes if they were evaluated.
        parents: index ``(M,)`` of each child's parent; one child per node when None.
        log_w: log-weights of the children; those of the parents when None.
        role: whose weights.
        checkpoint: see :meth:`Policy.posterior`.

    Returns:
        The nodes, now with their posterior and unguided law, and their children.
    """
    nodes = evaluate(policy, nodes, t, cond, guide=guide, role=role, checkpoint=checkpoint)
    posterior = nodes.posterior
    assert posterior is not None
    prior, carry = kernel(nodes.x, posterior, t, s, nodes.carry)  # cheap, and right for a new s or a moved law
    nodes_out = replace(nodes, step=prior)
    proposal, gain = _proposal(kernel, nodes, prior, t, s, guide)
    index = torch.arange(len(nodes)) if parents is None else parents
    if parents is not None:
        prior, proposal = prior[index.to(nodes.x.device)], proposal[index.to(nodes.x.device)]
    row = nodes.row[index]
    if kernel.stochastic(t, s):
        z = noise.normal(level, row, ranks(row), nodes.x.shape[1:])
        x = proposal.sample(z.to(proposal.mean.device))
        with torch.no_grad():
            log_prob = prior.log_prob(x)
            weight = log_prob - proposal.log_prob(x) if gain else None
    else:
        x, log_prob, weight = proposal.mean, nodes.log_prob.new_zeros(len(index)), None
    carried = pick(nodes.log_w, index) if log_w is None else log_w
    children = Nodes(
        x=x,
        row=row,
        parent=index,
        origin=torch.full_like(index, -1),
        log_prob=log_prob,
        log_w=carried if weight is None else carried + weight,
        carry=pick(carry, index),
        trace=pick(nodes.trace, index),
    )
    return nodes_out, children


def _proposal(
    kernel: Kernel, nodes: Nodes, prior: Gaussian, t: float, s: float, guide: Guide | None
) -> tuple[Gaussian, bool]:
    """Return the law to sample from, and whether the weight must be corrected for it."""
    if guide is None or nodes.gradient is None or not guide.active(t):
        return prior, False
    assert nodes.posterior is not None
    if guide.where == "posterior":
        return kernel(nodes.x, nodes.posterior.guided(nodes.gradient), t, s, nodes.carry)[0], False
    if not kernel.stochastic(t, s):
        raise ValueError(
            f"a guided proposal shifts the mean by std² times the gradient, and this kernel draws no noise from t = "
            f"{t:.4g} to {s:.4g}. Use a stochastic kernel, or a guide with where='posterior'."
        )
    return prior.shift(prior.std**2 * nodes.gradient), guide.weighted


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
