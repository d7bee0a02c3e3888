"""Human Preference Score v2.1: CLIP-H fine-tuned on 800,000 human choices.

    score = cos(E_image, E_text)      no temperature; about .2 to .35

The official code scales the longest side to 224 and pads with black (:class:`HPS`); AlignProp, TRL, SRPO and most
others crop the shortest (:class:`HPSCrop`). The two are different rewards, and v2 and v2.1 are not comparable either.

Reference: Wu et al., HPS v2 (2306.09341); weights Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.clip import TwoTower
from flowalign.rewards.preprocess import Fit
from flowalign.rewards.towers import OpenClipTower

__all__ = ["HPS", "HPSCrop"]


class HPS(TwoTower):
    """HPS v2.1 with the official padding.

    Args:
        weights: hub id, ``owner/name:file`` (``xswu/HPSv2:HPS_v2_compressed.pt`` is v2), folder or file.
        model: open_clip's name of the architecture.
        dtype: of the encoders; the cosine is float32 in any case.
    """

    card = Card(
        "hps",
        "human preference, longest side padded (official)",
        differentiable=True,
        range=(0.15, 0.4),
        licence="Apache-2.0",
        weights="xswu/HPSv2:HPS_v2.1_compressed.pt",
        text=77,
        reference="arXiv:2306.09341",
    )
    fit: ClassVar[Fit] = "pad"

    def __init__(
        self,
        weights: str | Path = "xswu/HPSv2:HPS_v2.1_compressed.pt",
        *,
        model: str = "ViT-H-14",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(OpenClipTower.load(model, weights, "HPS_v2.1_compressed.pt", fit=self.fit, dtype=dtype))

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the cosine."""
        return self.tower.cosine(media, prompts)


class HPSCrop(HPS):
    """HPS v2.1 with the crop that most training code uses; same arguments."""

    card = replace(HPS.card, name="hps-crop", summary="human preference, shortest side cropped (peers' way)")
    fit = "crop"
