"""Stable Diffusion XL: two text encoders, size conditioning."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, make
from .stable_diffusion import BETAS, SIZE, TEXT
from .stable_diffusion import unet as sd_unet
from .text import WIDTH, clip_text, clip_tokenizer
from .vaes import image_vae


def unet(**extra: Any) -> diffusers.UNet2DConditionModel:
    """Return a U-Net with the pooled text and six sizes as added conditions."""
    return sd_unet(
        **{
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
            "cross_attention_dim": 2 * WIDTH,
            **extra,
        }
    )


def parts(**extra: Any) -> dict[str, Any]:
    """Return the components of SDXL."""
    return {
        "unet": unet(),
        "vae": image_vae(),
        "text_encoder": clip_text(),
        "text_encoder_2": clip_text(projection=WIDTH),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        "add_watermarker": False,
        **extra,
    }


BUILDERS: dict[str, Builder] = {
    "StableDiffusionXL": lambda: make("StableDiffusionXL", parts(), TEXT | SIZE, "image", "stable_diffusion_xl"),
}
