"""Chosen frames of a clip, decoding no more latents than they need.

A causal video autoencoder makes frame k of the latents up to some p(k), so the prefix is decoded and the rest of the
clip left blank; an image autoencoder that is given the frames as a batch decodes the chosen ones alone. Neither is
assumed. A sketch of the clip, in which every decoded frame is a flat grey of its own, goes through the pipeline's
code and tells which decoded frame each frame of the result is; and p(k) is the shortest prefix which, on a small
random patch of latents of the same length, gives frame k as the whole does (relative difference below 1e-4). Where
frames are mixed after decoding, or normalisation runs over the whole clip, p(k) is everything: the clip is decoded
whole and picked from. Autoencoders that look both ways (LTX) need as much of the future as they look at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layout", "blank", "choose", "read_sketch", "sketching"]

PATCH = 8  # latents, on a side
TOLERANCE = 1e-4
Decode = Callable[..., Any]


@dataclass
class Layout:
    """How frames come out of the latents of one kind of call.

    Attributes:
        count: frames of the result.
        source: of each frame of the result, which decoded frame it is; None where they are mixed.
        apart: whether the autoencoder may be given some of the frames; not where it is told their number.
        folded: whether frames are rows of a batch of images; otherwise an axis of one clip.
        latents: latent frames of a clip.
        decoded: frames that the autoencoder makes of them.
        scale: pixels per latent, down and across.
        channels: of a decoded frame.
        needs: p(k) as far as it has been asked for.
    """

    count: int = 0
    source: list[int] | None = None
    apart: bool = True
    folded: bool = False
    latents: int = 0
    decoded: int = 0
    scale: tuple[int, int] = (1, 1)
    channels: int = 3
    needs: dict[int, int] = field(default_factory=dict)


def sample(out: Any) -> Tensor:
    """Return the pixels of what ``vae.decode`` returned."""
    found: Tensor = out[0] if isinstance(out, tuple) else out.sample
    return found


def resampled(out: Any, pixels: Tensor) -> Any:
    """Return what ``vae.decode`` returned, with other pixels."""
    return (pixels, *out[1:]) if isinstance(out, tuple) else type(out)(sample=pixels)


def sketching(decode: Decode, layout: Layout, calls: list[int]) -> Decode:
    """Return a stand-in for ``vae.decode`` that decodes a small patch and returns a flat clip, frame f at grey f."""

    def sketch(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            small = z[..., :PATCH, :PATCH].detach()
            alone = z.ndim == 4 and "num_frames" not in kwargs  # else the rows of a batch see each other (SVD)
            out = decode(small[:1] if alone else small, *args, **kwargs)
        layout.apart = alone or z.ndim == 5
        pixels = sample(out)
        layout.folded, layout.channels = z.ndim == 4, pixels.shape[1]
        layout.scale = (pixels.shape[-2] // small.shape[-2], pixels.shape[-1] // small.shape[-1])
        layout.latents = z.shape[2] if z.ndim == 5 else sum(calls) + len(z)
        layout.decoded = pixels.shape[2] if z.ndim == 5 else layout.latents
        first = sum(calls) if z.ndim == 4 else 0
        calls.append(len(z) if z.ndim == 4 else 1)
        size = (z.shape[-2] * layout.scale[0], z.shape[-1] * layout.scale[1])
        if z.ndim == 4:
            grey = _grey(torch.arange(first, first + len(z), device=z.device)).view(-1, 1, 1, 1)
            flat = grey.expand(len(z), layout.channels, *size)
        else:
            grey = _grey(torch.arange(layout.decoded, device=z.device)).view(1, 1, -1, 1, 1)
            flat = grey.expand(len(z), layout.channels, layout.decoded, *size)
        return resampled(out, flat + 0 * z.flatten()[0])  # the way out must be seen to carry a gradient

    return sketch


def _grey(number: Tensor) -> Tensor:
    """Return a value in [-1/2, 1/2) for a frame's number, told apart up to 4096 frames."""
    return number.float() / 4096 - 0.5


def read_sketch(layout: Layout, media: Tensor, calls: Sequence[int]) -> Layout:
    """Read from the pipeline's clip ``(1, F, 3, H, W)`` of a sketch which decoded frame each of its frames is."""
    layout.count = media.shape[1]
    greys = media.detach().double()
    number = ((greys.mean((0, 2, 3, 4)) * 2 - 1) + 0.5) * 4096
    flat = float((greys.amax((0, 2, 3, 4)) - greys.amin((0, 2, 3, 4))).max()) < 1e-5
    whole = bool(((number - number.round()).abs() < 0.1).all())
    inside = bool((number.round() >= 0).all()) and bool((number.round() < layout.decoded).all())
    if flat and whole and inside and layout.apart and (layout.folded or len(calls) == 1):
        layout.source = number.round().long().tolist()
    return layout


def choose(decode: Decode, layout: Layout, wanted: Sequence[int]) -> Decode:
    """Return a stand-in for ``vae.decode`` that leaves every decoded frame blank but those wanted (and before them)."""
    seen = [0]

    def folded(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = [i for i in range(len(z)) if (seen[0] + i) % layout.latents in wanted]
        seen[0] += len(z)
        if not rows:  # one row tells what kind of thing is returned
            rows = [0]
        out = decode(z[rows], *args, **kwargs)
        pixels = sample(out)
        return resampled(out, blank(pixels, len(z), 0).index_copy(0, torch.tensor(rows, device=z.device), pixels))

    def prefix(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        count = max(_need(decode, layout, z, k, args, kwargs) for k in wanted)
        out = decode(z[:, :, :count], *args, **kwargs)
        pixels = sample(out)
        rest = layout.decoded - pixels.shape[2]
        return resampled(out, torch.cat([pixels, blank(pixels, rest, 2)], 2)) if rest > 0 else out

    return folded if layout.folded else prefix


def blank(like: Tensor, count: int, axis: int) -> Tensor:
    """Return zeros like a tensor, but for the length of one axis."""
    return like.new_zeros(*like.shape[:axis], count, *like.shape[axis + 1 :])


@torch.no_grad()
def _need(decode: Decode, layout: Layout, z: Tensor, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return p(k): tried on a small patch, the shortest prefix first, wider and wider."""
    if k not in layout.needs:
        total = layout.latents
        shape = (1, z.shape[1], total, min(PATCH, z.shape[3]), min(PATCH, z.shape[4]))
        with torch.random.fork_rng(devices=[]):
            patch = torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(z)
            torch.manual_seed(0)
            whole = sample(decode(patch, *args, **kwargs))[:, :, k]
            count, stride, found = max(-(-k * total // max(layout.decoded, 1)), 1), 1, total
            while count < total:
                torch.manual_seed(0)
                part = sample(decode(patch[:, :, :count], *args, **kwargs))
                if part.shape[2] > k and _gap(part[:, :, k], whole) < TOLERANCE:
                    found = count
                    break
                count, stride = count + stride, min(stride + 1, 4)
        layout.needs[k] = found
    return layout.needs[k]


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().abs().max() / b.float().abs().max().clamp_min(1e-12))
