"""From states to media, through the pipeline's own code; the way back is :mod:`flowalign.pipelines.latents`.

Decoding runs the pipeline's call with no iteration at all, so that what follows the loop (unpacking, normalisation,
VAE, postprocessing) is its own. Where later variables are only bound inside the loop, one iteration runs whose ``step``
returns the states; where the code after ``vae.decode`` leaves torch, its raw output is taken.

Clamps to the range of media pass gradients straight through: a pixel at 1.02 must still hear that it should be darker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.pipelines.frames import Decode, Layout, choose, read_sketch, sketching
from flowalign.pipelines.patching import swapped
from flowalign.pipelines.session import Halt, Visit
from flowalign.pipelines.straight import StraightThrough
from flowalign.replay import checkpointed

if TYPE_CHECKING:
    from flowalign.pipelines.adapter import Adapter
    from flowalign.pipelines.condition import Inputs

__all__ = ["AUTOENCODERS", "Decoder"]

AUTOENCODERS = ("vae", "vqvae", "movq", "vqgan")


class Decoder:
    """Decodes states of one adapter; remembers which way worked."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.ways: dict[Any, str] = {}
        self.unscaled: dict[Any, bool] = {}
        self.layouts: dict[Any, Layout] = {}

    def __call__(
        self, x: Tensor, cond: Inputs, *, chunk: int | None, frames: Sequence[int] | None, checkpoint: bool
    ) -> Tensor:
        """Return media of ``x``."""
        decode, picked = self._decode, None
        if frames is not None:
            layout = self._layout(x[:1], cond[torch.tensor([0])])
            picked = _picked(frames, layout.count)
            if layout.source is not None:
                decode = functools.partial(self._chosen, layout=layout, wanted=[layout.source[f] for f in picked])
                chunk = 1 if layout.folded else chunk
        parts: list[Tensor] = []
        for group in self.adapter.batching.calls(cond):
            for i in range(0, len(group), chunk or len(group)):
                index = torch.tensor(group[i : i + (chunk or len(group))])
                piece, rows = x[index.to(x.device)], cond[index]
                if checkpoint and torch.is_grad_enabled():
                    name = f"the decoder of {type(self.adapter.pipe).__name__}"
                    parts.append(checkpointed(functools.partial(decode, cond=rows), piece, name))
                else:
                    parts.append(decode(piece, cond=rows))
        media = parts[0] if len(parts) == 1 else torch.cat(parts)
        if picked is not None:
            media = media[:, torch.as_tensor(picked, device=media.device)]
        self._finite(media, x)
        return media

    def frames_apart(self, cond: Inputs) -> int:
        """Return the frames of a clip where an image autoencoder makes each of one latent frame; else 1."""
        if not self.adapter.tap.modules().keys() & set(AUTOENCODERS):
            return 1
        one = cond[torch.tensor([0])]
        plan = self.adapter.known.plan(one)
        device = next(self.vae().parameters()).device
        layout = self._layout(torch.zeros(1, *plan.shape, device=device), one)
        return layout.count if layout.folded and layout.source is not None else 1

    def _layout(self, x: Tensor, cond: Inputs) -> Layout:
        """Return how this kind of call lays out its frames; sketched once, at the cost of a small patch.

        Raises:
            ValueError: for what is no video.
        """
        if self.adapter.modality != "video":
            raise ValueError(
                f"frames can be chosen of a video; {type(self.adapter.pipe).__name__} makes {self.adapter.modality}."
            )
        key = (cond.rows[0].kind, cond.guided)
        if key not in self.layouts:
            layout, calls = Layout(), list[int]()
            with self._through(sketching(self._own(), layout, calls)):
                media = self._decode(x, cond)
            self.layouts[key] = read_sketch(layout, media, calls)
        return self.layouts[key]

    def _chosen(self, x: Tensor, cond: Inputs, layout: Layout, wanted: Sequence[int]) -> Tensor:
        with self._through(choose(self._own(), layout, wanted)):
            return self._decode(x, cond)

    def vae(self) -> Any:
        """Return the pipeline's autoencoder, under whichever name."""
        modules = self.adapter.tap.modules()
        return next(modules[name] for name in AUTOENCODERS if name in modules)

    def _own(self) -> Decode:
        own: Decode = self.vae().decode
        return own

    def _through(self, decode: Decode) -> AbstractContextManager[None]:
        return swapped(self.vae(), "decode", decode)

    def _finite(self, media: Tensor, x: Tensor) -> None:
        """Refuse what a half-precision autoencoder has overflowed on; looked at where that costs no synchronisation."""
        modules = self.adapter.tap.modules()
        name = next((n for n in AUTOENCODERS if n in modules), None)
        dtype = None if name is None else next(modules[name].parameters()).dtype
        if media.device.type != "cpu" and dtype != torch.float16:
            return
        if bool(torch.isfinite(media).all()) or not bool(torch.isfinite(x).all()):
            return
        raise ValueError(
            f"decoding finite states gave {int((~torch.isfinite(media)).sum())} values that are not finite: the "
            f"autoencoder of {type(self.adapter.pipe).__name__} overflows in {dtype}. Decode in "
            f"float32: pipe.{name}.to(torch.float32)."
        )

    def _decode(self, x: Tensor, cond: Inputs) -> Tensor:
        key = (cond.rows[0].kind, cond.guided)
        if key in self.ways:
            media = self._by(self.ways[key], x, cond)
            if _carries(media, x):
                return media
        plan = self.adapter.known.plan(cond)
        candidates = ("zero", "step", "raw") if plan.way == "P" and not plan.settle else ("step", "raw")
        problems = []
        for way in candidates:
            try:
                media = self._by(way, x, cond)
                if _carries(media, x):
                    self.ways[key] = way
                    return media
                problems.append(f"{way}: pixels carry no gradient")
            except Exception as problem:  # each way may fail in the pipeline's own code; all reasons are reported
                problems.append(f"{way}: {type(problem).__name__}: {problem}")
        raise ValueError(f"{type(self.adapter.pipe).__name__} cannot be decoded differentiably. " + "; ".join(problems))

    def _by(self, way: str, x: Tensor, cond: Inputs) -> Tensor:
        with StraightThrough():
            if way == "raw":
                return self._media([self._raw(x, cond)])
            key = (cond.rows[0].kind, cond.guided)
            if key not in self.unscaled:
                self.unscaled[key] = self._leaves_range(way, x.detach(), cond)
            media = self._media(self.session(way, x, cond))
            if self.adapter.modality == "audio":
                return media.clamp(-1.0, 1.0)
            return (media / 2 + 0.5 if self.unscaled[key] else media).clamp(0.0, 1.0)

    @torch.no_grad()
    def _leaves_range(self, way: str, x: Tensor, cond: Inputs) -> bool:
        """Return whether ``output_type="pt"`` hands out the autoencoder's [-1, 1] as it is (Kandinsky 2)."""
        modules = self.adapter.tap.modules()
        name = next((n for n in AUTOENCODERS if n in modules), None)
        if name is None or self.adapter.modality == "audio":
            return False
        caught: list[Any] = []
        own: Callable[..., Any] = modules[name].decode  # type: ignore[assignment]

        def decode(*args: Any, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            caught.append(out[0] if isinstance(out, tuple) else out.sample)
            return out

        with swapped(modules[name], "decode", decode):
            media = self._media(self.session(way, x, cond))
        return len(caught) == 1 and media.shape == caught[0].shape and torch.equal(media, caught[0])

    def session(self, way: str, x: Tensor, cond: Inputs) -> Any:
        """Run what follows the loop: after no iteration at all, or after one whose ``step`` returns the states."""
        adapter, plan = self.adapter, self.adapter.known.plan(cond)
        parts, steps = plan.unpack(x), adapter.known.two(cond)
        last = len(adapter.known.grid(cond, steps)) - 1
        visits = [] if way == "zero" else [Visit(last, put=parts, real=False)]
        if plan.warm and visits:
            visits.insert(0, Visit(0, put=parts, real=plan.warm == "real"))
        session = plan.session(len(x), visits=visits, x=parts[0] if plan.way == "P" else None)
        return adapter.run(cond.rows, cond.guided, session, steps)

    def _raw(self, x: Tensor, cond: Inputs) -> Tensor:
        """Stop at ``vae.decode`` and take what it returns."""
        own, caught = self._own(), []

        def decode(*args: Any, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            caught.append(out[0] if isinstance(out, tuple) else out.sample)
            raise Halt

        with self._through(decode):
            self.session("zero" if self.adapter.known.plan(cond).way == "P" else "step", x, cond)
        if not caught:
            raise ValueError("vae.decode was never called")
        media = caught[0]
        media = media.transpose(1, 2) if media.ndim == 5 else media
        return media if self.adapter.modality == "audio" else (media / 2 + 0.5).clamp(0.0, 1.0)

    def _media(self, out: Any) -> Tensor:
        media = out[0] if isinstance(out, tuple | list) else out
        if isinstance(media, list) and media and isinstance(media[0], Tensor):
            media = torch.stack(media)
        if not isinstance(media, Tensor):
            raise TypeError(f"the pipeline returned {type(media).__name__} for output_type='pt'")
        want = {"image": 4, "video": 5, "audio": 3}[self.adapter.modality]
        if media.ndim == want - 1 and self.adapter.modality == "audio":
            media = media[:, None]
        if media.ndim == want + 1 and self.adapter.modality == "image" and 1 in (media.shape[1], media.shape[2]):
            media = media.squeeze(1 if media.shape[1] == 1 else 2)  # a video model's single frame
        return media


def _carries(media: Tensor, x: Tensor) -> bool:
    """Return whether pixels have the gradient that is wanted of them."""
    return not torch.is_grad_enabled() or media.requires_grad or not x.requires_grad


def _picked(frames: Sequence[int], count: int) -> list[int]:
    """Return frame numbers from 0, those from the end too.

    Raises:
        ValueError: for none, or one that the clip does not have.
    """
    wrong = [f for f in frames if not -count <= f < count]
    if not len(frames) or wrong:
        raise ValueError(
            f"frames must name at least one of the {count} frames of this clip, from 0 or from -1 backwards; got "
            f"{list(frames)}."
        )
    return [f % count for f in frames]
