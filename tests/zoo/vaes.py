"""Tiny autoencoders."""

from __future__ import annotations

from typing import Any

import diffusers

__all__ = ["image_vae", "wan_vae"]


def image_vae(latent: int = 4, levels: int = 2, **extra: Any) -> diffusers.AutoencoderKL:
    """Return an AutoencoderKL that shrinks an image by ``2 ** (levels - 1)``."""
    return diffusers.AutoencoderKL(
        **{
            "latent_channels": latent,
            "block_out_channels": (8,) * levels,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_size": 16,
            **extra,
        }
    )


def flow_vae(latent: int = 4, levels: int = 2, **extra: Any) -> diffusers.AutoencoderKL:
    """Return an AutoencoderKL as SD3 and Flux use it: shifted, without the quantisation convolutions."""
    shifted = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06, "scaling_factor": 1.5}
    return image_vae(latent, levels, **{**shifted, **extra})


def wan_vae(latent: int = 16, **extra: Any) -> diffusers.AutoencoderKLWan:
    """Return the causal video autoencoder of Wan: 8 times smaller in space, 4 times in time."""
    return diffusers.AutoencoderKLWan(
        **{
            "base_dim": 4,
            "z_dim": latent,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
            **extra,
        }
    )


def qwen_vae(
    latent: int = 4, levels: int = 2, base: int = 4, blocks: int = 1, **extra: Any
) -> diffusers.AutoencoderKLQwenImage:
    """Return the autoencoder of Qwen-Image, which shrinks by ``2 ** (levels - 1)``; latents are not normalised."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=base,
        z_dim=latent,
        dim_mult=[1] * levels,
        num_res_blocks=blocks,
        temperal_downsample=[False] * (levels - 1),
        latents_mean=[0.1] * latent,
        latents_std=[1.5] * latent,
        **extra,
    )


def hunyuan_video_vae(latent: int = 4, **extra: Any) -> diffusers.AutoencoderKLHunyuanVideo:
    """Return the causal video autoencoder of HunyuanVideo: 4 times smaller in space and in time."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=latent,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        **extra,
    )


def flux2_vae() -> diffusers.AutoencoderKLFlux2:
    """Return the autoencoder of Flux 2, whose latents are packed 2x2 and normalised by running statistics."""
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=16,
    )


def deep_wan_vae(latent: int = 16) -> diffusers.AutoencoderKLWan:
    """Return a Wan autoencoder 32 times smaller in space, for pipelines that insist on a megapixel."""
    return wan_vae(
        latent,
        base_dim=2,
        num_res_blocks=0,
        dim_mult=[1] * 6,
        temperal_downsample=[False, False, False, True, True],
        scale_factor_spatial=32,
    )
