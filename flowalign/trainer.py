"""The state of a training run: weights, optimiser, roles, every named state; one backward, one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from flowalign.blame import blame, finite_gradient
from flowalign.minibatch import Minibatch
from flowalign.options import FitOptions
from flowalign.policy import Policy, Weights
from flowalign.recipe import Learner, Recipe
from flowalign.restraint import Anchor
from flowalign.source import Source

__all__ = ["Trainer"]


class Trainer:
    """The state of a run: what :func:`fit` changes and a checkpoint holds."""

    def __init__(
        self,
        policy: Policy,
        parameters: list[nn.Parameter],
        recipe: Recipe,
        source: Source,
        options: FitOptions,
        accelerator: Any,
        learners: tuple[Learner, ...] = (),
    ) -> None:
        self.learners = (*recipe.learners, *learners)  # those of the method, then those of the rewards
        self.policy, self.parameters, self.recipe, self.source = policy, parameters, recipe, source
        self.options, self.accelerator = options, accelerator
        own = list(recipe.objective.parameters())
        groups: list[dict[str, Any]] = [{"params": parameters, "lr": options.lr, "base": options.lr}]
        if own:
            groups.append({"params": own, "lr": options.lr_objective, "base": options.lr_objective})
        self.optimizer = torch.optim.AdamW(groups, betas=options.betas, weight_decay=options.weight_decay)
        self.iteration = 0
        self.steps = 0

    @property
    def every(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [p for g in self.optimizer.param_groups for p in g["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimiser, roles, every named state, ledger and random state."""
        r = self.recipe
        return {
            "iteration": self.iteration,
            "steps": self.steps,
            "weights": [p.detach().clone() for p in self.parameters],
            "objective": r.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "roles": {n: w.state_dict() for n, w in self.policy.roles.items() if isinstance(w, Weights)},
            **self.around(),
        }

    def around(self) -> dict[str, Any]:
        """Return the part of the state that sampling and judging may change, without any weights of the generator."""
        r = self.recipe
        return {
            "credit": {} if r.credit is None else r.credit.state_dict(),
            "aggregate": r.aggregate.state_dict(),
            "source": self.source.state_dict(),
            "learners": [learner.state_dict() for learner in self.learners],
            "ledger": self.policy.ledger.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all of it.

        Raises:
            ValueError: if the checkpoint is of another model or method.
        """
        r = self.recipe
        shapes = [tuple(p.shape) for p in self.parameters]
        saved = [tuple(w.shape) for w in state["weights"]]
        if shapes != saved:
            raise ValueError(
                f"the checkpoint holds {len(saved)} trained tensors that do not fit this model's {len(shapes)}."
            )
        self.iteration, self.steps = int(state["iteration"]), int(state["steps"])
        with torch.no_grad():
            for p, w in zip(self.parameters, state["weights"], strict=True):
                p.copy_(w)
        r.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, role in self.policy.roles.items():
            if isinstance(role, Weights):
                role.load_state_dict(state["roles"][name])
        if r.credit is not None:
            r.credit.load_state_dict(state["credit"])
        r.aggregate.load_state_dict(state["aggregate"])
        self.source.load_state_dict(state["source"])
        for learner, s in zip(self.learners, state["learners"], strict=True):
            learner.load_state_dict(s)
        self.policy.ledger.load_state_dict(state["ledger"])
        torch.set_rng_state(state["rng"])

    def backward(self, batch: Minibatch, share: float, fresh: bool) -> dict[str, Tensor]:
        """Add the gradient of one minibatch; return its metrics.

        Raises:
            FloatingPointError: for a gradient that is not finite, naming step and term; no step was taken.
        """
        losses = self.recipe.objective(self.policy, batch.data, batch.cond)
        if fresh:
            self._guard(losses.metrics)
        extra = self.recipe.aggregate.backward(losses.terms, self.parameters, share)
        if not finite_gradient(self.every):
            self.optimizer.zero_grad(set_to_none=True)
            again = batch if batch.again is None else batch.again()
            self._stop(blame(self.recipe.objective, self.policy, again.data, again.cond, self.every))
        terms = {f"loss/{k}": v.detach() for k, v in losses.terms.items()}
        return terms | losses.metrics | {k: torch.tensor(v) for k, v in extra.items()}

    def hold(self, anchors: Sequence[Anchor]) -> dict[str, Tensor]:
        """Add the gradients of the restraint's terms to those of the coming step; return their metrics.

        Raises:
            FloatingPointError: for a gradient that is not finite.
        """
        metrics: dict[str, Tensor] = {}
        for anchor in anchors:
            metrics |= anchor.backward(self.policy, self.steps)
            if not finite_gradient(self.every):
                self.optimizer.zero_grad(set_to_none=True)
                self._stop(f"the restraint's term {anchor.name!r} has a gradient that is not finite.")
        return metrics

    def _stop(self, why: str) -> NoReturn:
        raise FloatingPointError(
            f"optimiser step {self.steps + 1} (iteration {self.iteration}) was not taken, since its gradient is not "
            f"finite; the weights are the last good ones. {why[0].upper() + why[1:]} Lower the learning rate or the "
            "reward's scale, take fewer taped steps, or mend the term."
        )

    def step(self) -> float:
        """Clip, check and apply the gradient; return its norm.

        Raises:
            FloatingPointError: for a gradient that is not finite; the weights are still the last good ones.
        """
        for p in self.every:
            if p.grad is not None and self.accelerator is not None and self.accelerator.num_processes > 1:
                p.grad = self.accelerator.reduce(p.grad, "mean")
        norm = float(torch.nn.utils.clip_grad_norm_(self.every, self.options.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            self._stop(f"every minibatch's own was finite: the norm of their sum is {norm}.")
        ramp = min(1.0, (self.steps + 1) / max(self.options.warmup, 1))
        for g in self.optimizer.param_groups:
            g["lr"] = g["base"] * ramp
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.steps % self.options.ema_every == 0:
            self.follow("ema")
        return norm

    def follow(self, name: str) -> None:
        """Let a role follow the current weights by one update."""
        role = self.policy.roles.get(name)
        if isinstance(role, Weights):
            role.update()

    def _guard(self, metrics: Mapping[str, Tensor]) -> None:
        """Stop if the ratio before any update is not one: rollout and update would optimise different things."""
        if "ratio_gap" not in metrics or self.recipe.role != "current":
            return
        clip = getattr(self.recipe.objective, "epsilon", None)
        limit = self.options.ratio_tolerance * (min(clip) if clip is not None else 1e-2)
        gap = float(metrics["ratio_gap"])
        if not gap <= limit:
            raise RuntimeError(
                f"before the first update the policy ratio is off by {gap:.3g} (allowed: {limit:.3g}), although the "
                "weights are those that sampled. Rollout and update do not compute the same thing: use the same batch "
                "shape, dtype, attention backend and guidance in both, and no dropout."
            )
