"""Where prompts come from: a pure function of the iteration, so that a resumed run sees what it would have seen.

A *group* is what advantages are compared in. It usually is one prompt; it may be several wordings of one (Talk2Move),
each a row of the condition. The key of a row names its noise for good.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowalign.noise import mix, text_key
from flowalign.state import Stateful

__all__ = ["Draw", "Prompt", "Prompts", "Source", "text_key"]


@dataclass(frozen=True)
class Prompt:
    """One thing to ask for.

    Attributes:
        text: the prompt.
        meta: what the reward or the pipeline needs beside it (references, masks, category, ...).
        variants: further wordings of the same request; they share the group.
    """

    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draw:
    """The prompts of one iteration, one entry per row.

    Attributes:
        prompts: texts.
        meta: extras.
        group: group of each row, ``(R,)``.
        keys: noise key of each row.
        samples: samples of each row, ``(R,)``.
    """

    prompts: list[str]
    meta: list[Mapping[str, Any]]
    group: Tensor
    keys: tuple[int, ...]
    samples: Tensor

    def leads(self) -> Tensor:
        """Return the first row of each row's group, ``(R,)``."""
        group = self.group.tolist()
        return torch.tensor([group.index(g) for g in group])

    def part(self, groups: Sequence[int]) -> Draw:
        """Return the rows of some groups, renumbered from 0."""
        keep = [i for i, g in enumerate(self.group.tolist()) if g in set(groups)]
        order = {g: n for n, g in enumerate(groups)}
        index = torch.tensor(keep)
        return Draw(
            [self.prompts[i] for i in keep],
            [self.meta[i] for i in keep],
            torch.tensor([order[int(self.group[i])] for i in keep]),
            tuple(self.keys[i] for i in keep),
            self.samples[index],
        )


class Source(Stateful, ABC):
    """Draws the prompts of an iteration.

    Attributes:
        alike: draws do not depend on rewards, so every process of several draws the same.
    """

    alike: ClassVar[bool] = True

    @abstractmethod
    def draw(self, iteration: int, groups: int, size: int) -> Draw:
        """Return ``groups`` groups of ``size`` samples each."""

    def observe(self, draw: Draw, rewards: Tensor, row: Tensor) -> None:
        """Learn from the rewards ``(N,)`` of a draw's samples, of the given rows (adaptive allocation)."""


class Prompts(Source):
    """A list of prompts, shuffled anew each epoch.

    Args:
        prompts: what to ask for.
        seed: of the shuffling.

    Raises:
        ValueError: for an empty list.
    """

    def __init__(self, prompts: Sequence[Prompt | str], seed: int = 0) -> None:
        if not prompts:
            raise ValueError("no prompts: a training set needs at least one.")
        self.prompts = [Prompt(p) if isinstance(p, str) else p for p in prompts]
        self.seed = seed

    def draw(self, iteration: int, groups: int, size: int) -> Draw:
        """Return the next groups of the shuffled epochs."""
        chosen = [self.pick(iteration * groups + i) for i in range(groups)]
        return make_draw(chosen, size)

    def pick(self, position: int) -> Prompt:
        """Return the prompt at a position of the endless shuffled sequence."""
        epoch, i = divmod(position, len(self.prompts))
        g = torch.Generator().manual_seed(mix(self.seed, epoch))
        return self.prompts[int(torch.randperm(len(self.prompts), generator=g)[i])]


def make_draw(chosen: Sequence[Prompt], size: int | Sequence[int]) -> Draw:
    """Lay out groups of ``size`` samples (one number for all, or one each), spread evenly over a prompt's wordings.

    A prompt that is drawn twice in one iteration gets a key of its own each time: its samples must differ.
    """
    texts, metas, group, keys, samples = [], [], [], [], []
    sizes = [size] * len(chosen) if isinstance(size, int) else size
    for g, (p, n) in enumerate(zip(chosen, sizes, strict=True)):
        wordings = (p.text, *p.variants)[:n]
        for i, text in enumerate(wordings):
            texts.append(text)
            metas.append(p.meta)
            group.append(g)
            keys.append(mix(text_key(text), sum(t == text for t in texts[:-1])))
            samples.append(n // len(wordings) + (i < n % len(wordings)))
    return Draw(texts, metas, torch.tensor(group), tuple(keys), torch.tensor(samples))
