"""The time grid as the pipeline's own loop sees it, and what ``scheduler.step`` hands back to it.

A pipeline walks its grid with ``for i, t in enumerate(timesteps)``. A :class:`Track` is that tensor, whole and with its
real values (pipelines read its length, slice it, and index neighbours), but *iterated by the loop* it yields only the
visits that a :class:`Walk` asks for, each with its true index. Iterated by anybody else (``add_noise`` walks timesteps
too) it is an ordinary tensor.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["BatchTime", "Returned", "Track", "Walk", "enumerate_track"]

PLAIN = torch._C.DisableTorchFunctionSubclass


class Walk(Protocol):
    """Who decides which grid points the loop visits."""

    code: CodeType

    def visits(self, track: Track) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(index, timestep)`` for the loop over ``track``."""
        ...


class Track(Tensor):
    """A 1-D grid of timesteps that knows its walk."""

    walk: Walk

    @staticmethod
    def of(grid: Tensor, walk: Walk) -> Track:
        """Return ``grid`` as a track."""
        with PLAIN():
            track = grid.as_subclass(Track)
        track.walk = walk
        return track

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Keep the walk on 1-D results (slices, device moves, arithmetic); everything else becomes plain."""
        with PLAIN():
            out = func(*args, **(kwargs or {}))
            if not isinstance(out, Tensor):
                return out
            source = next((a for a in args if isinstance(a, Track)), None)
            if source is None or out.ndim != 1 or (not out.is_floating_point() and out.dtype != source.dtype):
                return out.as_subclass(Tensor) if isinstance(out, Track) else out
            track = out.as_subclass(Track)
        track.walk = source.walk
        return track

    def __deepcopy__(self, memo: dict[int, Any]) -> Track:
        """Return a copy with the same walk: LTX-2 and Kandinsky 6 deepcopy their scheduler."""
        return Track.of(self.plain().clone(), self.walk)

    def plain(self) -> Tensor:
        """Return the same grid as an ordinary tensor."""
        with PLAIN():
            return self.as_subclass(Tensor)

    def __iter__(self) -> Iterator[Any]:
        """Yield the walk's visits to the pipeline's own loop, every entry to anybody else."""
        if loop_frame(sys._getframe(1)).f_code is self.walk.code:
            return (t for _, t in self.walk.visits(self))
        return iter(self.plain().unbind(0))


def loop_frame(frame: FrameType) -> FrameType:
    """Return the first frame that is not a progress bar's."""
    while "tqdm" in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    return frame


def enumerate_track(iterable: Any, start: int = 0) -> Iterator[tuple[int, Any]]:
    """Be ``enumerate``, but give a track's visits their true index."""
    if isinstance(iterable, Track):
        return ((start + i, t) for i, t in iterable.walk.visits(iterable))
    return builtins.enumerate(iterable, start)


class BatchTime(Tensor):
    """One timestep per sample, ``(B,)``, where the pipeline believes in a single one.

    ``t.expand(n)`` and ``t.repeat(n)`` are how loops spread a timestep over the batch, n = B, or 2B and 3B where the
    branches of guidance are stacked: this tiles the (B,) times instead, and is an ordinary tensor from then on.
    """

    @staticmethod
    def of(times: Tensor) -> BatchTime:
        """Return ``times`` as a batch time."""
        with PLAIN():
            return times.as_subclass(BatchTime)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Tile for ``expand`` and ``repeat``; keep the type through casts and arithmetic on (B,)."""
        with PLAIN():
            if func in (Tensor.expand, Tensor.repeat) and isinstance(args[0], BatchTime):
                times = args[0].as_subclass(Tensor)
                size = args[1] if len(args) == 2 else args[1:]
                n = size if isinstance(size, int) else size[0] if len(size) == 1 else None
                if n is not None:
                    if n < len(times) or n % len(times):
                        raise ValueError(f"{len(times)} per-sample times do not tile a batch of {n}.")
                    return times.repeat(n // len(times))
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                keep = out.ndim == 1 and isinstance(args[0], BatchTime) and out.shape == args[0].shape
                return out.as_subclass(BatchTime if keep else Tensor)
            return out


class Returned(tuple[Any, ...]):
    """What a replaced ``step`` returns: unpacks as two values, and any attribute is the first of them."""

    __slots__ = ()

    def __new__(cls, value: Any) -> Returned:
        """Return the pair ``(value, value)``."""
        return super().__new__(cls, (value, value))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0]
