"""Stable Diffusion 1 and 2: U-Net diffusion in epsilon and v-prediction."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, Case, make
from .media import mask, picture
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

CHANGE = {"image": picture(), "strength": 0.9}


def sd(name: str, inputs: dict[str, Any], **changed: Any) -> Case:
    """Return a pipeline of the Stable Diffusion family with some components changed."""
    return make(name, parts(**changed), inputs, "image", "stable_diffusion")


def solved(solver: diffusers.SchedulerMixin, **more: float) -> Case:
    """Return Stable Diffusion with another solver, the ways of which the adapter must bear."""
    return sd("StableDiffusion", TEXT | SIZE | more, scheduler=solver)


BUILDERS: dict[str, Builder] = {
    "StableDiffusion": lambda: sd("StableDiffusion", TEXT | SIZE),
    "SD15_v_prediction": lambda: sd("StableDiffusion", TEXT | SIZE, scheduler=v_prediction()),
    "SD15_ddpm": lambda: solved(diffusers.DDPMScheduler(**BETAS)),
    "SD15_dpmpp": lambda: solved(diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True)),
    "SD15_dpmpp_sde": lambda: solved(diffusers.DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++")),
    "SD15_euler_ancestral": lambda: solved(diffusers.EulerAncestralDiscreteScheduler(**BETAS)),
    "SD15_heun": lambda: solved(diffusers.HeunDiscreteScheduler(**BETAS)),
    "SD15_tcd": lambda: solved(diffusers.TCDScheduler(**BETAS), eta=0.3),
    "SD15_ddim_eta": lambda: solved(diffusers.DDIMScheduler(**BETAS, clip_sample=False), eta=0.8),
    "SD15_dpm_sde": lambda: solved(diffusers.DPMSolverSDEScheduler(**BETAS)),
    "SD15_lcm": lambda: solved(diffusers.LCMScheduler(**BETAS)),
    "SD15_unipc": lambda: solved(diffusers.UniPCMultistepScheduler(**BETAS)),
    "StableDiffusionImg2Img": lambda: sd("StableDiffusionImg2Img", TEXT | CHANGE),
    "StableDiffusionInpaint": lambda: sd(
        "StableDiffusionInpaint", TEXT | SIZE | CHANGE | {"mask_image": mask()}, unet=unet(in_channels=9)
    ),
    "SD15_inpaint_4_channels": lambda: sd("StableDiffusionInpaint", TEXT | SIZE | CHANGE | {"mask_image": mask()}),
    "StableDiffusionInstructPix2Pix": lambda: sd(
        "StableDiffusionInstructPix2Pix",
        TEXT | {"image": picture(), "image_guidance_scale": 1.5},
        unet=unet(in_channels=8),
    ),
    "LatentConsistencyModel": lambda: make(
        "LatentConsistencyModel", consistency_parts(), LCM | SIZE, "image", "latent_consistency"
    ),
    "LatentConsistencyModelImg2Img": lambda: make(
        "LatentConsistencyModelImg2Img", consistency_parts(), LCM | CHANGE, "image", "latent_consistency"
    ),
}
