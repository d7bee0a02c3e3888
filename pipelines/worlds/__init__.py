"""Demo worlds: small models of our own, trained in minutes, on which every method can be seen to learn.

    path("shapes")                          the folder, for DiffusionPipeline.from_pretrained
    prompts("report", "count")              held-out prompts
    python -m flowalign.pipelines.worlds list | make NAME | card NAME

:data:`WORLDS` names the module of each world; its ``WORLD`` says how it is made. Modules are imported on use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from flowalign.pipelines.worlds.splits import prompts
from flowalign.pipelines.worlds.store import path

if TYPE_CHECKING:
    from flowalign.pipelines.worlds.train import World

__all__ = ["WORLDS", "find", "path", "prompts"]

WORLDS: dict[str, tuple[str, str]] = {  # name -> module of this package, its World
    "shapes": ("shapes_training", "WORLD"),
    "shapes-vp": ("shapes_vp", "EPSILON"),
    "shapes-vp-v": ("shapes_vp", "VELOCITY"),
    "shapes-turbo": ("shapes_turbo", "WORLD"),
    "shapes-edit": ("edit", "WORLD"),
    "shapes-sr": ("superres", "WORLD"),
    "shapes-video": ("video", "WORLD"),
    "tones": ("tones", "WORLD"),
}


def find(name: str) -> World:
    """Return the recipe of a world.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in WORLDS:
        raise ValueError(f"there is no world {name!r}; the worlds are {', '.join(WORLDS)}.")
    module, attribute = WORLDS[name]
    world: World = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return world
