"""Flux 2 and its Klein variants: one or more reference pictures in the sequence."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers as tf

from .case import Builder, make
from .llm import bpe_tokenizer, decoder, mistral3
from .media import mask, picture
from .stable_diffusion import SIZE
from .text import WIDTH
from .vaes import flux2_vae

TEXT = {"prompt": "a red circle", "max_sequence_length": 384, "text_encoder_out_layers": (0, 1)}


def transformer(**extra: Any) -> diffusers.Flux2Transformer2DModel:
    """Return one double and one single block; the text is two stacked layers wide."""
    return diffusers.Flux2Transformer2DModel(
        **{
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 2 * WIDTH,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
            **extra,
        }
    )


def pixtral() -> tf.PixtralProcessor:
    """Return the processor of Mistral 3, of which only the text half is used here."""
    tokenizer = bpe_tokenizer(image="[IMG]")
    return tf.PixtralProcessor(
        image_processor=tf.PixtralImageProcessor(size={"longest_edge": 28}, patch_size=14),
        tokenizer=tokenizer,
        patch_size=14,
        chat_template=tokenizer.chat_template,
    )


def base() -> dict[str, Any]:
    """Return what all variants share."""
    solver = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {"vae": flux2_vae(), "scheduler": solver}


def klein(guided: bool = False) -> dict[str, Any]:
    """Return the components of Klein, whose text encoder is Qwen 3 and which has no guidance embedding."""
    text = {"text_encoder": decoder("Qwen3", head="ForCausalLM"), "tokenizer": bpe_tokenizer()}
    return {**base(), **text, "transformer": transformer(guidance_embeds=False), "is_distilled": not guided}


def dev() -> dict[str, Any]:
    """Return the components of Flux 2 [dev]."""
    return {**base(), "text_encoder": mistral3(), "tokenizer": pixtral(), "transformer": transformer()}


BUILDERS: dict[str, Builder] = {
    "Flux2": lambda: make("Flux2", dev(), TEXT | SIZE | {"guidance_scale": 4.0}, "image", "flux2"),
    "Flux2_edit": lambda: make(
        "Flux2", dev(), TEXT | SIZE | {"guidance_scale": 4.0, "image": picture(64)}, "image", "flux2"
    ),
    "Flux2Klein": lambda: make(
        "Flux2Klein", klein(guided=True), TEXT | SIZE | {"guidance_scale": 4.0}, "image", "flux2"
    ),
    "Flux2KleinInpaint": lambda: make(
        "Flux2KleinInpaint",
        klein(guided=True),
        TEXT | SIZE | {"guidance_scale": 4.0, "image": picture(), "mask_image": mask(), "strength": 0.9},
        "image",
        "flux2",
    ),
    "Flux2KleinKV": lambda: make(
        "Flux2KleinKV",
        klein(),
        TEXT | SIZE | {"image": picture(64)},
        "image",
        "flux2",
        notes="keys and values of the picture are cached in the first iteration",
    ),
}
