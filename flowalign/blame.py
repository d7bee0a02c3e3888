"""Which term, and which step, a gradient that is not finite came from.

The training loop looks at the gradient after every minibatch. Once it is not finite the step is not taken, so the
weights are the last good ones; the loss of that minibatch, a function of its batch, is then made once more and each of
its terms is differentiated alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.objectives.backprop import Grown
from flowalign.objectives.base import Objective
from flowalign.policy import Policy

__all__ = ["blame", "finite_gradient"]


def finite_gradient(parameters: Sequence[Tensor]) -> bool:
    """Return whether the gradients that there are have a finite norm."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return not grads or bool(torch.isfinite(torch.nn.utils.get_total_norm(grads)))


def blame(objective: Objective, policy: Policy, data: Any, cond: Any, parameters: Sequence[Tensor]) -> str:
    """Return a sentence that names the terms of a minibatch whose value or gradient is not finite.

    Args:
        objective: the loss.
        policy: with the weights of before the step.
        data: the minibatch, made anew where its graph was used up.
        cond: its conditions.
        parameters: that the gradient is of.
    """
    found = list(_faults(objective, policy, data, cond, parameters))
    if not found:
        return "Each term by itself is finite: their sum overflows."
    return "; ".join(found) + "."


def _faults(objective: Objective, policy: Policy, data: Any, cond: Any, parameters: Sequence[Tensor]) -> Iterator[str]:
    for name, loss in objective(policy, data, cond).terms.items():
        if not torch.isfinite(loss.detach()):
            yield f"the term {name!r} itself is {float(loss.detach())}"
            continue
        grads = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
        bad = sum(not bool(torch.isfinite(g).all()) for g in grads if g is not None)
        if bad:
            where = _where(loss, data) if isinstance(data, Grown) else ""
            value = float(loss.detach())
            yield f"the term {name!r} ({value:.4g}) has a gradient that is not finite in {bad} tensors{where}"


def _where(loss: Tensor, data: Grown) -> str:
    """Return at which level of a taped rollout the gradient, going backwards, first is not finite."""
    tree = data.trajectory
    levels = [k for k in range(tree.first, len(tree.levels)) if tree.at(k).x.requires_grad]
    grads = torch.autograd.grad(loss, [tree.at(k).x for k in levels], retain_graph=True, allow_unused=True)
    for k, g in sorted(zip(levels, grads, strict=True), key=lambda pair: pair[0], reverse=True):
        if g is not None and not bool(torch.isfinite(g).all()):
            if k == len(tree.levels) - 1:
                return ", already at the finished sample: the decoder or the reward"
            return f", from sampling step {k} (t = {float(tree.times[k]):.4g}) on"
    return ", in the network's own weights"
