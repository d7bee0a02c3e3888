"""Diffusion of pixels and of class labels: DDPM, DDIM, consistency models, DiT, latent diffusion, DeepFloyd IF."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, Case, make
from .dit_image import t5_side
from .media import mask, picture
from .stable_diffusion import BETAS, TEXT, unet
from .text import WIDTH, clip_text, clip_tokenizer
from .vaes import image_vae

RAW = {"output_type": "pt"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def unet2d(**extra: Any) -> diffusers.UNet2DModel:
    """Return a U-Net without text."""
    return diffusers.UNet2DModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            **extra,
        }
    )


def plain(name: str, solver: diffusers.SchedulerMixin) -> Case:
    """Return an unconditional pipeline."""
    return make(name, {"unet": unet2d(), "scheduler": solver}, {}, "image", "unconditional", **RAW)


def consistency() -> Case:
    """Return a consistency model, conditioned on a class."""
    net = unet2d(num_class_embeds=10)
    parts = {"unet": net, "scheduler": diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40)}
    return make("ConsistencyModel", parts, {"class_labels": 3}, "image", "consistency_models", **RAW)


def dit() -> Case:
    """Return DiT: a transformer conditioned on a class, which learns the variance too."""
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )
    parts = {"transformer": net, "vae": image_vae(), "scheduler": diffusers.DDIMScheduler()}
    return make("DiT", parts, {"class_labels": [3]}, "image", "dit", **RAW)


def latent_diffusion() -> Case:
    """Return the first latent diffusion from text."""
    net = unet()
    parts = {
        "unet": net,
        "vqvae": image_vae(),
        "bert": clip_text(),
        "tokenizer": clip_tokenizer(),
        "scheduler": diffusers.DDIMScheduler(**BETAS),
    }
    inputs = {"prompt": "a red circle", "guidance_scale": 5.0, "height": 64, "width": 64}
    return make("LDMTextToImage", parts, inputs, "image", "latent_diffusion", **RAW)


def super_resolution() -> Case:
    """Return latent super-resolution: the low resolution is a further input."""
    vae = diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=16,
    )
    parts = {"vqvae": vae, "unet": unet2d(in_channels=6), "scheduler": diffusers.DDIMScheduler(**BETAS)}
    return make("LDMSuperResolution", parts, {"image": picture(32)}, "image", "latent_diffusion", **RAW)


def deepfloyd(kind: str, inputs: dict[str, Any]) -> Case:
    """Return a stage of DeepFloyd IF: pixels, learned variance, dynamic thresholding."""
    large = "SuperResolution" in kind
    added = {"class_embed_type": "timestep"} if large else {}
    net = unet(
        sample_size=16,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=6 if large else 3,
        out_channels=6,
        encoder_hid_dim=WIDTH,
        cross_attention_dim=32,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        **added,
    )
    solver = diffusers.DDPMScheduler(**COSINE, thresholding=True, sample_max_value=1.5, variance_type="learned_range")
    parts = {
        **t5_side(),
        "unet": net,
        "scheduler": solver,
        "image_noising_scheduler": diffusers.DDPMScheduler(**COSINE),
        "requires_safety_checker": False,
    }
    inputs = TEXT | {"clean_caption": False} | inputs
    return make(f"IF{kind}", parts, inputs, "image", "deepfloyd_if", **RAW)


SMALL, LARGE = {"image": picture(8)}, {"original_image": picture(16)}
CHANGE = {"strength": 0.9}

BUILDERS: dict[str, Builder] = {
    "DDPM": lambda: plain("DDPM", diffusers.DDPMScheduler()),
    "DDIM": lambda: plain("DDIM", diffusers.DDIMScheduler()),
    "ConsistencyModel": consistency,
    "DiT": dit,
    "LDMTextToImage": latent_diffusion,
    "LDMSuperResolution": super_resolution,
    "IF": lambda: deepfloyd("", {}),
    "IFImg2Img": lambda: deepfloyd("Img2Img", {"image": picture()} | CHANGE),
    "IFInpainting": lambda: deepfloyd("Inpainting", {"image": picture(), "mask_image": mask()} | CHANGE),
    "IFSuperResolution": lambda: deepfloyd("SuperResolution", SMALL),
    "IFImg2ImgSuperResolution": lambda: deepfloyd("Img2ImgSuperResolution", SMALL | LARGE | CHANGE),
    "IFInpaintingSuperResolution": lambda: deepfloyd(
        "InpaintingSuperResolution", SMALL | LARGE | CHANGE | {"mask_image": mask()}
    ),
}
