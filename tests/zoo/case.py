"""What a case of the zoo is, and how one is put together.

A case is a tiny pipeline plus the keyword arguments of one call. Every parameter is drawn anew from the seed
(:func:`draw`), because the initialisation of a library is not ours to trust: some gates start at zero, so that no
gradient passes them, and some tensors are left as the memory allocator gave them, so that no seed repeats them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import torch
from torch import nn

__all__ = ["Builder", "Case", "assemble", "draw", "make"]


@dataclass(frozen=True)
class Case:
    """One tiny pipeline and one call of it.

    Attributes:
        pipe: An ordinary diffusers pipeline, float32, on CPU, in eval mode.
        inputs: Keyword arguments of the call: prompt, sizes, guidance, images. ``num_inference_steps``, ``generator``
            and ``output_type`` are left to the caller.
        modality: What comes out.
        family: The model family, several pipeline classes share one.
        notes: What is odd about this case.
        output_type: The value of ``output_type`` that leaves the result undecoded; ``"pt"`` where the pipeline works
            on pixels or has no way to hand out latents.
        steps: The number of steps with which the call is known to work.
    """

    pipe: diffusers.DiffusionPipeline
    inputs: Mapping[str, Any]
    modality: Literal["image", "video", "audio"]
    family: str
    notes: str = ""
    output_type: str = "latent"
    steps: int = field(default=2)


Builder = Callable[[], Case]


def draw(module: nn.Module) -> None:
    """Draw every parameter anew: matrices with variance 1 / fan-in, scales near one, biases and gates small.

    Args:
        module: Changed in place, from torch's global generator.
    """
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape)
        last = name.rsplit(".", 1)[-1]
        if value.numel() == value.shape[:1].numel() and last in ("weight", "gamma", "scale", "original0", "weight_g"):
            noise = 1 + 0.1 * noise  # a norm's scale
        elif value.ndim < 2:
            noise = 0.1 * noise  # biases, gates, temperatures
        else:
            noise = noise / value[0].numel() ** 0.5
        value.data.copy_(noise)


def assemble(name: str, parts: Mapping[str, Any]) -> diffusers.DiffusionPipeline:
    """Instantiate the pipeline class ``name`` from those of ``parts`` that it takes, all parameters drawn.

    Args:
        name: Class name in diffusers.
        parts: Components by name; a superset is fine. Required ones that are missing are passed as None, as
            ``from_pretrained`` does for a repository without them.
    """
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    given = {key: value for key, value in parts.items() if key in known}
    empty = {
        key: None
        for key, value in known.items()
        if key not in given and key not in ("self", "args", "kwargs") and value.default is inspect.Parameter.empty
    }
    for part in given.values():
        for module in part if isinstance(part, list | tuple) else [part]:
            if isinstance(module, nn.Module):
                draw(module)
    pipe = kind(**given, **empty)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(
    name: str, parts: Mapping[str, Any], inputs: Mapping[str, Any], modality: str, family: str, **rest: Any
) -> Case:
    """Shorthand of the family files: ``name`` without "Pipeline", see :func:`assemble` and :class:`Case`."""
    if "strength" in inputs:
        rest = {"steps": 3, **rest}  # the first is skipped
    pipe = assemble(name if "Pipeline" in name else f"{name}Pipeline", parts)
    return Case(pipe=pipe, inputs=dict(inputs), modality=modality, family=family, **rest)
