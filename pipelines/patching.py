"""Set something for the length of a block and put back what was there, whatever ends it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["constant_noise", "replaced", "swapped", "zeros"]

MISSING = object()


@contextmanager
def swapped(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an instance attribute and put back what was there, even if that was nothing."""
    before = vars(target).get(name, MISSING)
    vars(target)[name] = value
    try:
        yield
    finally:
        if before is MISSING:
            vars(target).pop(name, None)
        else:
            vars(target)[name] = before


@contextmanager
def replaced(spaces: Sequence[dict[str, Any]], name: str, value: Any) -> Iterator[None]:
    """Set a name in those of the namespaces that have it."""
    before = [(space, space[name]) for space in spaces if name in space]
    for space, _ in before:
        space[name] = value
    try:
        yield
    finally:
        for space, old in reversed(before):
            space[name] = old


@contextmanager
def constant_noise(kind: type, extra: dict[str, Any], value: float | None) -> Iterator[None]:
    """Let ``randn_tensor`` in a pipeline's module return a constant; does nothing for None."""
    if value is None:
        yield
        return
    spaces = [extra] + [vars(inspect.getmodule(c)) for c in kind.__mro__ if inspect.getmodule(c) is not None]

    def constant(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> Tensor:
        return torch.full(tuple(shape), value, device=device, dtype=dtype)

    with replaced(spaces, "randn_tensor", constant):
        yield


def zeros(tree: Any, recorded: int, batch: int) -> Any:
    """Return zeros like a recorded network output, for another batch size."""
    if isinstance(tree, Tensor):
        if recorded == batch or tree.ndim == 0 or tree.shape[0] % recorded:
            return torch.zeros_like(tree)
        return tree.new_zeros((tree.shape[0] // recorded * batch, *tree.shape[1:]))
    if isinstance(tree, tuple) and type(tree) is tuple:
        return tuple(zeros(t, recorded, batch) for t in tree)
    if isinstance(tree, list):
        size = len(tree) // recorded * batch if recorded != batch and len(tree) % recorded == 0 else len(tree)
        return [torch.zeros_like(tree[i % len(tree)]) for i in range(size)]
    if isinstance(tree, Mapping):
        out = copy.copy(tree)
        for key, value in tree.items():
            out[key] = zeros(value, recorded, batch)  # type: ignore[index]
        return out
    return tree
