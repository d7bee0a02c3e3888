"""The youngest text-to-image families: Ernie, Ideogram 4, LongCat, GLM-Image, Qwen-Image 2.1, refiners."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .case import Builder, make
from .dit_image import BIG, byt5, euler
from .flux import flow_scheduler
from .llm import bpe_tokenizer, decoder, qwen25_vl, vlm3_parts, vlm_parts
from .media import picture
from .stable_diffusion import SIZE, TEXT
from .text import WIDTH
from .vaes import flow_vae, flux2_vae, image_vae

FLUX_LIKE: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1}
DEEP = 36  # blocks of the text encoder, of which a fixed choice is read


def ernie() -> dict[str, Any]:
    """Return the components of Ernie-Image; no prompt enhancer."""
    net = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=48,
        in_channels=8,
        out_channels=8,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    text = {"text_encoder": decoder("Qwen3"), "tokenizer": bpe_tokenizer()}
    return {**text, "vae": flux2_vae(), "transformer": net, **euler(4.0)}


def ideogram() -> dict[str, Any]:
    """Return the components of Ideogram 4: the unconditional branch is a network of its own."""

    def net() -> diffusers.Ideogram4Transformer2DModel:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=48,
            adaln_dim=16,
            llm_features_dim=13 * WIDTH,
            mrope_section=(4, 2, 2),
        )

    text = vlm3_parts(layers=DEEP)
    return {
        "text_encoder": text["text_encoder"].model,
        "tokenizer": text["tokenizer"],
        "transformer": net(),
        "unconditional_transformer": net(),
        "vae": flux2_vae(),
        **euler(),
    }


def longcat(thin: bool = False) -> dict[str, Any]:
    """Return the components of LongCat-Image; ``thin`` for pictures resized to a megapixel."""
    net = diffusers.LongCatImageTransformer2DModel(
        **FLUX_LIKE,
        in_channels=64,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 6, 6],
    )
    text = vlm_parts()
    vae = flow_vae(16, 6, block_out_channels=(4,) * 6) if thin else flow_vae(16)
    return {
        **text,
        "text_processor": text["processor"],
        "vae": vae,
        "transformer": net,
        "scheduler": flow_scheduler(),
    }


def glm() -> dict[str, Any]:
    """Return the components of GLM-Image without its autoregressive half, whose tokens the call gives."""
    net = diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=32,
    )
    glyphs = byt5()
    solver = flow_scheduler(shift=1.0, base_shift=0.25, max_shift=0.75, time_shift_type="linear")
    return {
        "text_encoder": glyphs["text_encoder_2"],
        "tokenizer": glyphs["tokenizer_2"],
        "transformer": net,
        "vae": image_vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        "scheduler": solver,
    }


def qwen21() -> dict[str, Any]:
    """Return the components of Qwen-Image 2.1: unpatched latents, 16 times smaller, four colour channels."""
    net = diffusers.QwenImage21Transformer2DModel(
        **FLUX_LIKE | {"num_layers": 2},
        in_channels=8,
        out_channels=8,
        context_in_dim=WIDTH,
        mlp_ratio=2,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    return {**vlm3_parts(), "vae": vae, "transformer": net, "scheduler": flow_scheduler()}


def refiner() -> dict[str, Any]:
    """Return the components of HunyuanImage's refiner, distilled with embedded guidance."""
    net = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1, 1),
        text_embed_dim=WIDTH,
        guidance_embeds=True,
        rope_axes_dim=(4, 4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    return {
        "text_encoder": qwen25_vl(layers=3),
        "tokenizer": bpe_tokenizer(),
        "vae": vae,
        "transformer": net,
        **euler(),
    }


GUIDED = TEXT | SIZE
ONE = {"prompt": "a red circle", "guidance_scale": 4.0}
PRIOR = {"prior_token_ids": torch.arange(64)[None] % 32}

BUILDERS: dict[str, Builder] = {
    "ErnieImage": lambda: make("ErnieImage", ernie(), TEXT | BIG, "image", "ernie_image"),
    "Ideogram4": lambda: make(
        "Ideogram4",
        ideogram(),
        ONE | SIZE | {"max_sequence_length": 32, "guidance_schedule": None},
        "image",
        "ideogram4",
    ),
    "LongCatImage": lambda: make(
        "LongCatImage", longcat(), GUIDED | {"enable_prompt_rewrite": False}, "image", "longcat_image"
    ),
    "LongCatImageEdit": lambda: make(
        "LongCatImageEdit",
        longcat(thin=True),
        TEXT | {"image": picture(32)},
        "image",
        "longcat_image",
        notes="the picture is resized to a megapixel whatever its size",
    ),
    "GlmImage": lambda: make(
        "GlmImage",
        glm(),
        ONE | BIG | PRIOR | {"prompt": 'a sign that says "red"'},
        "image",
        "glm_image",
        notes="the autoregressive half is given",
    ),
    "QwenImage21": lambda: make(
        "QwenImage21",
        qwen21(),
        {"prompt": "a red circle", "negative_prompt": "blurry", "true_cfg_scale": 3.0, "height": 64, "width": 64},
        "image",
        "qwen_image21",
    ),
    "HunyuanImageRefiner": lambda: make(
        "HunyuanImageRefiner",
        refiner(),
        {"prompt": "a red circle", "image": picture()} | SIZE,
        "image",
        "hunyuan_image",
    ),
}
