"""PickScore: CLIP-H fine-tuned on half a million choices between two pictures of one prompt.

    score = exp(logit_scale) · cos(E_image, E_text) / divisor

about 18 to 24 as published. Peers divide by 26 (Flow-GRPO) or 20 (SRPO) to bring it near one: ``divisor``. Only
differences within one prompt mean anything, and they are small against 21: in bfloat16 21.03 and 21.05 are equal.

Reference: Kirstain et al., Pick-a-Pic (2305.01569); weights and code MIT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.clip import TwoTower
from flowalign.rewards.towers import HFTower

__all__ = ["PickScore"]


class PickScore(TwoTower):
    """PickScore v1.

    Args:
        weights: hub id or folder of a transformers ``CLIPModel``.
        processor: where tokenizer and picture sizes lie; a folder of weights with its own is its own.
        divisor: 1 as published; 26 or 20 in peers.
        dtype: of the encoders; the score is float32 in any case.
    """

    card = Card(
        "pickscore",
        "human preference for a picture given its prompt",
        differentiable=True,
        range=(16.0, 26.0),
        licence="MIT (code); weights: not verified",
        weights="yuvalkirstain/PickScore_v1",
        text=77,
        reference="arXiv:2305.01569",
    )

    def __init__(
        self,
        weights: str | Path = "yuvalkirstain/PickScore_v1",
        processor: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        divisor: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if divisor <= 0:
            raise ValueError(f"divisor must be positive (1 as published, 26 or 20 in peers); got {divisor}.")
        super().__init__(HFTower.load(weights, processor, dtype))
        self.divisor = divisor

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the scaled cosine."""
        return self.tower.cosine(media, prompts) * self.tower.scale.to(media.device) / self.divisor
