"""What travels between a reward server and its client: JSON with PNGs, or safetensors. Never a pickle.

    JSON           {"images": ["<base64 PNG>", ...], "prompts": [...], "meta": [{...}, ...] or null}
    safetensors    tensor "media" (B, ...) of floats in [0, 1] or bytes; tensors "meta.<i>.<key>"; in the header's
                   metadata "prompts" and "meta" as JSON

PNG rounds to bytes, as a saved picture would; safetensors carries floats exactly, and video and audio. Everything that
arrives is checked against :class:`Limits` before memory is spent on it: a PNG's header says its size before it is
decoded, a tensor's bytes are those of the body.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from flowalign.protocols import Meta
from flowalign.rewards.preprocess import to_bytes

__all__ = ["JSON", "SAFETENSORS", "Batch", "Limits", "Refused", "decode", "encode_json", "encode_safetensors"]

JSON, SAFETENSORS = "application/json", "application/x-safetensors"


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
        body: bytes of a request.
        samples: per request.
        values: per sample, i.e. 3·H·W (times frames); 3·4096² by default.
        total: values of all samples together: PNGs unpack to a thousand times their size.
        prompt: letters per prompt.
        waiting: requests in the queue; one more is answered 503 with Retry-After.
    """

    body: int = 256 * 2**20
    samples: int = 256
    values: int = 3 * 4096 * 4096
    total: int = 2**28
    prompt: int = 20_000
    waiting: int = 64


@dataclass(frozen=True)
class Batch:
    """A request's content: media ``(B, ...)``, one prompt and perhaps one mapping per sample."""

    media: Tensor
    prompts: list[str]
    meta: list[dict[str, Any]] | None


class Refused(ValueError):
    """A request that is malformed (status 400), too large (413) or of an unknown type (415)."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def encode_json(media: Tensor, prompts: Sequence[str], meta: Meta | None = None) -> bytes:
    """Encode pictures ``(B, 3, H, W)``; meta must be JSON's own types."""
    from PIL import Image

    images = []
    for picture in to_bytes(media).permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
        images.append(base64.b64encode(buffer.getvalue()).decode())
    rows = None if meta is None else [dict(m) for m in meta]
    return json.dumps({"images": images, "prompts": list(prompts), "meta": rows}, allow_nan=False).encode()


def encode_safetensors(media: Tensor, prompts: Sequence[str], meta: Meta | None = None) -> bytes:
    """Encode any media exactly; tensors in meta travel as tensors, the rest as JSON."""
    tensors = {"media": media.detach().cpu().contiguous()}
    rows: list[dict[str, Any]] | None = None
    if meta is not None:
        rows = []
        for i, m in enumerate(meta):
            tensors.update(
                {f"meta.{i}.{k}": v.detach().cpu().contiguous() for k, v in m.items() if isinstance(v, Tensor)}
            )
            rows.append({k: v for k, v in m.items() if not isinstance(v, Tensor)})
    header = {"prompts": json.dumps(list(prompts)), "meta": json.dumps(rows, allow_nan=False)}
    return save_safetensors(tensors, header)


def decode(body: bytes, kind: str, limits: Limits) -> Batch:
    """Decode a request and hold it to the limits.

    Raises:
        Refused: with the HTTP status; the message speaks of the request only.
    """
    kind = kind.split(";")[0].strip().lower()
    if kind == SAFETENSORS:
        return _check(_decode_safetensors(body, limits), limits)
    if kind == JSON:
        return _check(_decode_json(body, limits), limits)
    raise Refused(f"content type must be {JSON} or {SAFETENSORS}.", 415)


def _parse(text: bytes | str, what: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what} is not valid JSON.") from error


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _rows(meta: Any) -> list[dict[str, Any]] | None:
    if meta is None:
        return None
    if not isinstance(meta, list) or not all(isinstance(m, dict) for m in meta):
        raise Refused("meta must be a list of objects, or null.")
    return meta


def _decode_json(body: bytes, limits: Limits) -> Batch:
    found = _parse(body, "the body")
    if not isinstance(found, dict) or not isinstance(found.get("images"), list):
        raise Refused("wanted an object with images, prompts and meta.")
    if len(found["images"]) > limits.samples:
        raise Refused(f"at most {limits.samples} samples per request.", 413)
    pictures: list[Tensor] = []
    for i, text in enumerate(found["images"]):
        room = min(limits.values, limits.total - sum(p.numel() for p in pictures))
        pictures.append(_picture(text, i, room))
    if not pictures or len({p.shape for p in pictures}) > 1:
        raise Refused("wanted at least one image, all of one size.")
    return Batch(torch.stack(pictures).float() / 255, found.get("prompts"), _rows(found.get("meta")))  # type: ignore[arg-type]


def _picture(text: Any, i: int, room: int) -> Tensor:
    """Decode one PNG; its header is believed on the size before its pixels are unpacked."""
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms.functional import pil_to_tensor

    if not isinstance(text, str):
        raise Refused(f"image {i} must be a base64 string.")
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if 3 * math.prod(image.size) > room:
                raise Refused(f"image {i} is too large: {room // 3} pixels are left for it.", 413)
            return pil_to_tensor(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise Refused(f"image {i} is too large.", 413) from error
    except (binascii.Error, UnidentifiedImageError) as error:
        raise Refused(f"image {i} is not a PNG in base64.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"image {i} is a broken PNG.") from error


def _decode_safetensors(body: bytes, limits: Limits) -> Batch:
    try:
        tensors = load_safetensors(body)
        length = int.from_bytes(body[:8], "little")
        header = json.loads(body[8 : 8 + length])["__metadata__"]
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise Refused("the body is not safetensors with prompts in its metadata.") from error
    if not isinstance(header, dict) or "media" not in tensors:
        raise Refused("wanted a tensor `media` and metadata `prompts`.")
    media = tensors.pop("media")
    if media.dtype == torch.uint8:
        media = media.float() / 255
    rows = _rows(_parse(header.get("meta", "null"), "meta"))
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        index, _, key = rest.partition(".")
        if (
            part != "meta"
            or not index.isascii()
            or not index.isdigit()
            or not key
            or rows is None
            or int(index) >= len(rows)
        ):
            raise Refused("tensors must be `media` or `meta.<sample>.<key>`, with a meta row for the sample.")
        rows[int(index)][key] = value
    return Batch(media, _parse(header.get("prompts", "null"), "prompts"), rows)


def _check(batch: Batch, limits: Limits) -> Batch:
    media, prompts = batch.media, batch.prompts
    if media.ndim not in (3, 4, 5) or not media.is_floating_point() or not media.numel():
        raise Refused("media must be non-empty floats (or bytes) of shape (B, 3, H, W), (B, F, 3, H, W) or (B, C, L).")
    if len(media) > limits.samples:
        raise Refused(f"at most {limits.samples} samples per request.", 413)
    if media[0].numel() > limits.values or media.numel() > limits.total:
        raise Refused(f"too large: at most {limits.values} values per sample, {limits.total} in all.", 413)
    if not isinstance(prompts, list) or len(prompts) != len(media) or not all(isinstance(p, str) for p in prompts):
        raise Refused(f"wanted {len(media)} prompts, one string per sample.")
    if max(map(len, prompts)) > limits.prompt:
        raise Refused(f"a prompt is too long: at most {limits.prompt} letters.", 413)
    if batch.meta is not None and len(batch.meta) != len(media):
        raise Refused(f"wanted {len(media)} rows of meta, or null.")
    return Batch(media.to(torch.promote_types(media.dtype, torch.float32)), prompts, batch.meta)
