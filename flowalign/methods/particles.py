"""What particle methods share: which noisy kernel suits a process, how particles enter, and what they leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowalign.guidance import Guide
from flowalign.kernels import Ancestral, EulerMaruyama, Kernel
from flowalign.laws import Ddim, FlowGrpo
from flowalign.methods.base import Candidates, Task
from flowalign.noise import START, Noise
from flowalign.policy import Policy
from flowalign.potentials import Potential
from flowalign.process import Process, Rectified
from flowalign.rollout import walk
from flowalign.selection import Selection
from flowalign.trajectory import Nodes, Trajectory, ranks
from flowalign.values import Value

__all__ = ["Rows", "finish", "noisy_kernel", "roll", "rows_of"]


def noisy_kernel(process: Process, noise: float) -> Kernel:
    """Return a stochastic kernel: the SDE with ``a = noise`` for a flow, DDIM with ``η = noise`` for a diffusion.

    Raises:
        ValueError: for no noise: particles that share a parent would be copies of each other.
    """
    if noise <= 0:
        raise ValueError(
            f"particle methods need a stochastic sampler; got noise = {noise}. Use .7 for flows, 1 for DDIM."
        )
    return EulerMaruyama(FlowGrpo(noise)) if isinstance(process, Rectified) else Ancestral(Ddim(noise))


@dataclass(frozen=True)
class Rows:
    """Particle systems of a task, one per row: which prompt each belongs to, its condition, its noise.

    Attributes:
        prompt: of each row, ``(R,)``.
        cond: by row.
        noise: keyed by row.
        task: whose.
        heard: the states judged last, and their rewards: the leaves of a rollout are not decoded a second time.
    """

    prompt: Tensor
    cond: Any
    noise: Noise
    task: Task
    heard: list[tuple[Tensor, Mapping[str, Tensor]]] = field(default_factory=list, repr=False, compare=False)

    def score(self, x0: Tensor, row: Tensor) -> Tensor:
        """Return the weighted reward of clean states of the given rows."""
        rewards = self.task.judge(x0, self.prompt[row])
        self.heard[:] = [(x0.detach(), {k: r.detach() for k, r in rewards.items()})]
        return torch.stack([self.task.judge.scorer.weights[k] * r for k, r in rewards.items()]).sum(0)

    def last(self, x0: Tensor) -> Mapping[str, Tensor] | None:
        """Return the rewards of states if they are those that were judged last."""
        return next((r for x, r in self.heard if x.shape == x0.shape and torch.equal(x, x0)), None)

    def enter(self, n: int) -> Nodes:
        """Return ``n`` fresh particles for each row."""
        row = torch.arange(len(self.prompt)).repeat_interleave(n)
        shape = self.task.pipeline.shape(self.task.judge.cond)
        z = self.noise.normal(START, row, ranks(row), shape)
        return Nodes.enter(self.task.pipeline.start(z, float(self.task.times[0]), self.cond[row]), row)


def rows_of(task: Task, per_sample: bool, seed: int | None = None) -> Rows:
    """Return one row per prompt, or one per wanted result.

    Args:
        task: what to steer.
        per_sample: whether each wanted result is a system of its own.
        seed: of the noise; the task's when None.
    """
    prompt = torch.arange(len(task.draw.prompts))
    if per_sample:
        prompt = prompt.repeat_interleave(task.draw.samples)
    keys = tuple(task.draw.keys[p] * 1_000_003 + int(j) for p, j in zip(prompt.tolist(), ranks(prompt), strict=True))
    return Rows(prompt, task.judge.cond[prompt], Noise(task.seed if seed is None else seed, keys), task)


def roll(
    rows: Rows,
    kernel: Kernel,
    start: Nodes,
    *,
    policy: Policy | None = None,
    value: Value | None = None,
    potential: Potential | None = None,
    select: Selection | None = None,
    guide: Guide | None = None,
) -> Trajectory:
    """Roll out in the task's sight: each level is shown to ``task.watch``, and kept as the task wants it.

    Args:
        rows: whose noise and conditions.
        kernel: the law of a step.
        start: particles.
        policy: evaluates; the task's own when None.
        value: what a state promises; see :func:`flowalign.rollout.rollout` for this and the following.
        potential: weighs lineages.
        select: who has offspring.
        guide: gradient guidance.
    """
    task = rows.task
    levels: list[Nodes | None] = [None] * len(task.times)
    stage = None
    for stage in walk(
        policy or task.policy, kernel, task.times, start, rows.cond, noise=rows.noise, n_rows=len(rows.prompt),
        guide=guide, value=value, potential=potential, select=select,
    ):  # fmt: skip
        task.watch(stage)
        kept = stage.nodes
        levels[stage.level] = replace(kept, gradient=None, step=None, carry=None) if task.keep else kept.bare()
    assert stage is not None
    return Trajectory(torch.as_tensor(task.times, dtype=torch.float64).cpu(), tuple(levels), stage.log_z)


def finish(rows: Rows, tree: Trajectory) -> Candidates:
    """Return the leaves as candidates of their prompts, with their weights; they are judged unless they just were."""
    leaves = tree.leaves
    prompt = rows.prompt[leaves.row]
    with torch.no_grad():
        rewards = rows.last(leaves.x) or rows.task.judge(leaves.x, prompt)
        total = torch.stack([rows.task.judge.scorer.weights[k] * r for k, r in rewards.items()]).sum(0)
    return Candidates(leaves.x, prompt, rewards, total, leaves.log_w, tree)
