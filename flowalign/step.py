"""One step of a rollout: ask the network about nodes, then draw their children.

    evaluate    nodes x_t → posterior, value, gradient of the guide: one network call for each node that has none
    advance     nodes at t → children at s: x_s ~ q(x_s | x_t), log_w += log p(x_s | x_t) - log q(x_s | x_t)

p is the kernel's unguided law, q what a guide makes of it. The loop over levels is :mod:`flowalign.rollout`; searches
that grow their own trees call these two directly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowalign.gaussian import Gaussian
from flowalign.guidance import Guide
from flowalign.kernels import Kernel
from flowalign.noise import NoiseSource
from flowalign.policy import Policy
from flowalign.trajectory import Nodes, pick, ranks
from flowalign.values import Value

__all__ = ["advance", "evaluate"]


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
