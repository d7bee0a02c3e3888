"""A generator that a whole run fits into a second of: a toy that can be saved, its rewards, good and broken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flowalign.protocols import Card
from tests.toy import Bright, Toy


class Saved(Toy):
    """The toy with a way out."""

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().contiguous() for k, v in self.denoiser.state_dict().items()}
        save_file(weights, str(path / "toy.safetensors"))


def pipeline() -> Saved:
    """Return a fresh generator."""
    torch.set_num_threads(1)
    return Saved()


sizes: list[int] = []  # of the batches that a test's reward was asked about


def quadrant(media: Tensor, prompts: Sequence[str]) -> Tensor:
    """Name the brightest of the four pixels: the toy's layout."""
    return media.mean(1).flatten(1).argmax(1)


class Strict:
    """1 where the picture is brighter (or, for dark prompts, darker) than usual."""

    card = Card("strict", "whether it is bright")

    def __call__(self, media: Tensor, prompts: Sequence[str], meta: Any = None) -> Tensor:
        sign = torch.tensor([-1.0 if "dark" in p else 1.0 for p in prompts])
        return (sign * (media.mean((1, 2, 3)) - 0.5) > 0).float()


class Broken:
    """A reward that goes wrong as its name says."""

    card = Card("broken", "wrong")
    answer = "nan"

    def __call__(self, media: Tensor, prompts: Sequence[str], meta: Any = None) -> Any:
        good = media.mean((1, 2, 3))
        return {"nan": good * torch.nan, "shape": good[:, None], "none": None}[self.answer]


class BrokenShape(Broken):
    """The wrong shape."""

    answer = "shape"


class BrokenNone(Broken):
    """Nothing."""

    answer = "none"


__all__ = ["Bright", "Broken", "BrokenNone", "BrokenShape", "Saved", "Strict", "pipeline", "quadrant"]
