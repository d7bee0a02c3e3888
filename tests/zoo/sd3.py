"""Stable Diffusion 3: a flow transformer with three text encoders."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, Case, make
from .media import mask, picture
from .stable_diffusion import CHANGE, SIZE, TEXT
from .text import WIDTH, clip_text, clip_tokenizer, t5, t5_tokenizer
from .vaes import flow_vae

NARROW = WIDTH // 2
SHORT = {"max_sequence_length": 16}


def transformer(**extra: Any) -> diffusers.SD3Transformer2DModel:
    """Return two joint blocks, the second of which is the last and has no text output."""
    return diffusers.SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
            **extra,
        }
    )


def parts(**extra: Any) -> dict[str, Any]:
    """Return the components of SD3; both CLIP towers side by side are as wide as T5."""
    return {
        "transformer": transformer(),
        "vae": flow_vae(),
        "text_encoder": clip_text(NARROW, projection=NARROW),
        "text_encoder_2": clip_text(NARROW, projection=NARROW),
        "text_encoder_3": t5(),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": t5_tokenizer(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **extra,
    }


def controlnet(extra: int = 0) -> diffusers.SD3ControlNetModel:
    """Return a ControlNet of one block that reads ``extra`` channels besides the latents."""
    return diffusers.SD3ControlNetModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        extra_conditioning_channels=extra,
        qk_norm="rms_norm",
    )


def sd3(name: str, inputs: dict[str, Any], **changed: Any) -> Case:
    """Return a pipeline of the SD3 family with some components changed."""
    return make(name, parts(**changed), TEXT | SHORT | SIZE | inputs, "image", "stable_diffusion_3")


HINT = {"control_image": picture(phase=1.0)}

BUILDERS: dict[str, Builder] = {
    "StableDiffusion3": lambda: sd3("StableDiffusion3", {}),
    "SD3_skip_layer": lambda: sd3("StableDiffusion3", {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.6}),
    "SD3_heun": lambda: sd3("StableDiffusion3", {}, scheduler=diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
    "SD3_stochastic": lambda: sd3(
        "StableDiffusion3",
        {},
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
    ),
    "StableDiffusion3Img2Img": lambda: sd3("StableDiffusion3Img2Img", CHANGE),
    "StableDiffusion3Inpaint": lambda: sd3(
        "StableDiffusion3Inpaint",
        CHANGE | {"mask_image": mask()},
        transformer=transformer(in_channels=16, out_channels=16),  # 16 or 33 is checked
        vae=flow_vae(latent=16),
    ),
    "StableDiffusion3PAG": lambda: sd3("StableDiffusion3PAG", {"pag_scale": 2.0}),
    "StableDiffusion3PAGImg2Img": lambda: sd3("StableDiffusion3PAGImg2Img", CHANGE | {"pag_scale": 2.0}),
    "StableDiffusion3ControlNet": lambda: sd3("StableDiffusion3ControlNet", HINT, controlnet=controlnet()),
    "StableDiffusion3ControlNetInpainting": lambda: sd3(
        "StableDiffusion3ControlNetInpainting", HINT | {"control_mask": mask()}, controlnet=controlnet(extra=1)
    ),
}
