"""Stable Diffusion 3: a flow transformer with three text encoders."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, make
from .stable_diffusion import SIZE, TEXT
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


BUILDERS: dict[str, Builder] = {
    "StableDiffusion3": lambda: make("StableDiffusion3", parts(), TEXT | SIZE | SHORT, "image", "stable_diffusion_3"),
}
