"""What a method is: a frozen dataclass of its settings that names its choices, its reference and its presets.

    training      settings + the sampler's times  →  Recipe  (kernel, selection, credit, objective, ...)
    steering      settings + a task               →  rounds of candidates, until the method or the budget ends

A file of this folder holds one paper. Its settings are the keys of a configuration file and the options of the command
line; its docstring is their help. ``presets()`` gives at least ``published``, as the paper's code has it, and ``demo``,
as it was tried on the shipped worlds. To add a method: write the file, add one line to ``METHODS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.prepare import Lora
from flowalign.protocols import Pipeline
from flowalign.recipe import Recipe
from flowalign.rollout import Stage
from flowalign.scorer import Bound
from flowalign.source import Draw
from flowalign.trajectory import Trajectory

__all__ = ["Candidates", "Kind", "Method", "Preset", "Steering", "Task", "Training", "levels_between"]

Kind = Literal["training", "steering"]


class Method(ABC):
    """One paper: its settings are the fields of the subclass, a frozen dataclass.

    Attributes:
        name: how the command line calls it.
        summary: one line: what it does.
        reference: BibTeX; ``flowalign cite`` prints it.
        kind: whether it trains the generator or steers a frozen one.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    kind: ClassVar[Kind]

    @classmethod
    @abstractmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return settings by name: ``published`` and ``demo`` at least."""


@dataclass(frozen=True)
class Preset:
    """Settings that belong together.

    Attributes:
        method: the method's own.
        fit: how long and how hard to train; steering uses its ``steps`` and ``size`` alone.
        lora: the adapter; None trains the whole denoiser.
        ema: decay of the averaged weights that are evaluated and saved; None for none.
        guidance: whether the pipeline's own guidance rule is on while training.
        note: where the settings come from, and what they were seen to do.
    """

    method: Method
    fit: FitOptions = field(default_factory=FitOptions)
    lora: Lora | None = field(default_factory=Lora)
    ema: float | None = 0.9
    guidance: bool = True
    note: str = ""


class Training(Method):
    """A method that changes the generator's weights."""

    kind: ClassVar[Kind] = "training"

    @abstractmethod
    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices for a sampler that visits ``times (K + 1,)``, falling.

        A recipe holds the states of one run (quantiles, windows, log Z): make a new one for each run.

        Raises:
            ValueError: for settings that do not fit the number of steps.
        """


def unseen(stage: Stage) -> None:
    """Look at a level of a rollout and do nothing."""


@dataclass(frozen=True)
class Task:
    """What a steering method is asked to do.

    Its policy and judge share a ledger that may carry a limit: :class:`~flowalign.ledger.BudgetSpent` then comes out of
    them and is let through. What was judged until then is remembered by whoever asked.

    Attributes:
        pipeline: the generator.
        policy: evaluates it and books the cost.
        judge: scores clean states of the draw's rows.
        draw: one row per prompt; ``samples`` says how many results each is to have.
        times: ``(K + 1,)`` of the sampler.
        seed: of all noise.
        watch: sees each level of a rollout as it is made; ``particles.roll`` calls it.
        keep: keep what the network said at each node, for the pictures of a report; it costs memory.
        folder: where a search that can be continued keeps its state; None for nowhere.
    """

    pipeline: Pipeline
    policy: Policy
    judge: Bound
    draw: Draw
    times: Tensor
    seed: int
    watch: Callable[[Stage], None] = unseen
    keep: bool = False
    folder: Path | None = None


@dataclass(frozen=True)
class Candidates:
    """One round of a search.

    Attributes:
        x: clean states ``(M, *)``.
        row: prompt of each, ``(M,)``.
        rewards: by name, ``(M,)`` each.
        total: the weighted reward, ``(M,)``.
        log_w: log importance weights ``(M,)``; zeros where all count alike.
        trajectory: the genealogy, where it was kept.
        log_z: estimate of the log normalising constant of each prompt, ``(P,)``, where the method makes one.
    """

    x: Tensor
    row: Tensor
    rewards: Mapping[str, Tensor]
    total: Tensor
    log_w: Tensor
    trajectory: Trajectory | None = None
    log_z: Tensor | None = None


class Steering(Method):
    """A method that searches the samples of a frozen generator.

    Attributes:
        results: ``best``: the best of all candidates are the result; ``last``: the last round is, with its weights.
        resumable: whether a search goes on from what it kept in the task's folder.
    """

    kind: ClassVar[Kind] = "steering"
    resumable: ClassVar[bool] = False
    results: ClassVar[Literal["best", "last"]] = "best"

    @abstractmethod
    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield rounds of candidates: stopping early must leave what was yielded usable."""


def levels_between(times: Tensor, first: int, last: int) -> Callable[[float, float], bool]:
    """Return ``window(t, s)``: whether a step starts at one of the levels ``first`` to ``last - 1``.

    The bounds lie half-way between grid times, so that a time that went through float32 is still recognised.

    Raises:
        ValueError: if the range holds no step of the grid.
    """
    grid = torch.as_tensor(times, dtype=torch.float64).tolist()
    if not 0 <= first < last <= len(grid) - 1:
        raise ValueError(
            f"a window of steps {first} to {last} does not lie in the {len(grid) - 1} steps of the sampler: it must "
            "hold at least one step. Change the window or the number of steps."
        )
    high = 2.0 if first == 0 else (grid[first - 1] + grid[first]) / 2
    low = (grid[last - 1] + grid[last]) / 2
    return lambda t, s: low < t < high
