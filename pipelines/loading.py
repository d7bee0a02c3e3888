"""``load``: a pipeline object, a local folder or a hub id in; a generator out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowalign.pipelines.adapter import Adapter
from flowalign.protocols import Modality

__all__ = ["load"]


def load(
    pipe: Any,
    call: Mapping[str, Any] | None = None,
    *,
    modality: Modality | None = None,
    guided: bool = True,
    check: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantization: Any = None,
) -> Adapter:
    """Wrap any diffusers pipeline.

    Args:
        pipe: an instantiated pipeline, a folder written by ``save_pretrained``, or a hub id.
        call: arguments of every call: ``height``, ``width``, ``guidance_scale``, ``num_frames``, ...
        modality: what it makes; guessed when None.
        guided: whether the pipeline's guidance rule is on.
        check: run two steps of the stock call against the adapter; now if a prompt is all that the pipeline needs, else
            at the first :meth:`~flowalign.pipelines.adapter.Adapter.encode`. The answer is ``generator.verdict``.
        dtype: precision to load in (folder or id).
        device: where to load to (folder or id).
        quantization: diffusers' own ``PipelineQuantizationConfig`` (bitsandbytes, quanto, torchao, GGUF), handed to
            ``from_pretrained`` (folder or id).

    Raises:
        ValueError: for a folder that does not exist or holds no pipeline, or dtype, device and quantization with an
            instantiated one.
        TypeError: for something that is no pipeline.
    """
    import diffusers

    if isinstance(pipe, str | Path):
        pipe = _read(pipe, dtype, quantization)
        pipe = pipe if device is None else pipe.to(device)
    elif dtype is not None or device is not None or quantization is not None:
        raise ValueError(
            "dtype, device and quantization are for pipelines loaded here; move an instantiated one yourself, "
            "pipe.to(...), and quantise it with memory.apply(generator, Memory(quantize='int8'))."
        )
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise TypeError(f"load() takes a diffusers pipeline, a folder or a hub id; got {type(pipe).__name__}.")
    adapter = Adapter(pipe, call, modality, guided, check=check)
    if check and not adapter.needs_inputs():
        adapter.examine()
    return adapter


def _read(source: str | Path, dtype: torch.dtype | None, quantization: Any) -> Any:
    from diffusers import DiffusionPipeline

    import flowalign.pipelines.schedulers  # noqa: F401 - diffusers finds a saved scheduler of ours only if imported

    path = Path(source)
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"{path} holds no model_index.json, so it is not a diffusers pipeline. Give the folder that "
                "pipe.save_pretrained wrote, not one of its components."
            )
    elif str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {source}, and it is no hub id (owner/name) either.")
    options = {"torch_dtype": dtype, "quantization_config": quantization}
    options = {k: v for k, v in options.items() if v is not None}
    return DiffusionPipeline.from_pretrained(str(source), **options)
