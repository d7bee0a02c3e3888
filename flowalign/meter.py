"""How many bytes something really takes: live tensors on the CPU, the allocator's statistics on an accelerator.

    with Meter() as meter:          peak, kept: bytes above those that were live on entry
        loss = forward()
        held = meter.kept           what the graph and the results hold now
        meter.restart()             a new peak, for the backward pass
        loss.backward()

On the CPU torch keeps no statistics, so every operation's outputs are watched: a storage counts from the operation that
made it until it is freed, also in backward passes and inside gradient checkpoints; scratch space inside one kernel is
not seen. :class:`SavedBytes` counts what autograd saves alone, and cannot look inside a checkpoint's recomputation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Meter", "SavedBytes", "tensor_bytes"]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages of tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class _Watch(TorchDispatchMode):
    """Counts storages from the operation that makes them until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.live: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at what it made."""
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if _plain(a)}
        for made in tree_leaves(out):
            if _plain(made):
                self._note(made.untyped_storage(), given)
        return out

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self.live:  # a view, or written in place
            return
        size = storage.nbytes()
        self.live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"


class Meter:
    """Peak and present bytes above those live on entry.

    Args:
        device: whose memory; a CUDA device is asked, the CPU is watched.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.watch = _Watch() if self.device.type == "cpu" else None
        self.base = 0

    def __enter__(self) -> Self:
        """Begin."""
        if self.watch is not None:
            self.watch.__enter__()
        else:
            torch.cuda.synchronize(self.device)
            self.base = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End; the figures stay."""
        if self.watch is not None:
            self.watch.__exit__(kind, error, trace)

    @property
    def kept(self) -> int:
        """Bytes made since entry that are still alive."""
        return self.watch.now if self.watch is not None else torch.cuda.memory_allocated(self.device) - self.base

    @property
    def peak(self) -> int:
        """Most bytes that were alive together since entry or the last :meth:`restart`."""
        if self.watch is not None:
            return self.watch.peak
        return torch.cuda.max_memory_allocated(self.device) - self.base

    def restart(self) -> None:
        """Forget the peak so far."""
        if self.watch is not None:
            self.watch.peak = self.watch.now
        else:
            torch.cuda.reset_peak_memory_stats(self.device)


class _Held:
    """A saved tensor while the graph holds it."""

    def __init__(self, owner: SavedBytes, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the output itself would make a cycle with its own graph
        self.key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        owner.take(self.key, size)
        weakref.finalize(self, owner.give, self.key, size)


class SavedBytes:
    """Bytes of the distinct storages that autograd holds for the backward pass.

    Args:
        besides: tensors that do not count, e.g. the weights, which are there anyway.
    """

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        self.now = self.peak = 0
        self.users: dict[int, int] = {t.untyped_storage()._cdata: 1 for t in besides}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Held(self, t), lambda held: held.tensor)

    def take(self, key: int, size: int) -> None:
        """Count one more use of a storage."""
        self.users[key] = self.users.get(key, 0) + 1
        if self.users[key] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)

    def give(self, key: int, size: int) -> None:
        """Count one use less."""
        self.users[key] -= 1
        if not self.users[key]:
            self.now -= size

    def __enter__(self) -> Self:
        """Begin."""
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End; what is held stays counted until it is freed."""
        self.hooks.__exit__(*error)
