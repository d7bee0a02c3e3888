"""What two outcomes of one exam say together, image by image.

    accuracy     mean of the judge per category, with the standard error over images
    gain         mean of (after - before) per image; its standard error is that of the paired differences
    layouts      exp of the entropy of layouts among correct images, over the category and as a mean over prompts: how
                 many arrangements the model still makes; the spread of pixels does not see a collapse, this does

The entropy of n draws is biased low by about (support - 1)/2n, and alignment changes n. Before and after are therefore
cut to the same number of correct images for each prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.exam import Outcome

__all__ = ["Comparison", "compare", "effective_layouts", "mean_se"]

FEW = 0.2  # share of images that must be right on both sides for layouts to be counted


@dataclass(frozen=True)
class Comparison:
    """One category, before and after.

    Attributes:
        images: how many.
        before: mean score, and its standard error.
        after: likewise.
        gain: paired difference, and its standard error.
        layouts: effective layouts of the category before and after; None where they are not measured.
        per_prompt: likewise, of one prompt: exp of the mean entropy over prompts.
    """

    images: int
    before: tuple[float, float]
    after: tuple[float, float]
    gain: tuple[float, float]
    layouts: tuple[float, float] | None
    per_prompt: tuple[float, float] | None

    @property
    def kept(self) -> float | None:
        """The share of the base's layouts that is left: the smaller of the two measures' shares."""
        shares = [after / before for before, after in (p for p in (self.layouts, self.per_prompt) if p is not None)]
        return min(shares) if shares else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "layouts_kept": self.kept}


def mean_se(values: Tensor) -> tuple[float, float]:
    """Return the mean and its standard error."""
    n = len(values)
    return float(values.mean()), float(values.std() / math.sqrt(n)) if n > 1 else math.nan


def compare(before: Outcome, after: Outcome, score: str | None = None) -> dict[str, Comparison]:
    """Compare two outcomes of one exam, by category.

    Args:
        before: of the base.
        after: of the aligned model.
        score: which reward; the judge when None.

    Raises:
        ValueError: if they are of different exams.
    """
    if not torch.equal(before.row, after.row):
        raise ValueError("before and after were asked different things: the comparison would not be paired.")
    out = {}
    for name in dict.fromkeys(before.category):
        i = before.of(name)
        a = (before.judged if score is None else before.scores[score])[i]
        b = (after.judged if score is None else after.scores[score])[i]
        out[name] = Comparison(len(i), mean_se(a), mean_se(b), mean_se(b - a), *effective_layouts(before, after, name))
    return out


Pair = tuple[float, float]


def effective_layouts(before: Outcome, after: Outcome, name: str) -> tuple[Pair | None, Pair | None]:
    """Return the effective numbers of layouts of a category before and after, over it and per prompt.

    Correct is a judge's score above one half. For each prompt both sides are cut to equally many correct images; a
    prompt of which either side has fewer than two says nothing per prompt. Fewer than a fifth of the images say
    nothing at all: a model that is nearly always wrong would seem to have kept its layouts.
    """
    if before.layout is None or after.layout is None:
        return None, None
    pools: tuple[list[Tensor], list[Tensor]] = ([], [])
    entropies: list[Pair] = []
    where = before.of(name)
    for prompt in before.row[where].unique().tolist():
        i = where[before.row[where] == prompt]
        a, b = (o.layout[i][o.judged[i] > 0.5] for o in (before, after) if o.layout is not None)
        n = min(len(a), len(b))
        pools[0].append(a[:n])
        pools[1].append(b[:n])
        if n >= 2:
            entropies.append((_entropy(a[:n]), _entropy(b[:n])))
    one, two = (torch.cat(p) for p in pools)
    if not len(one) or len(one) < FEW * len(where):
        return None, None
    whole = (math.exp(_entropy(one)), math.exp(_entropy(two)))
    if not entropies:
        return whole, None
    first, second = torch.tensor(entropies, dtype=torch.float64).mean(0).exp().tolist()
    return whole, (first, second)


def _entropy(codes: Tensor) -> float:
    p = codes.unique(return_counts=True)[1].double() / len(codes)
    return float(-(p * p.log()).sum())
