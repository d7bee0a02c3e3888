"""From states to media and back, through the pipeline's own code.

Decoding runs the pipeline's call with no iteration at all, so that what follows the loop (unpacking, normalisation,
VAE, postprocessing) is its own. Where later variables are only bound inside the loop, one iteration runs whose ``step``
returns the states; where the code after ``vae.decode`` leaves torch, its raw output is taken.

Clamps to the range of media pass gradients straight through: a pixel at 1.02 must still hear that it should be darker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as run_checkpointed

from flowalign.pipelines.tap import Halt, Visit, swapped

if TYPE_CHECKING:
    from flowalign.pipelines.adapter import Adapter
    from flowalign.pipelines.condition import Inputs

__all__ = ["Decoder", "StraightThrough"]

RANGES = ((0.0, 1.0), (-1.0, 1.0), (0, 1), (-1, 1))


class _Clamp(torch.autograd.Function):
    """Clamp forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class StraightThrough(TorchFunctionMode):
    """Within it, ``clamp`` to [0, 1] or [-1, 1] has the gradient of the identity; the values are the same."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace clamps of media range."""
        kwargs = kwargs or {}
        if func in (torch.clamp, Tensor.clamp, Tensor.clamp_, torch.clip, Tensor.clip) and args[0].requires_grad:
            low = args[1] if len(args) > 1 else kwargs.get("min")
            high = args[2] if len(args) > 2 else kwargs.get("max")
            if not isinstance(low, Tensor) and not isinstance(high, Tensor) and (low, high) in RANGES:
                return _Clamp.apply(args[0], low, high)
        return func(*args, **kwargs)


class Decoder:
    """Decodes states of one adapter; remembers which way worked."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.ways: dict[Any, str] = {}

    def __call__(
        self, x: Tensor, cond: Inputs, *, chunk: int | None, frames: Sequence[int] | None, checkpoint: bool
    ) -> Tensor:
        """Return media of ``x``."""
        parts: list[Tensor] = []
        for group in self.adapter._calls(cond):
            for i in range(0, len(group), chunk or len(group)):
                index = torch.tensor(group[i : i + (chunk or len(group))])
                piece, rows = x[index.to(x.device)], cond[index]
                if checkpoint and torch.is_grad_enabled():
                    parts.append(
                        run_checkpointed(functools.partial(self._decode, cond=rows), piece, use_reentrant=False)
                    )
                else:
                    parts.append(self._decode(piece, rows))
        media = parts[0] if len(parts) == 1 else torch.cat(parts)
        if frames is not None:
            media = media[:, torch.as_tensor(list(frames), device=media.device)]
        return media

    def _decode(self, x: Tensor, cond: Inputs) -> Tensor:
        key = (cond.rows[0].kind, cond.guided)
        if key in self.ways:
            return self._by(self.ways[key], x, cond)
        plan = self.adapter._plan(cond)
        candidates = ("zero", "step", "raw") if plan.way == "P" and not plan.settle else ("step", "raw")
        problems = []
        for way in candidates:
            try:
                media = self._by(way, x, cond)
                if not torch.is_grad_enabled() or media.requires_grad or not x.requires_grad:
                    self.ways[key] = way
                    return media
                problems.append(f"{way}: pixels carry no gradient")
            except Exception as problem:  # each way may fail in the pipeline's own code; all reasons are reported
                problems.append(f"{way}: {type(problem).__name__}: {problem}")
        raise ValueError(f"{type(self.adapter.pipe).__name__} cannot be decoded differentiably. " + "; ".join(problems))

    def _by(self, way: str, x: Tensor, cond: Inputs) -> Tensor:
        adapter, plan = self.adapter, self.adapter._plan(cond)
        parts, steps = plan.unpack(x), adapter._two(cond)
        last = len(adapter._grid(cond, steps)) - 1
        visits = [] if way == "zero" or (way == "raw" and plan.way == "P") else [Visit(last, put=parts, real=False)]
        if plan.warm and visits:
            visits.insert(0, Visit(0, put=parts, real=plan.warm == "real"))
        session = plan.session(len(x), visits=visits, x=parts[0] if plan.way == "P" else None)
        with StraightThrough():
            if way != "raw":
                out = adapter._run(cond.rows, cond.guided, session, steps)
                return self._media(out)
            return self._media([self._raw(session, cond, steps)])

    def _raw(self, session: Any, cond: Inputs, steps: int) -> Tensor:
        """Stop at ``vae.decode`` and take what it returns."""
        vae, caught = self.adapter.pipe.vae, []

        def decode(*args: Any, **kwargs: Any) -> Any:
            out = type(vae).decode(vae, *args, **kwargs)
            caught.append(out[0] if isinstance(out, tuple) else out.sample)
            raise Halt

        with swapped(vae, "decode", decode):
            self.adapter._run(cond.rows, cond.guided, session, steps)
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
        return media

    def latents(self, media: Tensor, cond: Inputs) -> Tensor:
        """Return clean states of media."""
        raise NotImplementedError
