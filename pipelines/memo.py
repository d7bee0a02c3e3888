"""Encode once: the pipeline's encoders, memoised by content.

``encode_prompt`` is remembered row by row: which of its outputs run along the batch is learnt by comparing a call with
one row to a call with several, after which any combination of known prompts is put together without an encoder.
Everything else that runs outside the loop (image encoders, ``vae.encode``, text encoders called by hand) is remembered
per call. Keys are contents, never identities: pipelines rebuild their inputs on every call.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor

__all__ = ["Memo", "freeze"]


def freeze(value: Any) -> Any:
    """Return a hashable stand-in for the content of an argument.

    Raises:
        TypeError: for objects whose content cannot be read.
    """
    if value is None or isinstance(value, str | int | float | bool | torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return ("tensor", tuple(value.shape), value.dtype, str(value.device), _digest(flat.numpy().tobytes()))
    if isinstance(value, Image.Image):
        return ("picture", value.mode, value.size, _digest(value.tobytes()))
    if isinstance(value, Mapping):
        return tuple((str(k), freeze(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(freeze, value))
    if type(value).__name__ == "ndarray":
        return ("array", value.shape, str(value.dtype), _digest(value.tobytes()))
    raise TypeError(f"cannot read the content of a {type(value).__name__}")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def unshared(tree: Any) -> Any:
    """Return the same tensors in fresh lists and tuples: pipelines write into the lists they are given."""
    if type(tree) in (list, tuple):
        return type(tree)(unshared(t) for t in tree)
    return dict(tree) if type(tree) is dict else tree


def leaves(tree: Any) -> list[Any]:
    """Return the items of a method's result, a bare tensor being one."""
    return list(tree) if isinstance(tree, tuple) else [tree]


class Memo:
    """What has been encoded.

    Args:
        limit: how many whole calls are kept (rows of prompts are kept until :meth:`forget`).
    """

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self.calls: OrderedDict[Any, Any] = OrderedDict()
        self.rows: dict[Any, list[Any]] = {}
        self.batches: OrderedDict[Any, Any] = OrderedDict()
        self.layout: dict[Any, list[bool]] = {}
        self.several: dict[Any, bool] = {}
        self.ragged: set[Any] = set()
        self.runs = 0
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext

    def forget(self) -> None:
        """Drop everything, e.g. after an encoder has changed."""
        for store in (self.calls, self.rows, self.batches, self.layout, self.several, self.ragged):
            store.clear()

    def whole(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return ``method(*args, **kwargs)``, computed without gradients the first time."""
        try:
            key = (name, freeze(args), freeze(kwargs))
        except TypeError:
            return self._run(method, args, kwargs)
        if key not in self.calls:
            self._store(self.calls, key, self._run(method, args, kwargs))
        self.calls.move_to_end(key)
        return unshared(self.calls[key])

    def prompts(self, method: Callable[..., Any], name: str, arguments: dict[str, Any], batch: int) -> Any:
        """Return ``method(**arguments)`` for a batch, assembled from rows that are known.

        Args:
            method: a bound ``encode_prompt``.
            name: what to remember it as.
            arguments: by name, without ``self``.
            batch: number of rows; lists of that many strings run along them.
        """
        along = [k for k, v in arguments.items() if "prompt" in k and "template" not in k and _column(v, batch)]
        if not along or any(_holds_media(v) for k, v in arguments.items() if k not in along):
            return self.whole(name, method, (), arguments)
        try:
            fixed = {k: v for k, v in arguments.items() if k not in along and k != "batch_size"}
            static = (name, freeze(fixed), tuple(along))
        except TypeError:
            return self._run(method, (), arguments)
        rows = list(zip(*(arguments[k] for k in along), strict=True))
        key = (static, tuple(rows))
        if len(rows) == 1 and static not in self.layout:
            return self.whole(name, method, (), arguments)
        if key in self.batches:
            self.batches.move_to_end(key)
            return unshared(self.batches[key])
        out = self._joint(method, arguments, along, static, rows)
        self._store(self.batches, key, out)
        return unshared(out)

    def _joint(
        self, method: Callable[..., Any], arguments: dict[str, Any], along: list[str], static: Any, rows: list[Any]
    ) -> Any:
        if static in self.ragged:
            return self._run(method, (), arguments)
        missing = [r for r in dict.fromkeys(rows) if (static, r) not in self.rows]
        if missing:
            twice = missing if len(missing) > 1 or static in self.layout else missing * 2
            fresh = self._run(method, (), {**arguments, **_columns(arguments, along, twice)})
            if static not in self.layout:  # one row alone tells, against several, what runs along the batch
                one = self._run(method, (), {**arguments, **_columns(arguments, along, missing[:1])})
                if any(_nested(leaf, len(twice)) for leaf in leaves(fresh)):
                    self.ragged.add(static)
                    return self._run(method, (), arguments)
                self.several[static] = isinstance(fresh, tuple)
                self.layout[static] = [_runs(p, q, len(twice)) for p, q in zip(leaves(one), leaves(fresh), strict=True)]
            for r, row in enumerate(twice):
                self.rows[static, row] = _split(fresh, self.layout[static], r, len(twice))
        out = _assemble([self.rows[static, r] for r in rows], self.layout[static])
        if out is None:  # padded to the longest of its batch: only the pipeline itself can do that
            self.ragged.add(static)
            return self._run(method, (), arguments)
        return tuple(out) if self.several[static] else out[0]

    def _run(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.runs += 1
        with torch.no_grad(), self.around():
            return method(*unshared(args), **unshared(kwargs))  # some templates are written into the caller's list

    def _store(self, store: OrderedDict[Any, Any], key: Any, value: Any) -> None:
        store[key] = value
        while len(store) > self.limit:
            store.popitem(last=False)


def _holds_media(value: Any) -> bool:
    """Return whether an argument is a picture or an array: such prompts are encoded together with it."""
    if isinstance(value, list | tuple):
        return any(_holds_media(v) for v in value)
    return isinstance(value, Tensor | Image.Image) or type(value).__name__ == "ndarray"


def _column(value: Any, batch: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == batch and all(isinstance(v, str) for v in value)


def _columns(arguments: dict[str, Any], along: list[str], rows: list[Any]) -> dict[str, Any]:
    count = {"batch_size": len(rows)} if "batch_size" in arguments else {}
    return {**{name: [row[i] for row in rows] for i, name in enumerate(along)}, **count}


def _length(leaf: Any) -> int | None:
    if isinstance(leaf, Tensor):
        return leaf.shape[0] if leaf.ndim else None
    return len(leaf) if isinstance(leaf, list) else None


def _nested(leaf: Any, count: int) -> bool:
    """Return whether a result hides tensors in a structure that this memo does not take apart."""
    if isinstance(leaf, list):
        return len(leaf) % count != 0 or not all(isinstance(item, Tensor) for item in leaf)
    return not isinstance(leaf, Tensor | str | int | float | bool | None)


def _runs(one: Any, many: Any, count: int) -> bool:
    """Return whether a result runs along the batch: ``count`` times as long for ``count`` rows as for one."""
    length = _length(one)
    return length is not None and length > 0 and _length(many) == count * length


def _split(tree: Any, layout: list[bool], row: int, count: int) -> list[Any]:
    """Return one row's share: a strided slice, so that blocks [negative; positive] stay in order."""
    return [leaf[row::count] if runs else leaf for leaf, runs in zip(leaves(tree), layout, strict=True)]


def _assemble(rows: list[list[Any]], layout: list[bool]) -> list[Any] | None:
    """Put rows together again; None where their lengths differ."""
    out: list[Any] = []
    for parts, runs in zip(zip(*rows, strict=True), layout, strict=True):
        first = parts[0]
        if isinstance(first, Tensor) and any(p.shape != first.shape for p in parts):
            return None
        if not runs:
            out.append(first)
        elif isinstance(first, list):
            out.append([p[b] for b in range(len(first)) for p in parts])
        else:
            out.append(torch.cat([p[b : b + 1] for b in range(len(first)) for p in parts]))
    return out
