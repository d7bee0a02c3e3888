"""A YAML file as plain values: one mapping, each of its keys written once.

YAML lets a later key replace an earlier one of the same name. In a configuration that is a setting passed over in
silence, so it is an error here, with its line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["read_mapping"]


class _Once(yaml.SafeLoader):
    """The safe loader, which refuses a key that comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node.

        Raises:
            yaml.constructor.ConstructorError: at the line of the second of two equal keys.
        """
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                mark = (key.tag, key.value)
                if mark in seen:
                    raise yaml.constructor.ConstructorError(
                        "in a mapping", node.start_mark, f"the key {key.value!r} comes twice", key.start_mark
                    )
                seen.add(mark)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[Any, Any]:
    """Return the mapping that a file holds.

    Raises:
        ValueError: with the file's name, for one that is missing, no UTF-8 text, no YAML, has a key twice, or holds
            something other than a mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Once)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the configuration {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"the configuration {path} must be a mapping of keys to values; got {type(data).__name__}.")
    return data
