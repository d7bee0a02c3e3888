"""CLIP score: how well a picture fits its prompt, for any open_clip or transformers CLIP.

    score = scale · cos(E_image, E_text)        (with ``positive``, max(cos, 0))

Three scalings are in use: the paper's 2.5·max(cos, 0), torchmetrics' 100·max(cos, 0), and the raw cosine of most
reinforcement-learning code, which is the default here (a score clipped at zero has no gradient below it).

References: Hessel et al., CLIPScore (2104.08718); Radford et al., CLIP (2103.00020).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge
from flowalign.rewards.towers import HFTower, OpenClipTower, Tower

__all__ = ["ClipScore", "HFClipScore", "TwoTower"]


class TwoTower(Judge):
    """A reward on the cosine of a picture and its prompt.

    Args:
        tower: the two encoders.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self.freeze()


def scaled(cosine: Tensor, scale: float, positive: bool) -> Tensor:
    """Return ``scale · cos``, at zero from below if ``positive``."""
    return scale * (cosine.clamp_min(0) if positive else cosine)


class ClipScore(TwoTower):
    """CLIP score on an open_clip model.

    Args:
        model: open_clip's name, ``hf-hub:owner/name``, ``local-dir:/path``, or a ready :class:`Tower`.
        weights: open_clip's tag, a path or a hub id; None where ``model`` brings its own.
        scale: 1 (raw cosine), 2.5 (the paper) or 100 (torchmetrics).
        positive: whether negative cosines count as zero.
        dtype: of the encoders; the cosine is float32 in any case.
    """

    card = Card(
        "clip",
        "cosine of picture and prompt",
        differentiable=True,
        range=(0.0, 0.4),
        licence="MIT",
        weights="open_clip ViT-L-14-quickgelu/openai",
        text=77,
        reference="arXiv:2104.08718",
    )

    def __init__(
        self,
        model: str | Tower = "ViT-L-14-quickgelu",
        weights: str | Path | None = "openai",
        *,
        scale: float = 1.0,
        positive: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if isinstance(model, str):
            model = OpenClipTower.load(model, None if ":" in model else weights, dtype=dtype)
        super().__init__(model)
        self.scale, self.positive = scale, positive

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the scaled cosine."""
        return scaled(self.tower.cosine(media, prompts), self.scale, self.positive)


class HFClipScore(TwoTower):
    """CLIP score on a transformers ``CLIPModel``.

    Args:
        weights: hub id or folder.
        processor: where tokenizer and picture sizes lie, if elsewhere.
        scale: see :class:`ClipScore`.
        positive: see :class:`ClipScore`.
        dtype: of the encoders.
    """

    card = Card(
        "clip-hf",
        "cosine of picture and prompt, transformers' CLIP",
        differentiable=True,
        range=(0.0, 0.4),
        licence="MIT",
        weights="openai/clip-vit-large-patch14",
        text=77,
        reference="arXiv:2104.08718",
    )

    def __init__(
        self,
        weights: str | Path = "openai/clip-vit-large-patch14",
        processor: str | Path | None = None,
        *,
        scale: float = 1.0,
        positive: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(HFTower.load(weights, processor, dtype))
        self.scale, self.positive = scale, positive

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the scaled cosine."""
        return scaled(self.tower.cosine(media, prompts), self.scale, self.positive)
