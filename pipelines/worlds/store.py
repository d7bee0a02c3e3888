"""Where the worlds live on disk, and how they are written: ordinary diffusers folders, safetensors, small.

The large part of a pipeline is its denoiser: it is stored in half precision (10 bits of mantissa; every weight of these
models is far inside half's range), and diffusers turns it back into single precision on loading. Text encoders and
autoencoders are small and stay as they are: transformers would otherwise load them in half.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

__all__ = ["WEIGHTS", "path", "save"]

WEIGHTS = Path(__file__).parent / "weights"


def path(name: str) -> Path:
    """Return the folder of a shipped world, for ``DiffusionPipeline.from_pretrained``.

    Raises:
        ValueError: for a world that is not there; says how to make it.
    """
    folder = WEIGHTS / name
    if not (folder / "model_index.json").is_file():
        here = sorted(p.parent.name for p in WEIGHTS.glob("*/model_index.json"))
        raise ValueError(
            f"no world {name!r} is shipped; there are: {', '.join(here) or 'none'}. Make it with "
            f"`python -m flowalign.pipelines.worlds make {name}`."
        )
    return folder


def save(pipe: Any, folder: Path) -> None:
    """Write a pipeline to ``folder``, replacing what is there; ``pipe`` ends up on the CPU in single precision."""
    pipe.to("cpu", torch.float32)
    denoiser = pipe.transformer if "transformer" in pipe.components else pipe.unet
    keep = [p for p in ("training.json", "card.json", "card.md", "samples.png") if (folder / p).exists()]
    held = {p: (folder / p).read_bytes() for p in keep}
    shutil.rmtree(folder, ignore_errors=True)
    denoiser.to(torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    denoiser.to(torch.float32)
    for name, data in held.items():
        (folder / name).write_bytes(data)
