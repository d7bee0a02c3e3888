"""What can be refused before anything is loaded: a place that cannot hold a folder, a tracker that is not there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

__all__ = ["TRACKERS", "check_names", "check_place", "check_trackers"]

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""What accelerate can log to, each by the name of the package that it needs."""


def check_place(path: Path) -> None:
    """Refuse a path at which no folder can be made or written to; nothing is made.

    Raises:
        ValueError: for a file in the way, or a folder without the right to write.
    """
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir() and there == path.absolute():
        raise ValueError(f"{path} is a file, and a run needs a folder: choose another one with --output.")
    if not there.is_dir():
        raise ValueError(f"{path} cannot be made: {there} is no folder. Choose another one with --output.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {there} is not writable. Choose another one with --output.")


def check_names(trackers: Sequence[str]) -> None:
    """Refuse trackers that accelerate does not know.

    Raises:
        ValueError: with the names that there are.
    """
    for name in trackers:
        if name not in TRACKERS:
            raise ValueError(f"there is no tracker {name!r}: write {', '.join(TRACKERS)}, or none.")


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed: accelerate passes over them without a word.

    Raises:
        ValueError: naming what to install.
    """
    check_names(trackers)
    for name in trackers:
        if find_spec(name) is None:
            raise ValueError(f"the tracker {name} is not installed: pip install {name.replace('_', '-')}.")
