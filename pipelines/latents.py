"""The way in: clean states of media, for any packing and normalisation.

What a pipeline does between its loop and ``vae.decode`` (unpacking tokens, per-channel means and scales, scaling and
shift factors) is an affine map with a permutation, ``z_j = a_j x_{π(j)} + b_j``. It is not written down anywhere in a
form that could be inverted, but it can be asked: x = 0 gives b, x = 1 gives a + b, and x = the digits of the position
gives π. The inverse then takes ``vae.encode``'s latents to states; no family needs code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Unpacking", "encode_media", "learn_unpacking"]


@dataclass(frozen=True, eq=False)
class Unpacking:
    """``z.flat[j] = scale[j] x.flat[position[j]] + shift[j]`` for one sample.

    Attributes:
        shape: of x, one sample.
        latent: shape of z as ``vae.decode`` gets it for one sample.
        scale, shift: ``(numel,)``.
        position: ``(numel,)`` indices into x.
    """

    shape: tuple[int, ...]
    latent: tuple[int, ...]
    scale: Tensor
    shift: Tensor
    position: Tensor

    def invert(self, z: Tensor) -> Tensor:
        """Return states ``(B, *shape)`` of latents ``(B, *)`` in the layout of ``vae.decode``; differentiable."""
        flat = (z.reshape(len(z), -1).to(self.scale) - self.shift) / self.scale
        return flat[:, self.position.argsort()].reshape(len(z), *self.shape)


def learn_unpacking(prefix: Callable[[Tensor], Tensor], shape: tuple[int, ...], like: Tensor) -> Unpacking:
    """Ask ``prefix``, the pipeline's code from states ``(1, *shape)`` to the argument of ``vae.decode``, for its map.

    Raises:
        ValueError: if the map loses part of the state or is not affine with a permutation.
    """
    count = int(torch.Size(shape).numel())
    shift = prefix(like.new_zeros(1, *shape)).float()
    scale = prefix(like.new_ones(1, *shape)).float() - shift
    if shift.numel() != count or not bool((scale.abs() > 0).all()):
        raise ValueError(
            f"vae.decode reads {shift.numel()} numbers of a state of {count}, so media cannot be turned back into "
            "states. Start from noise instead, or encode with the pipeline's own image input."
        )
    base = 64 if like.dtype == torch.float32 else 8  # half precision tells fewer digits apart
    index, place, power = torch.arange(count), torch.zeros(count), 1
    while power < count:
        digit = (index // power % base).to(like) / base
        seen = (prefix(digit.reshape(1, *shape)).float() - shift) / scale
        place = place.double() + (seen.flatten().cpu().double() * base).round() * power
        power *= base
    position = place.long()
    if not torch.equal(position.sort().values, index):
        raise ValueError(
            "the code between the loop and vae.decode mixes entries of the state; media cannot be inverted."
        )
    return Unpacking(shape, tuple(shift.shape), scale.flatten(), shift.flatten(), position.to(scale.device))


def encode_media(vae: Any, media: Tensor, latent: tuple[int, ...]) -> Tensor:
    """Return ``vae.encode``'s mean latents of media, shaped ``(B, ...)`` like ``latent`` ``(1, ...)`` or ``(F, ...)``.

    Args:
        vae: the pipeline's autoencoder.
        media: images ``(B, 3, H, W)``, video ``(B, F, 3, H, W)`` in [0, 1], or audio ``(B, C, L)`` in [-1, 1].
        latent: what ``vae.decode`` gets for one sample: five dimensions for a video autoencoder, four otherwise.
    """
    batch = len(media)
    if media.ndim == 4:
        pixels = media * 2 - 1
        pixels = pixels[:, :, None] if len(latent) == 5 else pixels
    elif media.ndim == 5:
        pixels = media * 2 - 1
        pixels = pixels.transpose(1, 2) if len(latent) == 5 else pixels.flatten(0, 1)
    else:
        pixels = media
    first = next(vae.parameters())
    out = vae.encode(pixels.to(first))
    dist = vars(out).get("latent_dist") if not isinstance(out, tuple) else out[0]
    if dist is None:
        z = next(v for k, v in out.items() if k in ("latents", "latent", "sample"))
    else:
        z = dist if isinstance(dist, Tensor) else dist.mode()
    return z.reshape(batch, -1)
