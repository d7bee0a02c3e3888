"""What is asked of a generator, and what came of it: fixed prompts and noises, one entry per image.

An exam is the same before and after training, so that outcomes can be compared image by image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flowalign.noise import mix
from flowalign.source import Prompt, text_key

__all__ = ["Exam", "Outcome", "category"]


@dataclass(frozen=True)
class Exam:
    """What is asked: fixed prompts and noises.

    Attributes:
        prompts: held-out.
        images: per category.
        steps: sampling steps.
        batch: images at a time.
        seed: of the noises.
        keep: pictures kept, per category.
    """

    prompts: Sequence[Prompt]
    images: int
    steps: int
    batch: int = 100
    seed: int = 0
    keep: int = 24

    @property
    def categories(self) -> list[str]:
        """The categories in order of appearance; ``all`` where prompts name none."""
        return list(dict.fromkeys(category(p) for p in self.prompts))

    @property
    def mark(self) -> dict[str, Any]:
        """What must agree for two outcomes to be comparable."""
        texts = [p.text for p in self.prompts]
        return {"prompts": mix(*map(text_key, texts)), "images": self.images, "steps": self.steps, "seed": self.seed}

    def rows(self) -> Tensor:
        """Return the prompt of every image, category by category, a prompt's images together, ``(N,)``."""
        out: list[int] = []
        for name in self.categories:
            mine = [i for i, p in enumerate(self.prompts) if category(p) == name]
            for j, i in enumerate(mine):
                out += [i] * (self.images // len(mine) + (j < self.images % len(mine)))
        return torch.tensor(out)


@dataclass(frozen=True)
class Outcome:
    """What came of it, one entry per image.

    Attributes:
        row: prompt, ``(N,)``.
        category: of the prompt.
        scores: by reward name, ``(N,)``; the first is the judge.
        layout: an integer per image that names its arrangement, ``(N,)``; None where it is not measured.
        thumbs: a few numbers per image, ``(N, d)``, of which the spread is taken; None in older files.
        pictures: of some images, ``(K, ...)``.
        shown: which images those are.
        x0: clean states of those.
    """

    row: Tensor
    category: list[str]
    scores: dict[str, Tensor]
    layout: Tensor | None
    pictures: Tensor
    shown: list[int]
    x0: Tensor
    thumbs: Tensor | None = None

    @property
    def judged(self) -> Tensor:
        """The judge's scores."""
        return next(iter(self.scores.values()))

    def of(self, name: str) -> Tensor:
        """Return the indices of the images of a category."""
        return torch.tensor([i for i, c in enumerate(self.category) if c == name])

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return dict(vars(self))

    @classmethod
    def recall(cls, state: Mapping[str, Any]) -> Outcome:
        """Return the outcome of :meth:`state_dict`; further keys are left out."""
        return cls(**{f.name: state[f.name] for f in fields(cls) if f.name in state or f.default is MISSING})


def category(prompt: Prompt) -> str:
    """Return the category of a prompt."""
    return str(prompt.meta.get("category", "all"))
