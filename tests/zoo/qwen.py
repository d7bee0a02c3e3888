"""Qwen-Image: text-to-image, image-to-image, inpainting, ControlNet, edit, layered."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, Case, make
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
    return parts(vae=qwen_vae(levels=5, base=2, blocks=0), **extra)


def controlnet(extra: int = 0) -> diffusers.QwenImageControlNetModel:
    """Return a ControlNet of one block; ``extra`` channels are packed with the hint."""
    return diffusers.QwenImageControlNetModel(
        in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=WIDTH, extra_condition_channels=extra, **ROPE
    )


def layered() -> dict[str, Any]:
    """Return the components of the layered variant: four colour channels, a token type for each layer.

    The latents must not have four channels too: four would be taken for latents and not be encoded.
    """
    net = transformer(in_channels=24, out_channels=6, use_additional_t_cond=True, use_layer3d_rope=True)
    return parts(vae=qwen_vae(latent=6, levels=5, base=2, blocks=0, input_channels=4), transformer=net)


def qwen(name: str, given: dict[str, Any], inputs: dict[str, Any], notes: str = "", **rest: Any) -> Case:
    """Return a pipeline of the Qwen-Image family."""
    return make(f"QwenImage{name}", given, TEXT | inputs, "image", "qwen_image", notes=notes, **rest)


MEGA = "the picture is resized to a megapixel whatever its size"
HINT = SIZE | {"control_image": picture(phase=1.0)}
EDIT = {"image": picture(32), "height": 64, "width": 64}
LAYERS = {"image": picture(32).convert("RGBA"), "layers": 1}

BUILDERS: dict[str, Builder] = {
    "QwenImage": lambda: qwen("", parts(), SIZE),
    "QwenImageImg2Img": lambda: qwen("Img2Img", parts(), SIZE | CHANGE),
    "QwenImageInpaint": lambda: qwen("Inpaint", parts(), SIZE | CHANGE | {"mask_image": mask()}),
    "QwenImageControlNet": lambda: qwen("ControlNet", parts(controlnet=controlnet()), HINT),
    "QwenImageControlNetInpaint": lambda: qwen(
        "ControlNetInpaint", parts(controlnet=controlnet(extra=4)), HINT | {"control_mask": mask()}
    ),
    "QwenImageEdit": lambda: qwen("Edit", edit_parts(), EDIT, MEGA),
    "QwenImageEditPlus": lambda: qwen("EditPlus", edit_parts(), EDIT | {"image": [picture(32)]}, MEGA),
    "QwenImageEditInpaint": lambda: qwen(
        "EditInpaint", edit_parts(), EDIT | {"mask_image": mask(32), "strength": 0.9}, MEGA
    ),
    "QwenImageLayered": lambda: qwen(
        "Layered", layered(), LAYERS, "the picture is resized to 640 x 640", output_type="pt"
    ),
}
