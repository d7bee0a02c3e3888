"""A method is one choice per slot; a recipe holds the choices.

    kernel × selection × potential/guide × reward × credit × objective

A paper is a small file in ``flowalign/methods`` that returns one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowalign.aggregate import Aggregate, Sum
from flowalign.credit import Credit, Group
from flowalign.experience import Experience
from flowalign.growth import Growth
from flowalign.guidance import Guide
from flowalign.kernels import Kernel
from flowalign.learner import Learner
from flowalign.objectives.base import Objective
from flowalign.potentials.base import Potential
from flowalign.process import Process, Rectified
from flowalign.restraint import Restraint
from flowalign.rollout import Tape
from flowalign.selection.base import Selection
from flowalign.trajectory import Trajectory, Transitions
from flowalign.values import Score, Value

__all__ = ["Learner", "Recipe"]


T = TypeVar("T")
FLOW = Rectified()
Search = Callable[[Any, Any, Any, int], Trajectory]  # (collector, draw, judge, iteration) -> leaves with weights


def identity(x: T) -> T:
    """Return the argument."""
    return x


def always(level: int, t: float, s: float) -> bool:
    """Train on every stochastic step."""
    return True


@dataclass
class Recipe:
    """The slots of a training method.

    Attributes:
        kernel: the law of a step.
        objective: the loss.
        credit: rewards → credit per step; None where the objective needs none.
        select: branching of the rollout.
        guide: guidance of the rollout.
        value: makes a state's value from the judge of the iteration's prompts; for potentials and guides.
        potential: weights of lineages.
        role: whose weights sample (``old`` for DiffusionNFT).
        old: decay of the old policy, update number → decay, where the objective or the sampler uses one.
        roots: samples of a row → nodes that enter for it; trees enter few and branch (``roots(16) = 1``).
        grid: the pipeline's times → the method's (early exit, fewer steps after a window).
        shared_noise: one initial noise for all samples of a group (DanceGRPO).
        trained: ``(level, t, s) → bool``: which of the stochastic steps are trained.
        thin: a further subset of the transitions of an iteration, e.g. random steps per sample.
        uneven: whether ``thin`` leaves more or fewer transitions as the rewards fall out; several processes, each with
            rewards of its own, would then take different numbers of steps.
        tape: iteration → which levels carry a graph (reward backpropagation).
        growth: how a taped batch is grown where it is no plain rollout (Direct-Align, part of the way and back).
        renoise: re-noisings of the finished sample for the last taped step (DRaFT-LV); 0 for none.
        per_reward: one advantage column and one loss per reward (MARBLE).
        pairs: preference pairs per group.
        aggregate: how losses become one gradient.
        learners: what learns beside the policy.
        keep: keep posteriors and laws of the rollout (guarded ratios, penalties on taped states).
        search: finds an iteration's samples, with their weights, in place of a rollout (a sampler that is distilled).
        restraint: reward ceiling, base samples mixed in, pre-training loss: the same for every method.
    """

    kernel: Kernel
    objective: Objective
    credit: Credit | None = field(default_factory=Group)
    select: Selection | None = None
    guide: Guide | None = None
    value: Callable[[Score], Value] | None = None
    potential: Potential | None = None
    role: str = "current"
    old: Callable[[int], float] | None = None
    roots: Callable[[int], int] = identity
    grid: Callable[[Tensor], Tensor] = identity
    shared_noise: bool = False
    trained: Callable[[int, float, float], bool] = always
    thin: Callable[[Transitions, Experience], Transitions] | None = None
    uneven: bool = False
    tape: Callable[[int], Tape] | None = None
    growth: Growth | None = None
    renoise: int = 0
    per_reward: bool = False
    pairs: int = 1
    aggregate: Aggregate = field(default_factory=Sum)
    learners: tuple[Learner, ...] = ()
    keep: bool = False
    restraint: Restraint = field(default_factory=Restraint)
    search: Search | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """Every policy role that sampling or the loss uses besides ``current``."""
        used = (*self.objective.roles, *self.restraint.roles, *([self.role] if self.role != "current" else []))
        return tuple(dict.fromkeys(used))


def trained_steps(recipe: Recipe, times: Tensor, process: Process = FLOW) -> list[int]:
    """Return the levels whose step draws noise and is trained.

    Args:
        recipe: the method.
        times: ``(K + 1,)`` of its sampler, falling.
        process: the generator's; some laws vanish at data time where it is clean, and do not where noise is left there.

    Raises:
        ValueError: if there is none: the method would have nothing to learn from.
    """
    grid = times.tolist()
    levels = [
        k
        for k in range(len(grid) - 1)
        if recipe.trained(k, grid[k], grid[k + 1]) and _noisy(recipe.kernel, process, grid[k], grid[k + 1])
    ]
    if not levels:
        raise ValueError(
            f"none of the {len(grid) - 1} steps draws noise and is trained: a policy gradient needs at least one. Use "
            "more steps, a positive noise level, or a wider window."
        )
    return levels


def _noisy(kernel: Kernel, process: Process, t: float, s: float) -> bool:
    """Return whether the step's law has a density: a law may say that it draws noise and have std 0 at this step."""
    if not kernel.stochastic(t, s):
        return False
    x = torch.zeros(1, 1)
    return bool((kernel(x, process.posterior(x, t, x0=x), t, s)[0].std > 0).any())
