"""JPEG compressibility and incompressibility: minus, or plus, the kilobytes of the picture at quality 95.

    score = ∓ bytes(JPEG₉₅(image)) / 1000 / divisor

Exact, cheap and not differentiable: the first rewards of DDPO, and a fair test of any black-box method. Flow-GRPO
divides by 500. The encoder decides the bytes: Pillow's, as in the published code, with its default subsampling.

Reference: Black et al., DDPO (2305.13301).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge
from flowalign.rewards.preprocess import to_bytes

__all__ = ["Compressibility", "Incompressibility", "jpeg_bytes"]


def jpeg_bytes(media: Tensor, quality: int = 95) -> list[int]:
    """Return the size in bytes of each picture of ``(B, 3, H, W)`` as JPEG."""
    from PIL import Image

    sizes = []
    for picture in to_bytes(media).permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=quality)
        sizes.append(buffer.tell())
    return sizes


class Compressibility(Judge):
    """Minus the kilobytes (1000 bytes) as JPEG.

    Args:
        quality: of the encoder; 95 as published.
        divisor: 1 as in DDPO, 500 as in Flow-GRPO.
    """

    card = Card(
        "compressibility",
        "minus the kilobytes as JPEG",
        range=(-500.0, 0.0),
        reference="arXiv:2305.13301",
    )
    sign: ClassVar[float] = -1.0

    def __init__(self, quality: int = 95, divisor: float = 1.0) -> None:
        super().__init__()
        if not 1 <= quality <= 95 or divisor <= 0:
            raise ValueError(f"wanted a JPEG quality of 1 to 95 and a positive divisor; got {quality}, {divisor}.")
        self.quality, self.divisor = quality, divisor

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the signed kilobytes."""
        sizes = torch.tensor(jpeg_bytes(media, self.quality), dtype=torch.float32, device=media.device)
        return self.sign * sizes / (1000 * self.divisor)


class Incompressibility(Compressibility):
    """Plus the kilobytes as JPEG; same arguments."""

    card = replace(Compressibility.card, name="incompressibility", summary="the kilobytes as JPEG", range=(0.0, 500.0))
    sign = 1.0
