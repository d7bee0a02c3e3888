"""What particle methods share: which noisy kernel suits a process, how particles enter, and what they leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.kernels import Ancestral, EulerMaruyama, Kernel
from flowalign.laws import Ddim, FlowGrpo
from flowalign.methods.base import Candidates, Task
from flowalign.noise import START, Noise
from flowalign.process import Process, Rectified
from flowalign.trajectory import Nodes, Trajectory, ranks

__all__ = ["Rows", "finish", "noisy_kernel", "rows_of"]


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
    """

    prompt: Tensor
    cond: Any
    noise: Noise
    task: Task

    def score(self, x0: Tensor, row: Tensor) -> Tensor:
        """Return the weighted reward of clean states of the given rows."""
        return self.task.judge.total(x0, self.prompt[row])

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


def finish(rows: Rows, tree: Trajectory) -> Candidates:
    """Judge the leaves and return them as candidates of their prompts, with their weights."""
    leaves = tree.leaves
    prompt = rows.prompt[leaves.row]
    with torch.no_grad():
        rewards = rows.task.judge(leaves.x, prompt)
        total = torch.stack([rows.task.judge.scorer.weights[k] * r for k, r in rewards.items()]).sum(0)
    return Candidates(leaves.x, prompt, rewards, total, leaves.log_w, tree)
