"""Pictures, masks, clips and sounds to condition on: smooth, deterministic, tiny."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

__all__ = ["clip", "mask", "picture", "waves"]

SIZE = 16


def waves(height: int, width: int, phase: float = 0.0) -> Tensor:
    """Return ``(3, H, W)`` in [0, 1]: a few plane waves, another per colour."""
    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)[None]
    rows = [torch.sin(2 * math.pi * ((c + 1) * x + (2 - c) * y) + phase + c) for c in range(3)]
    return 0.5 + 0.45 * torch.stack(rows)


def picture(size: int = SIZE, width: int | None = None, phase: float = 0.0) -> Image.Image:
    """Return an RGB picture, ``size`` high and ``width`` (default the same) wide."""
    pixels = waves(size, width or size, phase)
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())


def mask(size: int = SIZE) -> Image.Image:
    """Return a greyscale mask whose middle (white) is to be painted."""
    pixels = torch.zeros(size, size, dtype=torch.uint8)
    pixels[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 255
    return Image.fromarray(pixels.numpy())


def clip(frames: int, size: int = SIZE) -> list[Image.Image]:
    """Return ``frames`` pictures of drifting waves."""
    return [picture(size, phase=0.4 * k) for k in range(frames)]
