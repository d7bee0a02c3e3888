"""Prompts of the shapes worlds, split by composition.

    withheld   compositions that the base model is never shown (1 in 12)
    select     shown to the base, not used in alignment: recipes are chosen on these
    report     shown to the base, not used in alignment: figures are reported on these
    train      the rest: what alignment may use

A Latin pattern over (number or relation, colour, shape) decides, so that every word, and every pair of words, occurs in
``train``: what is held out is the combination, not only the wording.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from flowalign.pipelines.worlds.scenes import CATEGORIES, COLOURS, MIXED, RELATIONS, SHAPES, Caption, captions

__all__ = ["Split", "base", "base_groups", "prompts", "split_of"]

Split = Literal["train", "select", "report", "withheld"]
SPLITS: tuple[Split, ...] = ("train", "select", "report", "withheld")


def _phase(caption: Caption) -> int:
    """Return the caption's place in the Latin pattern, 0 to 11."""
    colours, total = list(COLOURS), 0
    for i, g in enumerate(caption.groups):
        total += (2 * colours.index(g.colour) + 5 * SHAPES.index(g.shape)) * (1 if i == 0 else 7)
    if caption.relation is not None:
        total += 3 * RELATIONS.index(caption.relation)
    elif len(caption.groups) == 2:
        total += 3 * MIXED.index((caption.groups[0].number, caption.groups[1].number))
    else:
        total += 3 * caption.total
    return total % 12


def split_of(caption: Caption) -> Split:
    """Return the split that a caption belongs to; single objects are always in train (there is nothing to combine)."""
    if caption.category == "single":
        return "train"
    phase = _phase(caption)
    if phase == 0:
        return "withheld"
    if phase in (4, 9):
        return "select"
    return "report" if phase in (2, 7) else "train"


@lru_cache(maxsize=1)
def base() -> tuple[Caption, ...]:
    """Return the captions that the base model is trained on."""
    return tuple(c for c in captions() if split_of(c) != "withheld")


@lru_cache(maxsize=4)
def base_groups(device: torch.device) -> list[Tensor]:
    """Return the indices into :func:`base` of each category."""
    return [
        torch.tensor([i for i, c in enumerate(base()) if c.category == k], device=device) for k in CATEGORIES
    ]  # fmt: skip


def prompts(split: Split, category: str | None = None) -> list[str]:
    """Return the prompts of a split, in a fixed order.

    Args:
        split: see the module.
        category: one of ``single, count, relation, mixed``; all when None. Singles belong to every split but
            ``withheld``: they can show harm, never gain.

    Raises:
        ValueError: for an unknown split or category.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; choose one of {', '.join(CATEGORIES)}.")
    wanted = [c for c in captions() if category in (None, c.category)]
    everywhere = [c for c in wanted if c.category == "single" and split != "withheld"]
    return [str(c) for c in wanted if c in everywhere or (c.category != "single" and split_of(c) == split)]
