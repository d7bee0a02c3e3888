"""The way in: clean states of media, for any packing and normalisation.

What a pipeline does between its loop and ``vae.decode`` (unpacking tokens, per-channel means and scales, scaling and
shift factors) is an affine map with a permutation, ``z_j = a_j x_{π(j)} + b_j``. It is not written down anywhere in a
form that could be inverted, but it can be asked: x = 0 gives b, x = 1 gives a + b, and x = the digits of the position
gives π. The inverse then takes ``vae.encode``'s latents to states; no family needs code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.pipelines.decode import AUTOENCODERS, Decoder
from flowalign.pipelines.patching import swapped
from flowalign.pipelines.session import Halt
from flowalign.protocols import check_media

if TYPE_CHECKING:
    from flowalign.pipelines.condition import Inputs

__all__ = ["MediaEncoder", "Unpacking", "encode_media", "learn_unpacking"]


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


class MediaEncoder:
    """Media of one adapter to states; remembers the map of each kind of call.

    Args:
        decoder: the way out, whose map is learnt and inverted.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.adapter, self.decoder = decoder.adapter, decoder
        self.unpackings: dict[Any, Unpacking] = {}

    def __call__(self, media: Tensor, cond: Inputs) -> Tensor:
        """Return clean states ``(B, *shape)`` of media.

        Raises:
            ValueError: for media of the wrong kind or size.
        """
        check_media(media, self.adapter.modality)
        plan = self.adapter.known.plan(cond)
        if not self.adapter.tap.modules().keys() & set(AUTOENCODERS):
            states = media * 2 - 1  # the loop works on pixels
        else:
            key = (cond.rows[0].kind, cond.guided)
            if key not in self.unpackings:
                self.unpackings[key] = self._learn(cond[torch.tensor([0])])
            unpacking = self.unpackings[key]
            z = encode_media(self.decoder.vae(), media, unpacking.latent)
            if z.shape[1] != unpacking.scale.numel():
                raise ValueError(
                    f"media of shape {tuple(media.shape)} encode to {z.shape[1]} numbers per sample, but states here "
                    f"have {unpacking.scale.numel()}. Resize the media to what the pipeline makes with these arguments."
                )
            states = unpacking.invert(z)
        if tuple(states.shape[1:]) != plan.shape:
            raise ValueError(
                f"media of shape {tuple(media.shape)} are states {tuple(states.shape)}; want {plan.shape}."
            )
        return states

    @torch.no_grad()
    def _learn(self, cond: Inputs) -> Unpacking:
        plan = self.adapter.known.plan(cond)
        if len(plan.shapes) > 1:
            raise ValueError(
                f"the states of {type(self.adapter.pipe).__name__} have several parts; media cannot be inverted."
            )
        vae = self.decoder.vae()

        def prefix(x: Tensor) -> Tensor:
            caught: list[Tensor] = []

            def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
                caught.append(z)
                if sum(len(c) for c in caught) >= folded[0]:
                    raise Halt
                return type(vae).decode(vae, z, *args, **kwargs)

            with swapped(vae, "decode", decode):
                way = "step" if plan.way == "S" or plan.settle else "zero"
                self.decoder.session(way, x, cond)
            return torch.cat(caught)

        folded = [1]
        like = torch.zeros(1, dtype=plan.dtypes[0], device=next(vae.parameters()).device)
        try:
            return learn_unpacking(prefix, plan.shape, like)
        except ValueError:
            folded[0] = 1 << 30  # frames may come folded into the batch, a chunk at a time: let all of them pass
            return learn_unpacking(prefix, plan.shape, like)
