"""Flux: embedded guidance, latents packed two by two, shift by resolution."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, make
from .media import picture
from .stable_diffusion import SIZE
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


BUILDERS: dict[str, Builder] = {
    "Flux": lambda: make("Flux", parts(), TEXT | SIZE, "image", "flux"),
    "FluxKontext": lambda: make("FluxKontext", parts(), TEXT | SIZE | KONTEXT, "image", "flux"),
}
