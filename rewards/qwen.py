"""Qwen2-VL's way of looking at pictures and video, on tensors and with gradients.

The published processor goes through PIL and numpy; here the same numbers are made on tensors: sides are multiples of
28 (14-pixel patches, merged 2×2 into one token), the number of pixels is kept within bounds, two frames form one
temporal patch, and a single picture is repeated. The language model's chat template is a plain string, so no template
code from a checkpoint is run.

Reference: Wang et al., Qwen2-VL (2409.12191).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalise, resize

__all__ = ["Vision", "chat", "patches", "smart_size"]


@dataclass(frozen=True)
class Vision:
    """Sizes of the vision encoder.

    Attributes:
        patch: side of a patch in pixels.
        merge: patches merged per side into one token.
        temporal: frames per temporal patch.
        min_pixels: pictures are enlarged to at least this many pixels ...
        max_pixels: ... and shrunk to at most this many.
    """

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280


def smart_size(height: int, width: int, vision: Vision) -> tuple[int, int]:
    """Return the size that a picture is scaled to: multiples of ``patch·merge``, pixels within bounds.

    Raises:
        ValueError: an aspect ratio above 200, which the model was never shown.
    """
    side = vision.patch * vision.merge
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"aspect ratio must be at most 200; got a picture of {height}×{width}.")
    h, w = max(side, round(height / side) * side), max(side, round(width / side) * side)
    if h * w > vision.max_pixels:
        beta = math.sqrt(height * width / vision.max_pixels)
        h, w = (max(side, math.floor(v / beta / side) * side) for v in (height, width))
    elif h * w < vision.min_pixels:
        beta = math.sqrt(vision.min_pixels / (height * width))
        h, w = (math.ceil(v * beta / side) * side for v in (height, width))
    return h, w


def patches(frames: Float[Tensor, "b t 3 h w"], vision: Vision) -> tuple[Float[Tensor, "n d"], Int[Tensor, "b 3"]]:
    """Scale, normalise and cut ``(B, T, 3, H, W)`` in [0, 1] into the encoder's rows.

    Returns:
        ``(B · gt · gh · gw, 3 · temporal · patch²)`` rows, the merged 2×2 patches adjacent, and the grid ``(gt, gh,
        gw)`` of each sample. An odd last frame is repeated.
    """
    b, t = frames.shape[:2]
    size = smart_size(frames.shape[-2], frames.shape[-1], vision)
    x = normalise(resize(frames.flatten(0, 1), size), CLIP_MEAN, CLIP_STD).unflatten(0, (b, t))
    if t % vision.temporal:
        x = torch.cat([x, x[:, -1:].expand(-1, vision.temporal - t % vision.temporal, -1, -1, -1)], 1)
    p, m = vision.patch, vision.merge
    gt, gh, gw = x.shape[1] // vision.temporal, size[0] // p, size[1] // p
    x = x.reshape(b, gt, vision.temporal, 3, gh // m, m, p, gw // m, m, p)
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)  # b gt | gh/m gw/m m m | c temporal p p
    grid = torch.tensor([[gt, gh, gw]] * b, device=frames.device)
    return x.reshape(b * gt * gh * gw, -1), grid


def chat(text: str, tokens: int, pad: str = "<|image_pad|>", system: str = "You are a helpful assistant.") -> str:
    """Return Qwen2-VL's chat with one picture (or video, by its pad token) of ``tokens`` tokens before ``text``."""
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<|vision_start|>{pad * tokens}<|vision_end|>"
        f"{text}<|im_end|>\n<|im_start|>assistant\n"
    )


def tokenize(tokenizer: Any, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ``(B, L)`` ids and mask, padded on the right, so that a causal model never sees the padding."""
    batch = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    return batch.input_ids.to(device), batch.attention_mask.to(device)
