"""Video transformers, one or two pipelines a family: CogVideoX, HunyuanVideo, Mochi, ..."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, make
from .dit_image import euler, t5_side
from .llm import bpe_tokenizer, decoder
from .ltx import TEXT
from .stable_diffusion import BETAS, SIZE
from .text import WIDTH, clip_text, clip_tokenizer
from .vaes import hunyuan_video_vae

TEMPLATE = {"prompt_template": {"template": "describe the video: {}", "crop_start": 4}}


def cogvideox_vae() -> diffusers.AutoencoderKLCogVideoX:
    """Return an autoencoder of four levels, 8 times smaller in space and 4 in time."""
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4
    )


def cogvideox_transformer(channels: int = 4, **extra: Any) -> diffusers.CogVideoXTransformer3DModel:
    """Return two blocks that read ``channels`` latent channels."""
    return diffusers.CogVideoXTransformer3DModel(
        in_channels=channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
        **extra,
    )


def cogvideox(channels: int = 4, kind: Any = diffusers.CogVideoXDDIMScheduler, **extra: Any) -> dict[str, Any]:
    """Return the components of CogVideoX: v-prediction with zero terminal signal-to-noise ratio."""
    solver = kind(
        **BETAS | {"beta_schedule": "scaled_linear"}, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    transformer = cogvideox_transformer(channels)
    return {**t5_side(), "vae": cogvideox_vae(), "transformer": transformer, "scheduler": solver, **extra}


def hunyuan_transformer(**extra: Any) -> diffusers.HunyuanVideoTransformer3DModel:
    """Return one double and one single block, guidance embedded."""
    return diffusers.HunyuanVideoTransformer3DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "text_embed_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "rope_axes_dim": (4, 4, 4),
            **extra,
        }
    )


def hunyuan(**extra: Any) -> dict[str, Any]:
    """Return the components of HunyuanVideo: Llama and CLIP read the prompt."""
    return {
        "text_encoder": decoder("Llama", layers=3),
        "tokenizer": bpe_tokenizer(),
        "text_encoder_2": clip_text(),
        "tokenizer_2": clip_tokenizer(),
        "transformer": hunyuan_transformer(),
        "vae": hunyuan_video_vae(),
        **euler(7.0),
        **extra,
    }


def mochi() -> dict[str, Any]:
    """Return the components of Mochi, whose time runs from 0 to 1000."""
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=12,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    solver = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return {**t5_side(), "vae": vae, "transformer": transformer, "scheduler": solver}


def frames(count: int) -> dict[str, int]:
    """Return the size of a clip."""
    return SIZE | {"num_frames": count}


BUILDERS: dict[str, Builder] = {
    "CogVideoX": lambda: make("CogVideoX", cogvideox(), TEXT | frames(9), "video", "cogvideox"),
    "CogVideoX_dpm": lambda: make(
        "CogVideoX", cogvideox(kind=diffusers.CogVideoXDPMScheduler), TEXT | frames(9), "video", "cogvideox", steps=4
    ),
    "HunyuanVideo": lambda: make(
        "HunyuanVideo",
        hunyuan(),
        {"prompt": "a red circle moving", "guidance_scale": 6.0, "max_sequence_length": 16} | TEMPLATE | frames(5),
        "video",
        "hunyuan_video",
    ),
    "Mochi": lambda: make("Mochi", mochi(), TEXT | frames(7), "video", "mochi"),
}
