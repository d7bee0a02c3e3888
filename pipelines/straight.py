"""Code that was written for inference, differentiated: clamps pass gradients, in-place writes become copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["StraightThrough"]

RANGES = ((0.0, 1.0), (-1.0, 1.0), (0, 1), (-1, 1))


class _Clamp(torch.autograd.Function):
    """Clamp forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


INPLACE: dict[str, Callable[..., Tensor]] = {
    "__iadd__": torch.add,
    "__isub__": torch.sub,
    "__imul__": torch.mul,
    "__idiv__": torch.div,
    "__itruediv__": torch.div,
}


class StraightThrough(TorchFunctionMode):
    """Within it, ``clamp`` to [0, 1] or [-1, 1] has the gradient of the identity; the values are the same.

    Pipelines also write into their latents after the loop, as nobody was to differentiate them (Kandinsky 5, Marigold):
    augmented assignments become new tensors, and slices become copies, so that what backward has saved stays.
    """

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
        name = getattr(func, "__name__", "")
        if name in INPLACE and isinstance(args[0], Tensor) and args[0].requires_grad:
            return INPLACE[name](*args)
        out = func(*args, **kwargs)
        if name == "__getitem__" and isinstance(out, Tensor) and out.requires_grad:
            return out.clone()
        return out
