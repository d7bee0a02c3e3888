"""The zoo: tiny, randomly initialised instances of diffusers' pipeline classes, offline, from our own configurations.

>>> names()  # doctest: +SKIP
['AceStep', ..., 'Wan_22', ...]
>>> case = build("StableDiffusion3", seed=0)  # doctest: +SKIP
>>> case.pipe(**case.inputs, num_inference_steps=case.steps, output_type=case.output_type)  # doctest: +SKIP

One file per kind of family holds a plain dictionary ``BUILDERS`` from name to function. A name is the class name
without "Pipeline", plus a few variants. ``NOT_TRIED`` says, by class name, why any other class is absent.

To add a case, write a function that returns components (a superset will do) and a line in ``BUILDERS``; sizes go down
to what the class bears, and a quirk worth knowing goes into ``notes``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .absent import NOT_TRIED

if TYPE_CHECKING:
    from .case import Builder, Case

__all__ = ["NOT_TRIED", "REPRESENTATIVE", "build", "names"]

FILES = (
    "stable_diffusion",
    "sdxl",
    "sd_control",
    "sd_special",
    "pixels",
    "kandinsky",
    "kolors",
    "animatediff",
    "sd3",
    "flux",
    "flux2",
    "wan",
    "wan_more",
    "dit_image",
    "dit_more",
    "bria",
    "video_more",
    "sana",
    "z_image",
    "qwen",
    "ltx",
    "video",
    "audio",
    "audio_more",
    "cosmos",
    "vlm_image",
    "video_flow",
    "cascade",
    "newest_image",
    "newest_video",
)

# What the default tests run: two dozen of the most used.
REPRESENTATIVE = (
    "Chroma",
    "CogVideoX",
    "CogView4",
    "Flux",
    "Flux2",
    "FluxKontext",
    "HunyuanImage",
    "HunyuanVideo",
    "LTX",
    "LTX2",
    "LatentConsistencyModel",
    "Lumina2",
    "Mochi",
    "PixArtAlpha",
    "QwenImage",
    "QwenImageEdit",
    "Sana",
    "StableAudio",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "Wan",
    "WanImageToVideo",
    "WanImageToVideo_22",
    "Wan_22",
    "ZImage",
)


def builders() -> dict[str, Builder]:
    """Return every builder by name; imports diffusers' models on first use."""
    table: dict[str, Builder] = {}
    for file in FILES:
        more = import_module(f"{__name__}.{file}").BUILDERS
        if twice := table.keys() & more.keys():
            raise ValueError(f"the zoo names {sorted(twice)} twice; the second time in {file}.py")
        table |= more
    return table


def names() -> list[str]:
    """Return the stable ids of all cases, sorted."""
    return sorted(builders())


def build(name: str, seed: int = 0) -> Case:
    """Build one case.

    Args:
        name: One of :func:`names`.
        seed: Two calls with the same seed give the same parameters; torch's global generator is left as it was.

    Raises:
        KeyError: For a name that is not in the zoo.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builders()[name]()
