"""Nothing is lost: checkpoints that a kill at any moment leaves whole, and that a resumed run continues bit for bit.

A checkpoint is one file of tensors and plain values, written beside its final name and renamed: it either is there or
is not. It is read with ``weights_only=True``: nothing in it can run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["LAST_GOOD", "latest", "load", "name", "save", "write"]

KEEP = 2
LAST_GOOD = "last-good.pt"  # of a run that stopped in the middle of an iteration: kept, but not resumed from


def name(iteration: int) -> str:
    """Return the file name of an iteration's checkpoint; names sort by iteration."""
    return f"step-{iteration:08d}.pt"


def save(folder: Path, iteration: int, state: dict[str, Any]) -> Path:
    """Write ``step-ITERATION.pt`` atomically and drop all but the newest two."""
    path = write(folder / name(iteration), state)
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()
    return path


def write(path: Path, state: dict[str, Any]) -> Path:
    """Write a checkpoint atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
    return path


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a folder, or None."""
    found = sorted(folder.glob("step-*.pt"))
    return found[-1] if found else None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        ValueError: for a file that is no checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}). Delete it to resume from the one before."
        ) from error
