"""Flux: embedded guidance, latents packed two by two, shift by resolution."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, Case, make
from .media import mask, picture
from .stable_diffusion import CHANGE, SIZE
from .text import WIDTH, clip_text, clip_tokenizer, t5, t5_tokenizer
from .vaes import flow_vae

TEXT = {"prompt": "a red circle", "guidance_scale": 3.5, "max_sequence_length": 16}
KONTEXT = {"image": picture(), "max_area": 256, "_auto_resize": False}


def transformer(**extra: Any) -> diffusers.FluxTransformer2DModel:
    """Return one double and one single block."""
    return diffusers.FluxTransformer2DModel(
        **{
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "axes_dims_rope": (4, 6, 6),
            "guidance_embeds": True,
            **extra,
        }
    )


def flow_scheduler(**extra: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """Return the Euler solver with resolution-dependent shift, as Flux publishes it."""
    return diffusers.FlowMatchEulerDiscreteScheduler(
        **{
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            **extra,
        }
    )


def parts(**extra: Any) -> dict[str, Any]:
    """Return the components of Flux."""
    return {
        "transformer": transformer(),
        "vae": flow_vae(),
        "text_encoder": clip_text(),
        "text_encoder_2": t5(),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "scheduler": flow_scheduler(),
        **extra,
    }


def controlnet() -> diffusers.FluxControlNetModel:
    """Return a ControlNet of one double and one single block."""
    return diffusers.FluxControlNetModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 6, 6],
        guidance_embeds=True,
    )


def flux(name: str, inputs: dict[str, Any], **changed: Any) -> Case:
    """Return a pipeline of the Flux family with some components changed."""
    return make(name, parts(**changed), TEXT | inputs, "image", "flux")


def wide(channels: int) -> dict[str, Any]:
    """Return a transformer that reads further channels beside the latents and writes the usual 16."""
    return {"transformer": transformer(in_channels=channels, out_channels=16)}


HINT = SIZE | {"control_image": picture(phase=1.0)}
PAINT = {"mask_image": mask()}
CLOZE = {
    "task_prompt": "a picture [IMAGE1] to a drawing [IMAGE2]",
    "content_prompt": "a red circle",
    "image": [[picture(), picture(phase=1.0)], [picture(phase=2.0), None]],
    "guidance_scale": 3.5,
    "max_sequence_length": 16,
}

BUILDERS: dict[str, Builder] = {
    "Flux": lambda: flux("Flux", SIZE),
    "Flux_true_cfg": lambda: flux("Flux", SIZE | {"negative_prompt": "blurry", "true_cfg_scale": 2.0}),
    "FluxImg2Img": lambda: flux("FluxImg2Img", SIZE | CHANGE),
    "FluxInpaint": lambda: flux("FluxInpaint", SIZE | CHANGE | PAINT),
    "FluxKontext": lambda: flux("FluxKontext", SIZE | KONTEXT),
    "FluxKontextInpaint": lambda: flux("FluxKontextInpaint", SIZE | KONTEXT | PAINT | {"strength": 0.9}),
    "FluxControl": lambda: flux("FluxControl", HINT, **wide(32)),
    "FluxControlImg2Img": lambda: flux("FluxControlImg2Img", HINT | CHANGE, **wide(32)),
    "FluxControlInpaint": lambda: flux("FluxControlInpaint", HINT | CHANGE | PAINT, **wide(32)),
    "FluxFill": lambda: flux("FluxFill", SIZE | PAINT | {"image": picture()}, **wide(16 + 16 + 16)),
    "FluxControlNet": lambda: flux("FluxControlNet", HINT, controlnet=controlnet()),
    "FluxControlNetImg2Img": lambda: flux("FluxControlNetImg2Img", HINT | CHANGE, controlnet=controlnet()),
    "FluxControlNetInpaint": lambda: flux("FluxControlNetInpaint", HINT | CHANGE | PAINT, controlnet=controlnet()),
    "VisualClozeGeneration": lambda: make(
        "VisualClozeGeneration", parts(resolution=16, **wide(16 + 16 + 16)), CLOZE, "image", "visualcloze"
    ),
}
