"""Text-to-image transformers, one or two pipelines a family: PixArt, Sana, Chroma, Lumina 2, CogView 4, ..."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers as tf

from .case import Builder, make
from .flux import flow_scheduler
from .llm import bpe_tokenizer, decoder, qwen25_vl
from .sd3 import SHORT
from .stable_diffusion import BETAS, CHANGE, SIZE, TEXT
from .text import HEADS, WIDTH, t5, t5_tokenizer
from .vaes import flow_vae, image_vae

BIG = {"height": 32, "width": 32}
NO_BINS = {"use_resolution_binning": False}
CFG = TEXT | SIZE | SHORT


def t5_side() -> dict[str, Any]:
    """Return a T5 encoder and its tokenizer."""
    return {"text_encoder": t5(), "tokenizer": t5_tokenizer()}


def euler(shift: float = 3.0) -> dict[str, Any]:
    """Return the flow Euler solver as a component."""
    return {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)}


def pixart(**extra: Any) -> dict[str, Any]:
    """Return the components of PixArt; half of the output channels are a variance that is cut off."""
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
    )
    solver = diffusers.DPMSolverMultistepScheduler(**BETAS)
    return {**t5_side(), "vae": image_vae(), "transformer": transformer, "scheduler": solver, **extra}


def chroma(**extra: Any) -> dict[str, Any]:
    """Return the components of Chroma: Flux with its modulations made by one small network."""
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=1,
    )
    return {**t5_side(), "vae": flow_vae(), "transformer": transformer, "scheduler": flow_scheduler(), **extra}


def lumina2() -> dict[str, Any]:
    """Return the components of Lumina 2."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(128, 32, 32),
        cap_feat_dim=WIDTH,
    )
    text = {"text_encoder": decoder("Gemma2"), "tokenizer": bpe_tokenizer()}
    return {**text, "vae": flow_vae(), "transformer": transformer, **euler(6.0)}


def cogview4_transformer(channels: int = 4) -> diffusers.CogView4Transformer2DModel:
    """Return two blocks that read ``channels`` latent channels."""
    return diffusers.CogView4Transformer2DModel(
        in_channels=channels,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=12,
        condition_dim=6,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )


def cogview4(channels: int = 4) -> dict[str, Any]:
    """Return the components of CogView 4, whose text encoder is GLM."""
    solver = flow_scheduler(shift=1.0, base_shift=0.25, max_shift=0.75, time_shift_type="linear")
    text = {"text_encoder": decoder("Glm", head="ForCausalLM"), "tokenizer": bpe_tokenizer()}
    return {**text, "vae": image_vae(), "transformer": cogview4_transformer(channels), "scheduler": solver}


def byt5() -> dict[str, Any]:
    """Return the byte-level encoder that reads the glyphs to be written into a picture."""
    config = tf.T5Config(
        vocab_size=384, d_model=WIDTH, d_kv=8, d_ff=24, num_heads=HEADS, num_layers=1, feed_forward_proj="gated-gelu"
    )
    return {"text_encoder_2": tf.T5EncoderModel(config), "tokenizer_2": tf.ByT5Tokenizer()}


def hunyuan_image() -> dict[str, Any]:
    """Return the components of HunyuanImage 2.1 with its two guider objects."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.5,
    )
    guiders = {
        key: diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1)
        for key in ("guider", "ocr_guider")
    }
    text = {"text_encoder": qwen25_vl(), "tokenizer": bpe_tokenizer()}
    return {**text, **byt5(), **guiders, "vae": vae, "transformer": transformer, **euler(5.0)}


BUILDERS: dict[str, Builder] = {
    "PixArtAlpha": lambda: make("PixArtAlpha", pixart(), CFG | NO_BINS, "image", "pixart"),
    "PixArtSigma": lambda: make("PixArtSigma", pixart(), CFG | NO_BINS, "image", "pixart"),
    "PixArtSigmaPAG": lambda: make("PixArtSigmaPAG", pixart(), CFG | NO_BINS | {"pag_scale": 2.0}, "image", "pixart"),
    "Chroma": lambda: make("Chroma", chroma(), CFG, "image", "chroma"),
    "ChromaImg2Img": lambda: make("ChromaImg2Img", chroma(), CFG | CHANGE, "image", "chroma"),
    "Lumina2": lambda: make("Lumina2", lumina2(), TEXT | BIG | {"max_sequence_length": 128}, "image", "lumina2"),
    "CogView4": lambda: make("CogView4", cogview4(), CFG, "image", "cogview4"),
    "HunyuanImage": lambda: make(
        "HunyuanImage",
        hunyuan_image(),
        {"prompt": 'a red circle, "one"', "negative_prompt": "blurry"} | SIZE,
        "image",
        "hunyuan_image",
        notes="guider objects keep a momentum from step to step",
    ),
}
