"""Adaptive allocation: samples go where rewards still differ, for a group without variance teaches nothing.

A running variance of the rewards within each prompt's groups, a named state, decides. With s_p its root,

    by = "prompt"   prompts are drawn without replacement with  p ∝ (1 - floor) s_p / Σ s + floor / P
    by = "size"     prompts come in shuffled epochs as ever, and share the iteration's samples:  n_p ∝ s_p,
                    at least ``least`` each, in multiples of ``unit``: Neyman's allocation, which estimates the mean of
                    the groups' gradients with the least variance

A prompt never seen has the largest variance known, so every prompt is tried before any is neglected, and the floor
keeps coming back to those that were dull. Either way prompts with much variance weigh more in the loss, which is the
mean over samples: the objective is no longer the plain mean over prompts. The order of prompts is a function of (state,
iteration), and the state is saved, so that a resumed run repeats it bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowalign.noise import mix
from flowalign.source import Draw, Prompt, Prompts, Source, make_draw

__all__ = ["Adaptive", "Allocation", "make_source", "shares"]


@dataclass(frozen=True)
class Allocation:
    """How an iteration's samples are spread over prompts.

    Attributes:
        by: even (every prompt in turn, equally many samples), prompt or size; see the module.
        memory: weight of the past in a prompt's running variance, in [0, 1).
        floor: share of the draws that is spread evenly (``prompt``), in (0, 1].
        least: samples of a prompt at least (``size``).
        unit: samples of a prompt are a multiple of this (``size``): the leaves of a tree, the siblings of a branch.
    """

    by: Literal["even", "prompt", "size"] = "even"
    memory: float = 0.7
    floor: float = 0.2
    least: int = 2
    unit: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.memory < 1 or not 0 < self.floor <= 1:
            raise ValueError(f"need 0 <= memory < 1 and 0 < floor <= 1; got {self.memory} and {self.floor}.")
        if self.least < 1 or self.unit < 1:
            raise ValueError(f"allocation.least and allocation.unit must be at least 1; got {self.least}, {self.unit}.")


class Adaptive(Source):
    """Prompts by running reward variance.

    Args:
        prompts: what to ask for.
        allocation: how.
        seed: of the draws.
    """

    alike: ClassVar[bool] = False

    def __init__(self, prompts: Sequence[Prompt | str], allocation: Allocation, seed: int = 0) -> None:
        self.even = Prompts(prompts, seed)
        self.allocation, self.seed = allocation, seed
        self.variance: dict[str, float] = {}

    def spread(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return the root of each prompt's running variance, ``(P,)``; the largest known one where there is none."""
        most = max(self.variance.values(), default=1.0)
        return torch.tensor([self.variance.get(p.text, most) for p in prompts], dtype=torch.float64).sqrt()

    def draw(self, iteration: int, groups: int, size: int) -> Draw:
        """Return ``groups`` groups, ``groups · size`` samples in all.

        Raises:
            ValueError: if ``size`` is no multiple of the unit, or below the least.
        """
        a = self.allocation
        if a.by == "prompt":
            return make_draw(self._choose(iteration, groups), size)
        if size % a.unit or size < a.least:
            raise ValueError(
                f"allocation.by = 'size' shares out whole units of {a.unit} samples, at least {a.least} a prompt: "
                f"fit.size must be a multiple of the one and not below the other; got {size}."
            )
        chosen = [self.even.pick(iteration * groups + i) for i in range(groups)]
        return make_draw(chosen, shares(self.spread(chosen), groups * size, a.least, a.unit))

    def _choose(self, iteration: int, groups: int) -> list[Prompt]:
        """Draw distinct prompts by Gumbel's top-k; where groups outnumber prompts, all of them and some again."""
        every, s = self.even.prompts, self.spread(self.even.prompts)
        floor = self.allocation.floor
        p = (1 - floor) * s / s.sum().clamp_min(1e-30) + floor / len(every)
        g = torch.Generator().manual_seed(mix(self.seed, iteration, 21))
        out: list[Prompt] = []
        while len(out) < groups:
            gumbel = -torch.empty(len(every), dtype=torch.float64).exponential_(generator=g).log()
            order = (p.log() + gumbel).argsort(descending=True)
            out += [every[i] for i in order.tolist()[: groups - len(out)]]
        return out

    def observe(self, draw: Draw, rewards: Tensor, row: Tensor) -> None:
        """Take in the variance of each group's rewards ``(N,)``; a group of one sample says nothing."""
        group = draw.group[row]
        for g in draw.group.unique().tolist():
            mine = rewards[group == g].double()
            if len(mine) < 2:
                continue
            text, new = draw.prompts[int((draw.group == g).nonzero()[0])], float(mine.var())
            old, m = self.variance.get(text), self.allocation.memory
            self.variance[text] = new if old is None else m * old + (1 - m) * new

    def state_dict(self) -> dict[str, Any]:
        """Return the running variances."""
        return {"variance": dict(self.variance)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.variance = {k: float(v) for k, v in state["variance"].items()}


def shares(spread: Tensor, total: int, least: int = 2, unit: int = 1) -> list[int]:
    """Share ``total`` samples in proportion to ``spread (G,)``, in multiples of a unit, by largest remainders.

    Args:
        spread: standard deviations, not negative; all zero shares evenly.
        total: samples in all, a multiple of the unit.
        least: samples of each at least.
        unit: of which each gets a multiple.
    """
    floor = -(-least // unit)
    free = total // unit - floor * len(spread)
    if free < 0:
        raise ValueError(f"{total} samples cannot give {len(spread)} prompts {floor * unit} each.")
    s = spread.double()
    quota = (s / s.sum() if float(s.sum()) > 0 else torch.full_like(s, 1 / len(s))) * free
    units = quota.floor()
    order = (quota - units).argsort(descending=True, stable=True)
    units[order[: free - int(units.sum())]] += 1
    return [(floor + int(u)) * unit for u in units.tolist()]


def make_source(prompts: Sequence[Prompt | str], allocation: Allocation, seed: int = 0) -> Source:
    """Return the source that an allocation asks for."""
    return Prompts(prompts, seed) if allocation.by == "even" else Adaptive(prompts, allocation, seed)
