"""Stable Diffusion XL: two text encoders, size conditioning."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, Case, make
from .media import mask, picture
from .stable_diffusion import BETAS, CHANGE, SIZE, TEXT
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


def xl(name: str, inputs: dict[str, Any], **changed: Any) -> Case:
    """Return a pipeline of the SDXL family with some components changed."""
    return make(name, parts(**changed), TEXT | inputs, "image", "stable_diffusion_xl")


BUILDERS: dict[str, Builder] = {
    "StableDiffusionXL": lambda: xl("StableDiffusionXL", SIZE),
    "StableDiffusionXLImg2Img": lambda: xl("StableDiffusionXLImg2Img", CHANGE),
    "StableDiffusionXLInpaint": lambda: xl("StableDiffusionXLInpaint", SIZE | CHANGE | {"mask_image": mask()}),
    "SDXL_inpaint_9_channels": lambda: xl(
        "StableDiffusionXLInpaint", SIZE | CHANGE | {"mask_image": mask()}, unet=unet(in_channels=9)
    ),
    "StableDiffusionXLInstructPix2Pix": lambda: xl(
        "StableDiffusionXLInstructPix2Pix", SIZE | {"image": picture()}, unet=unet(in_channels=8)
    ),
}
