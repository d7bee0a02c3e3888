"""Where the worlds live on disk, and how they are written: ordinary diffusers folders, safetensors, small.

The large part of a pipeline is its denoiser: it is stored in half precision (10 bits of mantissa; every weight of these
models is far inside half's range), and diffusers turns it back into single precision on loading. Text encoders and
autoencoders stay as they are until a world is shipped: then :func:`ship` halves them too, while their ``config.json``
goes on saying float32, which is what transformers and diffusers load them in.
"""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["WEIGHTS", "frozen", "path", "save", "ship"]

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


@lru_cache(maxsize=2)
def frozen(name: str, device: torch.device) -> Any:
    """Return a shipped world as a teacher: nothing in it takes a gradient, and all who ask share it.

    Raises:
        ValueError: for a world that is not there.
    """
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(path(name)).to(device)
    for m in pipe.components.values():
        if isinstance(m, nn.Module):
            m.requires_grad_(False)
    return pipe


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


def ship(source: Path, name: str, weights: Path = WEIGHTS) -> Path:
    """Copy a measured world among the shipped ones, every weight in half precision; return its folder.

    Where its parts were read from, which diffusers notes down, is a folder of this machine and left out.

    Raises:
        ValueError: if ``source`` holds no pipeline, or no card: what has not been measured is not shipped.
    """
    missing = [p for p in ("model_index.json", "card.json", "training.json") if not (source / p).is_file()]
    if missing:
        raise ValueError(f"{source} has no {', '.join(missing)}: make the world and its card, then ship it.")
    target = weights / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for file in target.rglob("*.safetensors"):
        halved = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(halved, file, metadata={"format": "pt"})
    for file in target.rglob("*.json"):
        known = json.loads(file.read_text())
        if isinstance(known, dict) and known.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(known, indent=2) + "\n")
    return target
