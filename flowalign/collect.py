"""Sampling for training: from a draw of prompts to an experience, or to a taped rollout with its rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flowalign.experience import Experience, ode_from, same, weighted
from flowalign.kernels import Kernel
from flowalign.noise import START, Noise, mix
from flowalign.objectives.backprop import Grown
from flowalign.policy import Policy
from flowalign.protocols import Condition, Pipeline
from flowalign.recipe import Recipe
from flowalign.rollout import Tape, rollout
from flowalign.scorer import Bound, Scorer
from flowalign.selection import Fan
from flowalign.source import Draw
from flowalign.trajectory import Nodes, Trajectory, ranks

__all__ = ["Collector", "collect", "enter", "grow"]


@dataclass(frozen=True)
class Collector:
    """What sampling needs, fixed for a run.

    Attributes:
        pipeline: the generator.
        scorer: its judge.
        policy: its roles.
        recipe: the method.
        steps: sampling steps.
        seed: of the run.
        gather: joins per-sample values of all processes.
        overlap: parts that a draw is cut into, one's scoring overlapping the next one's rollout.
    """

    pipeline: Pipeline
    scorer: Scorer
    policy: Policy
    recipe: Recipe
    steps: int
    seed: int
    gather: Callable[[Tensor], Tensor] = same
    overlap: int = 1

    def bind(self, draw: Draw) -> Bound:
        """Encode a draw's prompts and return their judge."""
        cond = self.pipeline.encode(draw.prompts, draw.meta)
        return self.scorer.bind(cond, draw.prompts, draw.meta)

    def total(self, rewards: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of rewards under the recipe's ceiling, ``(B,)``."""
        return weighted(rewards, self.scorer.weights, self.recipe.restraint.ceiling)

    def sample(
        self, draw: Draw, judge: Bound, iteration: int, tape: Tape | None = None, role: str | None = None
    ) -> Trajectory:
        """Roll out a draw, by the recipe's role unless another is named."""
        r = self.recipe
        for learner in r.learners:
            learner.enter(draw.prompts)
        if r.search is not None:
            return r.search(self, draw, judge, iteration)
        noise = Noise(mix(self.seed, iteration), draw.keys)
        times = r.grid(self.pipeline.times(self.steps))
        samples = torch.tensor([r.roots(n) for n in draw.samples.tolist()])
        select = r.select
        if r.shared_noise and select is None:
            # one node for a row: its samples part at the first step that draws noise, and share every call before
            select = Fan(_first_noise(r.kernel, times.tolist()), tuple(samples.tolist()))
            samples = torch.ones_like(samples)
        row = torch.arange(len(samples)).repeat_interleave(samples)
        lead = draw.leads() if r.shared_noise else None
        start = enter(self.pipeline, judge.cond, row, noise, float(times[0]), shared=lead)

        def score(x: Tensor, i: Tensor) -> Tensor:
            return self.total(judge(x, i))

        if r.guide is not None:
            r.guide.enter(score, noise.seed, noise.keys)
        return rollout(
            self.policy, r.kernel, times, start, judge.cond, noise=noise, n_rows=len(draw.prompts), guide=r.guide,
            value=None if r.value is None else r.value(score), potential=r.potential,
            select=select, tape=tape, role=role or r.role, keep=r.keep,
        )  # fmt: skip


def _first_noise(kernel: Kernel, grid: list[float]) -> int:
    """Return the first level whose step draws noise; the first of all where none does."""
    return next((k for k, (t, s) in enumerate(pairwise(grid)) if kernel.stochastic(t, s)), 0)


def enter(
    pipeline: Pipeline, cond: Condition, row: Tensor, noise: Noise, t: float, *, shared: Tensor | None = None
) -> Nodes:
    """Return starting nodes of the given rows.

    Args:
        pipeline: knows the shape and the scale of its noise.
        cond: by row.
        row: of each node, ``(N,)``.
        noise: keyed.
        t: starting time.
        shared: the row whose one noise all nodes of each row start from, ``(R,)``: of several wordings the first; None
            for a noise of its own for each node.
    """
    if shared is None:
        z = noise.normal(START, row, ranks(row), pipeline.shape(cond))
    else:
        z = noise.normal(START, shared[row], torch.zeros_like(row), pipeline.shape(cond))
    return Nodes.enter(pipeline.start(z, t, cond[row]), row)


def collect(collector: Collector, draw: Draw, iteration: int) -> Experience:
    """Roll out, decode and judge a draw, without gradients."""
    ledger = collector.policy.ledger
    judge = collector.bind(draw)
    if collector.overlap > 1:
        from flowalign.overlap import overlapped

        tree, scores = overlapped(collector, draw, judge, iteration, collector.overlap)
    else:
        with ledger.phase("rollout"):
            tree = collector.sample(draw, judge, iteration)
        with ledger.phase("reward"), torch.no_grad():
            scores = judge(tree.leaves.x, tree.leaves.row, learn=True)
    rewards = {k: v.to(tree.leaves.x.device) for k, v in scores.items()}
    r = collector.recipe
    plain = r.guide is None and r.search is None and r.role == "current"
    return Experience(
        policy=collector.policy,
        trajectory=tree,
        cond=judge.cond,
        group=draw.group,
        rewards=rewards,
        weights=collector.scorer.weights,
        scores=judge,
        seed=collector.seed,
        iteration=iteration,
        gather=collector.gather,
        ceiling=r.restraint.ceiling,
        ode=ode_from(r.kernel, tree.times) if plain else None,
    )


def grow(collector: Collector, draw: Draw, iteration: int, tape: Tape) -> tuple[Grown, Condition]:
    """Roll out with a tape and judge with gradients: one microbatch of reward backpropagation."""
    judge = collector.bind(draw)
    if collector.recipe.growth is not None:
        return collector.recipe.growth(collector, draw, judge, iteration, tape), judge.cond
    if collector.recipe.renoise:
        tree = repeated(collector, collector.sample(draw, judge, iteration), judge, iteration)
    else:
        tree = collector.sample(draw, judge, iteration, tape)
    with torch.enable_grad():
        rewards = judge(tree.leaves.x, tree.leaves.row, learn=True)
        total = collector.total(rewards)
    return Grown(tree, rewards, total), judge.cond


def repeated(collector: Collector, tree: Trajectory, judge: Bound, iteration: int) -> Trajectory:
    """Re-noise finished samples to the last grid time several times and take the last step with a tape (DRaFT-LV).

    ``(1/n) Σ_i ∇_θ r(x̂0_θ(x_i))`` with ``x_i ~ p(x_t | x0)``: the conditional variance falls as 1/n.
    """
    r, t, leaves = collector.recipe, tree.times[-2:], tree.leaves
    noise = Noise(mix(collector.seed, iteration, 13))
    row = leaves.row.repeat_interleave(r.renoise)
    x0 = leaves.x.detach().repeat_interleave(r.renoise, 0)
    z = noise.normal(0, row, ranks(row), x0.shape[1:]).to(x0)
    x = collector.policy.process.forward(x0, float(t[1]), float(t[0]), z)
    return rollout(
        collector.policy, r.kernel, t, Nodes.enter(x, row), judge.cond, noise=noise, n_rows=tree.n_rows, tape=Tape(0)
    )
