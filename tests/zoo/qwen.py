"""Qwen-Image: text-to-image, image-to-image, inpainting, ControlNet, edit, layered."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, make
from .flux import flow_scheduler
from .llm import vlm_parts
from .media import mask, picture
from .text import WIDTH
from .vaes import qwen_vae

SIZE = {"height": 16, "width": 16}
TEXT = {"prompt": "a red circle", "negative_prompt": "blurry", "true_cfg_scale": 3.0, "max_sequence_length": 32}
CHANGE = {"image": picture(), "strength": 0.9}
ROPE = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}


def transformer(**extra: Any) -> diffusers.QwenImageTransformer2DModel:
    """Return two double-stream blocks."""
    return diffusers.QwenImageTransformer2DModel(
        **{"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": WIDTH, **ROPE, **extra}
    )


def solver() -> diffusers.FlowMatchEulerDiscreteScheduler:
    """Return the published solver: dynamic shift, stretched so that the last step ends at .02."""
    return flow_scheduler(shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)


def parts(**extra: Any) -> dict[str, Any]:
    """Return the components of Qwen-Image."""
    return {**vlm_parts(), "vae": qwen_vae(), "transformer": transformer(), "scheduler": solver(), **extra}


def edit_parts(**extra: Any) -> dict[str, Any]:
    """Return components for pictures resized to a megapixel: a thin autoencoder, 16 times smaller."""
    return parts(vae=qwen_vae(levels=5, base=2), **extra)


BUILDERS: dict[str, Builder] = {
    "QwenImage": lambda: make("QwenImage", parts(), TEXT | SIZE, "image", "qwen_image"),
    "QwenImageImg2Img": lambda: make("QwenImageImg2Img", parts(), TEXT | SIZE | CHANGE, "image", "qwen_image"),
    "QwenImageInpaint": lambda: make(
        "QwenImageInpaint", parts(), TEXT | SIZE | CHANGE | {"mask_image": mask()}, "image", "qwen_image"
    ),
    "QwenImageEdit": lambda: make(
        "QwenImageEdit",
        edit_parts(),
        TEXT | {"image": picture(32), "height": 64, "width": 64},
        "image",
        "qwen_image",
        notes="the picture is resized to a megapixel whatever its size",
    ),
    "QwenImageEditPlus": lambda: make(
        "QwenImageEditPlus",
        edit_parts(),
        TEXT | {"image": [picture(32)], "height": 64, "width": 64},
        "image",
        "qwen_image",
        notes="the picture is resized to a megapixel whatever its size",
    ),
}
