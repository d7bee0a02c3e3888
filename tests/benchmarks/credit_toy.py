"""A toy for comparing credit: tests/toy.py's generator, and a strict reward that one picture in five earns at first."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowalign.protocols import Card
from tests.runworld import pipeline

__all__ = ["Over", "pipeline"]


class Over:
    """1 where the mean brightness is above .55: one standard deviation above the base's mean."""

    card = Card("over", "whether the picture is brighter than .55")

    def __call__(self, media: Tensor, prompts: Any, meta: Any = None) -> Tensor:
        return (media.mean((1, 2, 3)) > 0.55).float()
