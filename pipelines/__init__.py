"""The outside world of generators; imported as ``flowalign.pipelines``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "flowalign.pipelines":  # the folder sits at the top of the repository, where its bare name would collide
    raise ImportError("import flowalign.pipelines, not pipelines: the folder is part of the flowalign package.")

if TYPE_CHECKING:
    from flowalign.pipelines.adapter import Adapter
    from flowalign.pipelines.handover import Handover
    from flowalign.pipelines.loading import load

__all__ = ["Adapter", "Handover", "load"]

HOMES = {"Adapter": "adapter", "Handover": "handover", "load": "loading"}


def __getattr__(name: str) -> Any:
    """Import on first use: ``import flowalign`` must stay quick."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
