"""Media to files: pictures and grids as PNG, video as animated PNG, audio as 16-bit WAV. Nothing here needs a codec."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowalign.protocols import Modality

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["data_uri", "grid", "picture", "save_media"]

GOOD, BAD = (46, 160, 67), (215, 58, 73)


def picture(image: Tensor) -> Image:
    """Return an image ``(3, H, W)`` in [0, 1], or the middle frame of a video ``(F, 3, H, W)``."""
    from PIL import Image as Pillow

    still = image[len(image) // 2] if image.ndim == 4 else image
    data = (still.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Pillow.fromarray(data)


def grid(images: Tensor, columns: int, *, good: Sequence[bool] | None = None, size: int = 64, gap: int = 6) -> Image:
    """Lay images out in rows, each framed green or red where it is known whether it is right.

    Args:
        images: ``(B, 3, H, W)`` or videos.
        columns: per row.
        good: of each.
        size: pixels of a tile's longer edge at least; small images are enlarged without smoothing.
        gap: pixels between tiles.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw

    tiles = [picture(x) for x in images]
    w, h = tiles[0].size
    scale = max(1, round(size / max(w, h)))
    w, h = w * scale, h * scale
    rows = -(-len(tiles) // columns)
    sheet = Pillow.new("RGB", (columns * (w + gap) + gap, rows * (h + gap) + gap), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x, y = gap + (i % columns) * (w + gap), gap + (i // columns) * (h + gap)
        if good is not None:
            pen.rectangle((x - 3, y - 3, x + w + 2, y + h + 2), fill=GOOD if good[i] else BAD)
        sheet.paste(tile.resize((w, h), Pillow.Resampling.NEAREST), (x, y))
    return sheet


def data_uri(image: Image) -> str:
    """Return a picture as a PNG inside a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def save_media(folder: Path, media: Tensor, modality: Modality, names: Sequence[str], rate: int = 16000) -> list[str]:
    """Write one file per sample; return their names.

    Args:
        folder: made if it does not exist.
        media: see the conventions of the modality.
        modality: what it is.
        names: of the files, without ending.
        rate: samples per second of audio.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ending = "wav" if modality == "audio" else "png"
    files = [f"{name}.{ending}" for name in names]
    for file, sample in zip(files, media, strict=True):
        if modality == "audio":
            _write_wave(folder / file, sample, rate)
        elif modality == "video":
            frames = [picture(frame) for frame in sample]
            frames[0].save(folder / file, save_all=True, append_images=frames[1:], duration=125, loop=0)
        else:
            picture(sample).save(folder / file)
    return files


def _write_wave(path: Path, sample: Tensor, rate: int) -> None:
    data = (sample.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous().cpu().numpy().tobytes()
    with wave.open(str(path), "wb") as f:
        f.setnchannels(sample.shape[0])
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes(data)
