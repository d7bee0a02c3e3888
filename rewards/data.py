"""A user's own judgements on disk.

A folder with one of these files, paths relative to it:

    pairs.jsonl     {"prompt": "...", "a": "1.png", "b": "2.png", "label": 1}       1: a is better, -1: b, 0: a tie
    scores.jsonl    {"prompt": "...", "image": "1.png", "score": 7.5}
    labels.jsonl    {"prompt": "...", "image": "1.png", "good": true}

or with sub-folders ``good/`` and ``bad/`` of pictures (no prompts). Everything is read and checked before any training
starts: a line that does not parse, a picture that is missing, a score that is not finite is named with its line.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Judgements", "picture", "read_folder"]

Kind = Literal["pairs", "scores", "labels"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Judgements:
    """Items and what was said of them.

    Attributes:
        kind: what ``value`` means.
        items: distinct ``(picture, prompt)``.
        index: ``(N, 2)`` items of each pair, or ``(N, 1)`` items.
        value: ``(N,)`` label −1, 0, 1 of pairs; score; or 1 for good and 0 for bad.
    """

    kind: Kind
    items: tuple[tuple[Path, str], ...]
    index: Tensor
    value: Tensor

    def __len__(self) -> int:
        return len(self.value)


def picture(path: Path) -> Tensor:
    """Return ``(3, H, W)`` in [0, 1]; transparency is laid on white, orientation tags are obeyed.

    Raises:
        ValueError: for a file that is no picture, or half of one.
    """
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}.") from error
    ground = Image.new("RGBA", image.size, "white")
    return pil_to_tensor(Image.alpha_composite(ground, image).convert("RGB")).float() / 255


def read_folder(folder: str | Path) -> Judgements:
    """Read a folder of judgements.

    Raises:
        ValueError: nothing to read, or a line that is wrong; the file and the line are named.
    """
    root = Path(folder)
    kinds: tuple[Kind, ...] = ("pairs", "scores", "labels")
    for kind in kinds:
        if (root / f"{kind}.jsonl").is_file():
            return _read_lines(root, kind)
    if (root / "good").is_dir() and (root / "bad").is_dir():
        rows = [(p, "", 1.0) for p in pictures(root / "good")] + [(p, "", 0.0) for p in pictures(root / "bad")]
        return _collect("labels", [((path, prompt),) for path, prompt, _ in rows], [v for *_, v in rows])
    raise ValueError(
        f"{root} holds no judgements: wanted pairs.jsonl, scores.jsonl or labels.jsonl, or the folders good/ and bad/."
    )


def pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder, by name.

    Raises:
        ValueError: it is no folder, or holds none.
    """
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    return found


def _read_lines(root: Path, kind: Kind) -> Judgements:
    source = root / f"{kind}.jsonl"
    keys = ("a", "b") if kind == "pairs" else ("image",)
    entries, values = [], []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}.") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in keys):
            raise ValueError(f"{where} wants {', '.join(keys)} as names of pictures; got {line[:120]}.")
        prompt = row.get("prompt", "")
        if not isinstance(prompt, str):
            raise ValueError(f"{where}: prompt must be a string; got {prompt!r}.")
        paths = [_inside(root, row[k], where) for k in keys]
        entries.append(tuple((p, prompt) for p in paths))
        values.append(_value(row, kind, where))
    if not entries:
        raise ValueError(f"{source} is empty.")
    return _collect(kind, entries, values)


def _inside(root: Path, name: str, where: str) -> Path:
    path = root / name
    if not path.is_file():
        raise ValueError(f"{where}: there is no picture {path}.")
    return path


def _value(row: dict[str, Any], kind: Kind, where: str) -> float:
    name = {"pairs": "label", "scores": "score", "labels": "good"}[kind]
    value = row.get(name)
    fine = {
        "pairs": value in (-1, 0, 1) and not isinstance(value, bool),
        "scores": isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
        "labels": isinstance(value, bool),
    }
    if not fine[kind]:
        wanted = {"pairs": "-1, 0 or 1", "scores": "a finite number", "labels": "true or false"}[kind]
        raise ValueError(f"{where}: {name} must be {wanted}; got {value!r}.")
    assert value is not None
    return float(value)


def _collect(kind: Kind, entries: list[tuple[tuple[Path, str], ...]], values: list[float]) -> Judgements:
    items = {item: i for i, item in enumerate(dict.fromkeys(x for entry in entries for x in entry))}
    index = torch.tensor([[items[x] for x in entry] for entry in entries])
    return Judgements(kind, tuple(items), index, torch.tensor(values))
