"""Fields of a dataclass from plain values, such as a YAML file has: every name and every type is checked.

    update(FitOptions(), {"lr": "1e-4", "size": 8}, "run.yaml: fit")

Nested dataclasses, unions, literals, tuples and dicts go by their annotations. A key that does not exist is an error
that names the nearest ones that do; a value of another type one that says what the field takes.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["update"]


def update(base: Any, data: Mapping[str, Any], where: str) -> Any:
    """Return a dataclass with some fields replaced by checked plain values.

    Args:
        base: a frozen dataclass; what ``data`` leaves out stays.
        data: values by field name.
        where: what they were read from, for the errors.

    Raises:
        ValueError: for what is no mapping, an unknown key, or a value that is not of the field's type.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a mapping of keys to values; got {data!r}.")
    hints = typing.get_type_hints(type(base))
    fields = {f.name: hints[f.name] for f in dataclasses.fields(base)}
    for key in data:
        if key not in fields:
            raise ValueError(
                f"{where}: there is no key {key!r} in {type(base).__name__}. {_nearest(str(key), list(fields))}"
            )
    new = {k: _convert(fields[k], v, getattr(base, k), f"{where}: {k}") for k, v in data.items()}
    return replace(base, **new)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join(known)}."


def _convert(kind: Any, value: Any, old: Any, where: str) -> Any:
    """Return ``value`` as the type of its field.

    Raises:
        ValueError: naming the field, what it takes and what came.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _either(kind, value, old, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return update(old if isinstance(old, kind) else kind(), value, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) == len(value):
            return tuple(_convert(k, v, None, where) for k, v in zip(inner, value, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _convert(args[1], v, None, f"{where}.{k}") for k, v in value.items()}
    if origin is None and isinstance(kind, type):
        return _scalar(kind, value, where)
    raise _Mismatch(f"{where} takes {_words(kind)}; got {value!r}.")


def _either(kind: Any, value: Any, old: Any, where: str) -> Any:
    options = get_args(kind)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, old, where)
            except _Mismatch:
                continue
    raise _Mismatch(f"{where} takes {_words(kind)}; got {value!r}.")


class _Mismatch(ValueError):
    """A value that is not of the field's type."""


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise _Mismatch(f"{where} takes {_words(kind)}; got {value!r}.")


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(a) for a in get_args(kind))
    return getattr(kind, "__name__", str(kind)) if not get_args(kind) else str(kind).replace("typing.", "")
