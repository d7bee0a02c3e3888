"""From tensors in [0, 1] of any size to what a judge's network was trained on, with gradients all the way.

Published rewards are defined on PIL images: bicubic with antialiasing, rounded to bytes, cropped or padded, then
normalised. The same is done here on tensors. Bicubic overshoots near edges, and PIL clips that to [0, 255]; a plain
``clamp`` would do so as well but kills the gradient of every clipped pixel, hence :func:`clamp_through`.

Three ways to fit an image into a square, all found in published scores, and not comparable with one another:

* ``crop``   shortest side to ``size``, centre crop (CLIP, PickScore, ImageReward, LAION aesthetic; most peers' HPS);
* ``pad``    longest side to ``size``, zeros around (official HPS v2 and v2.1);
* ``squash`` both sides to ``size`` (DINO in Adv-GRPO, DETR-like detectors).

PIL resizes the width first, clips, then the height, and so does :func:`resize`: clipping once at the end is off by up
to .09 beside saturated edges. What is left is PIL's rounding to bytes, .004 at most against a promise of .011.
(Pillow 13 takes the height first where that saves work. With ``crop`` and ``pad`` it never does; with ``squash`` the
order here is that of all earlier versions, with which the scores were published.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flowalign.gaussian import work_dtype

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Preprocess",
    "clamp_through",
    "fit_crop",
    "fit_pad",
    "normalise",
    "resize",
    "to_bytes",
    "triple",
]

Fit = Literal["crop", "pad", "squash"]
Mode = Literal["bicubic", "bilinear"]
Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


def triple(values: Sequence[float]) -> Triple:
    """Return three floats as a tuple: configurations hold lists."""
    r, g, b = values
    return float(r), float(g), float(b)


class _ClampThrough(torch.autograd.Function):
    """Clamp forward, identity backward (also for forward-mode and double backward, being linear there)."""

    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
        pass  # the derivative is one, whatever the input

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def clamp_through(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Clamp to [low, high] with the gradient of the identity, so that an out-of-range pixel can come back."""
    return _ClampThrough.apply(x, low, high)


def resize(
    x: Float[Tensor, "b c h w"], size: tuple[int, int], mode: Mode = "bicubic", *, antialias: bool = True
) -> Float[Tensor, "b c h2 w2"]:
    """Resize as PIL does: antialiased, width then height, each clipped to [0, 1] with a straight-through gradient.

    Computes in float32 at least: bfloat16 has 8 bits of mantissa, coarser than a byte near one.
    """
    x = clamp_through(x.to(work_dtype(x)))
    for now in ((x.shape[-2], size[1]), size):
        if tuple(x.shape[-2:]) != tuple(now):
            x = clamp_through(F.interpolate(x, size=now, mode=mode, antialias=antialias, align_corners=False))
    return x


def normalise(x: Float[Tensor, "b c h w"], mean: Triple, std: Triple) -> Float[Tensor, "b c h w"]:
    """Return ``(x - mean) / std`` per channel."""
    m, s = (torch.tensor(v, device=x.device, dtype=x.dtype).view(-1, 1, 1) for v in (mean, std))
    return (x - m) / s


def fit_crop(
    x: Float[Tensor, "b c h w"], size: int, mode: Mode = "bicubic", *, centre: Literal["round", "floor"] = "round"
) -> Float[Tensor, "b c s s"]:
    """Scale the shortest side to ``size`` and crop the centre.

    Args:
        x: ``(B, C, H, W)`` in [0, 1].
        size: side of the square.
        mode: interpolation.
        centre: torchvision rounds the crop's offset to even, transformers floors it; they differ by one pixel
            where the margin is odd.
    """
    h, w = x.shape[-2:]
    short = min(h, w)
    x = resize(x, (size if h == short else int(size * h / short), size if w == short else int(size * w / short)), mode)
    margin = (x.shape[-2] - size, x.shape[-1] - size)
    top, left = (m // 2 if centre == "floor" else round(m / 2) for m in margin)
    return x[..., top : top + size, left : left + size]


def fit_pad(
    x: Float[Tensor, "b c h w"], size: int, mode: Mode = "bicubic", fill: float = 0.0
) -> Float[Tensor, "b c s s"]:
    """Scale the longest side to ``size`` and pad both ends of the other with ``fill`` (before normalisation)."""
    h, w = x.shape[-2:]
    scale = size / max(h, w)
    h, w = max(1, round(h * scale)), max(1, round(w * scale))
    x = resize(x, (h, w), mode)
    dh, dw = size - h, size - w
    return F.pad(x, (dw // 2, dw - dw // 2, dh // 2, dh - dh // 2), value=fill)


def to_bytes(x: Tensor) -> Tensor:
    """Round [0, 1] floats to the bytes that a saved picture would hold (uint8, any shape); not differentiable."""
    return (x.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Preprocess:
    """How a judge's network wants its pictures.

    Attributes:
        size: side of the square input, in pixels.
        fit: ``crop``, ``pad`` or ``squash``; see the module.
        mean: per-channel mean that is subtracted.
        std: per-channel scale.
        mode: interpolation.
        centre: rounding of the crop's offset, see :func:`fit_crop`.
    """

    size: int = 224
    fit: Fit = "crop"
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    mode: Mode = "bicubic"
    centre: Literal["round", "floor"] = "round"

    def __post_init__(self) -> None:
        if self.size < 1 or self.fit not in ("crop", "pad", "squash") or min(self.std) <= 0:
            raise ValueError(f"wanted size ≥ 1, fit crop, pad or squash, and positive std; got {self}.")

    def pixels(self, media: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """Return the fitted picture, still in [0, 1]."""
        if self.fit == "crop":
            return fit_crop(media, self.size, self.mode, centre=self.centre)
        if self.fit == "pad":
            return fit_pad(media, self.size, self.mode)
        return resize(media, (self.size, self.size), self.mode)

    def __call__(self, media: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
        """Return the network's input: fitted, then normalised, float32 at least, gradients kept."""
        return normalise(self.pixels(media), self.mean, self.std)
