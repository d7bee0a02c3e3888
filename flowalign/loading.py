"""``fa.load``: a demo world by name, or any diffusers pipeline."""

from __future__ import annotations

from typing import Any, cast

from flowalign.protocols import Pipeline

__all__ = ["load"]


def load(pipe: Any, call: dict[str, Any] | None = None, *, guided: bool = True, device: str = "auto") -> Pipeline:
    """Return a generator.

    Args:
        pipe: a demo world's name, a folder, a hub id, ``module:function`` of your own, or an instantiated pipeline.
        call: arguments of every call: ``height``, ``guidance_scale``, ...
        guided: whether the pipeline's guidance rule is on.
        device: where to load to; an instantiated pipeline stays where it is.

    Raises:
        ValueError: for a pipeline that does not exist, with the nearest names.
    """
    if isinstance(pipe, str):
        from flowalign.opening import open_pipeline, pick_device

        return open_pipeline(pipe, call or {}, [guided], pick_device(device))[0]
    from flowalign import pipelines

    return cast(Pipeline, pipelines.load(pipe, call, guided=guided))
