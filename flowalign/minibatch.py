"""From an experience to minibatches of what the objective wants, in an order given by (seed, iteration)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.batches import leaves, pairs, paths
from flowalign.collect import Collector, grow
from flowalign.credit import Group
from flowalign.experience import Experience
from flowalign.noise import mix
from flowalign.options import FitOptions
from flowalign.recipe import Recipe, trained_steps
from flowalign.source import Draw
from flowalign.thinning import live_groups
from flowalign.trajectory import Transitions, ranks

__all__ = ["Minibatch", "minibatches"]


@dataclass(frozen=True)
class Minibatch:
    """Data of one forward pass of the loss, and the condition that its rows index.

    ``again`` makes it anew where a backward pass uses it up.
    """

    data: Any
    cond: Any
    again: Callable[[], Minibatch] | None = None


def minibatches(
    recipe: Recipe,
    collector: Collector,
    experience: Experience | None,
    draw: Draw,
    options: FitOptions,
    iteration: int,
    update: int,
) -> Sequence[Minibatch]:
    """Return the minibatches of one pass.

    Args:
        recipe: the method.
        collector: samples taped rollouts for objectives that want them grown.
        experience: of the iteration; None for grown ones.
        draw: of the iteration.
        options: batch size and seed.
        iteration: number of the iteration.
        update: number of the pass.
    """
    if experience is None:
        return Growing(recipe, collector, draw, options, iteration, update)
    data = _wanted(recipe, experience, update)
    if options.filter_groups:
        data = live_groups(data, experience)
    if not len(data):
        return []
    g = torch.Generator().manual_seed(mix(options.seed, iteration, 300 + update))
    order = _in_pairs(data.row, g) if recipe.objective.paired else _order(data, g)
    return [Minibatch(data[index], experience.cond) for index in order.split(options.batch)]


def _order(data: Any, g: torch.Generator) -> Tensor:
    """Return a random order; steps from one state stay together, since a batch asks the network once about each."""
    shared = data.sources() if isinstance(data, Transitions) else None
    if shared is None:
        return torch.randperm(len(data), generator=g)
    first, inverse = shared
    return torch.randperm(len(first), generator=g)[inverse].argsort(stable=True)


def _in_pairs(row: Tensor, g: torch.Generator) -> Tensor:
    """Return a random order in which a row's samples come in pairs, each time others; the odd one is a pair alone."""
    by_row = torch.randperm(len(row), generator=g)
    by_row = by_row[row[by_row].argsort(stable=True)]
    _, pair = torch.unique(row[by_row] * len(row) + ranks(row[by_row]) // 2, return_inverse=True)
    return by_row[torch.randperm(int(pair.max()) + 1, generator=g)[pair].argsort(stable=True)]


def _wanted(recipe: Recipe, e: Experience, update: int) -> Any:
    wants = recipe.objective.wants
    if wants == "pairs":
        return pairs(e, recipe.objective.times, recipe.pairs, update)
    if wants == "paths":
        levels = set(trained_steps(recipe, e.trajectory.times, e.policy.process))
        return paths(e, None if recipe.credit is None else recipe.credit(e), update, levels)
    if wants == "leaves":
        return leaves(e, _leaf_weight(recipe, e), recipe.objective.times, update, _names(recipe, e))
    return _transitions(recipe, e)


def _transitions(recipe: Recipe, e: Experience) -> Transitions:
    if "credit" not in e.cache:
        assert recipe.credit is not None
        e.cache["credit"] = recipe.credit(e)
    levels = set(trained_steps(recipe, e.trajectory.times, e.policy.process))
    steps = e.trajectory.transitions(e.cache["credit"], lambda k, t, s: k in levels)
    return steps if recipe.thin is None else recipe.thin(steps, e)


def _names(recipe: Recipe, e: Experience) -> tuple[str, ...]:
    return tuple(e.rewards) if recipe.per_reward else ("reward",)


def _leaf_weight(recipe: Recipe, e: Experience) -> Tensor:
    if recipe.per_reward:
        if not isinstance(recipe.credit, Group):
            raise ValueError(
                "one loss per reward needs the group credit, whose normalisation is applied to each reward."
            )
        group = e.group[e.trajectory.leaves.row]
        return torch.stack([recipe.credit.normalise(r, group) for r in e.rewards.values()], 1)
    assert recipe.credit is not None
    weight = recipe.credit(e)[-1]
    assert weight is not None
    return weight


class Growing(Sequence[Minibatch]):
    """Taped rollouts made one by one as they are asked for: only one graph is alive at a time."""

    def __init__(
        self, recipe: Recipe, collector: Collector, draw: Draw, options: FitOptions, iteration: int, update: int
    ) -> None:
        if recipe.tape is None:
            raise ValueError("an objective that backpropagates through sampling needs a tape.")
        self.recipe, self.collector, self.draw = recipe, collector, draw
        self.tape, self.iteration = recipe.tape(iteration), iteration
        per = max(1, options.batch // options.size)
        groups = range(int(draw.group.max()) + 1)
        self.parts = [list(groups[i : i + per]) for i in range(0, len(groups), per)]
        self.update = update

    def __len__(self) -> int:
        """Return the number of microbatches."""
        return len(self.parts)

    def __getitem__(self, i: Any) -> Any:
        """Make one."""
        data, cond = grow(self.collector, self.draw.part(self.parts[i]), mix(self.iteration, self.update), self.tape)
        return Minibatch(data, cond, lambda: self[i])

    def __iter__(self) -> Iterator[Minibatch]:
        """Make them in turn."""
        return (self[i] for i in range(len(self)))
