"""Stable Diffusion 1 and 2: U-Net diffusion in epsilon and v-prediction."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, make
from .text import WIDTH, clip_text, clip_tokenizer
from .vaes import image_vae

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE = {"height": 16, "width": 16}
TEXT = {"prompt": "a red circle", "negative_prompt": "blurry", "guidance_scale": 5.0}


def unet(**extra: Any) -> diffusers.UNet2DConditionModel:
    """Return a U-Net of two levels that reads text."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            **extra,
        }
    )


def parts(**extra: Any) -> dict[str, Any]:
    """Return the components of Stable Diffusion 1.5."""
    return {
        "unet": unet(),
        "vae": image_vae(),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "scheduler": diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        "requires_safety_checker": False,
        **extra,
    }


def v_prediction() -> diffusers.DDIMScheduler:
    """Return the scheduler of a v-prediction model with zero terminal signal-to-noise ratio."""
    return diffusers.DDIMScheduler(
        **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )


def consistency_parts() -> dict[str, Any]:
    """Return the components of a latent consistency model: guidance is embedded like a time."""
    return parts(unet=unet(time_cond_proj_dim=8), scheduler=diffusers.LCMScheduler(**BETAS))


LCM = {"prompt": "a red circle", "guidance_scale": 8.0, "original_inference_steps": 50}

BUILDERS: dict[str, Builder] = {
    "LatentConsistencyModel": lambda: make(
        "LatentConsistencyModel", consistency_parts(), LCM | SIZE, "image", "latent_consistency"
    ),
    "StableDiffusion": lambda: make("StableDiffusion", parts(), TEXT | SIZE, "image", "stable_diffusion"),
    "SD15_v_prediction": lambda: make(
        "StableDiffusion", parts(scheduler=v_prediction()), TEXT | SIZE, "image", "stable_diffusion"
    ),
}
