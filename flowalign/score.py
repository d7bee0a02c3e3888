"""``flowalign score``: what a reward says of files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.build import open_reward

__all__ = ["read_image", "run"]

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def read_image(path: Path) -> Tensor:
    """Return ``(3, H, W)`` in [0, 1].

    Raises:
        ValueError: for a file that does not exist or is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    try:
        with Image.open(path) as image:
            data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            return data.reshape(image.height, image.width, 3).permute(2, 0, 1).float() / 255
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no picture: {error}.") from error


def run(
    reward: str, files: Sequence[Path], prompt: str | None = None, device: str = "auto"
) -> Iterator[dict[str, Any]]:
    """Yield file, prompt and score of each picture.

    Args:
        reward: a specification.
        files: pictures, or folders of them.
        prompt: of all; None takes each one's from the text file of the same name beside it.
        device: where the reward's network runs.

    Raises:
        ValueError: for a missing file or prompt.
    """
    paths = [
        q for p in files for q in (sorted(x for x in p.iterdir() if x.suffix.lower() in ENDINGS) if p.is_dir() else [p])
    ]
    texts = [prompt if prompt is not None else _beside(p) for p in paths]
    images = [read_image(p) for p in paths]
    judge = open_reward(reward, device)
    for path, text, image in zip(paths, texts, images, strict=True):
        yield {"file": str(path), "prompt": text, "score": float(judge(image[None], [text])[0])}


def _beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise ValueError(f"{path} has no prompt: give --prompt, or write it to {text}.")
    return text.read_text(encoding="utf-8").strip()
