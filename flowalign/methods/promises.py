"""What a particle promises: the lookaheads of Feynman-Kac steering (FK section 3, Singhal et al. 2501.06848).

    mean      r(x̂0)                                              one look, no network call
    draws     (1/λ) log mean exp(λ r(x̂0 + std(t) z))             several looks,      std² = d² σ² / (α² d² + σ²)
    ODE       r(short ODE from x_t)                               one look, more network calls
    learned   V_φ(x_t, t, prompt), trained by flow-nrg            no look, a small network

All are exact at data time, so the target is the same; they differ in the variance of the weights and in what they cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowalign.methods.flow_nrg import Objective, read_values
from flowalign.methods.particles import Rows
from flowalign.noise import Noise, mix
from flowalign.process import Posterior, Process, Time
from flowalign.values import Completion, Draws, Score, Tweedie, Value

__all__ = ["Foreseen", "promise", "spread_of"]


def spread_of(process: Process, data: float) -> Callable[[Time], Tensor]:
    """Return the deviation of ``x0 | x_t`` at time t, for Gaussian data of deviation ``data``."""

    def spread(t: Time) -> Tensor:
        alpha, sigma = process(t)
        return data * sigma / ((alpha * data) ** 2 + sigma**2).sqrt()

    return spread


@dataclass(frozen=True)
class Foreseen(Value):
    """Learned values on the way, the rewards themselves at data time.

    Attributes:
        objectives: a value of each reward, with its weight.
        prompt: of each row.
        score: of clean states.
    """

    objectives: list[Objective]
    prompt: Tensor
    score: Score

    def __call__(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
        """Return ``(B,)``."""
        at = torch.as_tensor(t, dtype=torch.float64).reshape(-1).expand(len(x))
        if not bool((at > 0).any()):
            return self.score(x, row)
        return torch.stack([o.weight * o.value(x, at, self.prompt[row]) for o in self.objectives]).sum(0)


def promise(rows: Rows, scale: float, *, steps: int = 1, draws: int = 1, data: float = 1.0, learned: str = "") -> Value:
    """Return the value of particles.

    Args:
        rows: whose judge and conditions.
        scale: λ of the soft mean over draws.
        steps: of the ODE; 1 for the posterior mean.
        draws: around the posterior mean; 1 for the mean itself.
        data: deviation of the clean states.
        learned: file of trained values; "" for none.

    Raises:
        ValueError: for a file that holds no value of a reward.
    """
    task = rows.task
    if learned:
        shape = task.pipeline.shape(task.judge.cond)
        return Foreseen(
            read_values(Path(learned), task.judge.scorer.weights, shape, task.draw.prompts), rows.prompt, rows.score
        )
    if draws > 1:
        number = torch.arange(draws)
        shape = task.pipeline.shape(task.judge.cond)
        z = Noise(mix(task.seed, 61)).normal(0, torch.zeros_like(number), number, shape)
        return Draws(rows.score, spread_of(task.policy.process, data), z, scale)
    return Tweedie(rows.score) if steps == 1 else Completion(task.policy, rows.score, rows.cond, steps)
