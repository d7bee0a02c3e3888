"""A small network's file: its weights in safetensors, and in the header, as JSON, what is needed to build it again.

Reading one runs no code, and a file of another kind is refused by its header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["read", "write"]


def write(path: Path, kind: str, about: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write weights, and what they are of.

    Args:
        path: of the file; folders are made.
        kind: key of the header.
        about: plain values under it.
        weights: by name.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, str(path), {kind: json.dumps(about)})


def read(path: Path, kind: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what :func:`write` wrote: the plain values, and the weights by name, on the CPU.

    Args:
        path: of the file.
        kind: key of the header.
        what: to say in the error, "no ... written by flowalign".

    Raises:
        ValueError: for a file that is none of this kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {})[kind])
            return about, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path} is no {what} written by flowalign: {error}") from error
