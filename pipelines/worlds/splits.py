"""Prompts of the shapes worlds, split by composition; the same lists are shipped as ``prompts/SPLIT.jsonl``.

    withheld   compositions that the base model is never shown (1 in 12 of count and of "two ... and two ...")
    select     shown to the base, not used in alignment: recipes are chosen on these
    report     shown to the base, not used in alignment: figures are reported on these
    train      the rest: what alignment may use

A composition is what a caption shows, whatever its words: "a red circle above a blue square" and "a blue square below a
red circle" are one, and fall into one split. A Latin pattern over (number or relation, colour, shape) decides, so that
every word and every kind of object occurs in ``train``: what is held out is the combination. The pattern also hides 1
in 12 *wordings* of relations and of unequal numbers from the base, whose other wording it sees (:func:`hidden`).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flowalign.pipelines.worlds.scenes import CATEGORIES, COLOURS, MIXED, RELATIONS, SHAPES, Caption, captions

__all__ = ["Split", "base", "base_groups", "hidden", "prompts", "split_of", "wordings", "write"]

Split = Literal["train", "select", "report", "withheld"]
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
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


def hidden(caption: Caption) -> bool:
    """Say whether this wording is kept from the base model."""
    return caption.category != "single" and _phase(caption) == 0


def wordings(caption: Caption) -> tuple[Caption, ...]:
    """Return the captions that show the same, in a fixed order whichever of them is given."""
    if len(caption.groups) == 1:
        return (caption,)
    other = None if caption.relation is None else OPPOSITE[caption.relation]
    return tuple(sorted((caption, Caption(caption.groups[::-1], other)), key=str))


def split_of(caption: Caption) -> Split:
    """Return the split that a caption belongs to; single objects are always in train (there is nothing to combine)."""
    if caption.category == "single":
        return "train"
    seen = [c for c in wordings(caption) if not hidden(c)]
    if not seen:
        return "withheld"
    phase = _phase(seen[0])
    if phase in (4, 9):
        return "select"
    return "report" if phase in (2, 7) else "train"


@lru_cache(maxsize=1)
def base() -> tuple[Caption, ...]:
    """Return the captions that the base model is trained on."""
    return tuple(c for c in captions() if not hidden(c))


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


def write(folder: Path) -> None:
    """Write ``SPLIT.jsonl``, one ``{"prompt", "category"}`` a line, for programs that read no Python."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = [{"prompt": p, "category": k} for k in CATEGORIES for p in prompts(split, k)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
