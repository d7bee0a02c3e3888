"""Prompts from a text file, a JSONL file, a set that a demo world ships, or a ``datasets`` id.

prompts.txt               one prompt a line
prompts.jsonl             {"prompt": "...", "variants": ["..."], "anything": "for the reward"} a line
shapes:train              a set of a demo world
owner/name[:split[:column]]     from the hub, with the ``data`` extra; the column is ``prompt`` if not said
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowalign.source import Prompt

__all__ = ["read_prompts"]

Sets = Callable[[str, str], list[Prompt]]


def read_prompts(spec: str, sets: Sets | None = None) -> list[Prompt]:
    """Return the prompts that ``spec`` names.

    Args:
        spec: see the module.
        sets: ``(world, set) → prompts``, raising ``KeyError`` for a world it does not know.

    Raises:
        ValueError: a file that is missing, empty, or malformed, with the number of the line.
    """
    path = Path(spec)
    if path.suffix in (".txt", ".jsonl", ".json") or path.exists():
        return _read_file(path)
    name, _, rest = spec.partition(":")
    if sets is not None and "/" not in name:
        try:
            return sets(name, rest)
        except KeyError:
            pass
    if spec.count("/") == 1:
        return _read_dataset(spec)
    raise ValueError(
        f"there are no prompts {spec!r}: give a text file with one prompt a line, a .jsonl file, a set of a demo world "
        "such as shapes:train, or the id of a dataset, owner/name."
    )


def _read_file(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise ValueError(f"the prompt file {path} does not exist.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028, which JSON allows
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt file {path} is not UTF-8 text: {error}.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"the prompt file {path} is empty: it needs one prompt a line.")
    parse = _parse_json if path.suffix in (".jsonl", ".json") else _parse_text
    return [parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parse_text(line: str, where: str) -> Prompt:
    if not line.strip():
        raise ValueError(f"{where}: this line is blank, and every line is one prompt. Remove it.")
    return Prompt(line.strip())


def _parse_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: this is not JSON ({error}). Every line is one object: {_EXAMPLE}.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: wanted an object like {_EXAMPLE}; got {type(record).__name__}.")
    return _prompt(record, "prompt", where)


_EXAMPLE = '{"prompt": "a red circle"}'


def _prompt(record: Mapping[str, Any], column: str, where: str) -> Prompt:
    text, variants = record.get(column), record.get("variants", [])
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: {column!r} must be a string that is not empty; got {text!r}. Keys: {list(record)}.")
    if not isinstance(variants, list) or not all(isinstance(v, str) and v.strip() for v in variants):
        raise ValueError(f"{where}: 'variants' must be a list of further wordings; got {variants!r}.")
    meta = {k: v for k, v in record.items() if k not in (column, "variants")}
    return Prompt(text.strip(), meta, tuple(variants))


def _read_dataset(spec: str) -> list[Prompt]:
    name, _, rest = spec.partition(":")
    split, _, column = rest.partition(":")
    split, column = split or "train", column or "prompt"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"prompts {spec!r} look like a dataset of the hub, which needs an extra: pip install 'flowalign[data]'."
        ) from error
    rows = load_dataset(name, split=split)
    if column not in rows.column_names:
        raise ValueError(
            f"dataset {name} has no column {column!r}; it has {rows.column_names}. Write {name}:{split}:COLUMN."
        )
    plain = rows.select_columns([column])
    return [_prompt(record, column, f"{name}:{split}, row {i}") for i, record in enumerate(plain)]
