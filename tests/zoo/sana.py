"""Sana: linear attention on images and video, few-step distillation, ControlNet."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, Case, make
from .dit_image import BIG, CFG, NO_BINS, euler
from .llm import bpe_tokenizer, decoder
from .media import picture
from .text import WIDTH
from .vaes import wan_vae


def deep_vae() -> diffusers.AutoencoderDC:
    """Return Sana's deep-compression autoencoder, two levels of it."""
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (3,)),
        decoder_qkv_multiscales=((), (3,)),
        scaling_factor=0.4,
    )


SHAPE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": WIDTH,
}


def sana_transformer(**extra: Any) -> diffusers.SanaTransformer2DModel:
    """Return two linear-attention blocks."""
    return diffusers.SanaTransformer2DModel(**SHAPE, num_layers=2, sample_size=16, **extra)


def sana(**extra: Any) -> dict[str, Any]:
    """Return the components of Sana, whose text encoder is Gemma 2."""
    solver = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    text = {"text_encoder": decoder("Gemma2"), "tokenizer": bpe_tokenizer()}
    return {**text, "vae": deep_vae(), "transformer": sana_transformer(), "scheduler": solver, **extra}


SANA_CALL = CFG | NO_BINS | BIG | {"complex_human_instruction": ["a picture of"]}
SPRINT_CALL = {key: value for key, value in SANA_CALL.items() if key != "negative_prompt"}
VIDEO_CALL = SANA_CALL | {"frames": 5}


def sprint() -> dict[str, Any]:
    """Return the components of Sana Sprint: trigonometric flow, one to four steps, guidance embedded."""
    net = sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return sana(transformer=net, scheduler=diffusers.SCMScheduler())


def controlnet() -> diffusers.SanaControlNetModel:
    """Return a ControlNet of one block."""
    return diffusers.SanaControlNetModel(**SHAPE, num_layers=1, sample_size=16)


def video() -> dict[str, Any]:
    """Return the components of Sana Video."""
    net = diffusers.SanaVideoTransformer3DModel(
        **SHAPE
        | {
            "in_channels": 16,
            "out_channels": 16,
            "attention_head_dim": 12,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
        },
        num_layers=2,
        sample_size=4,
        rope_max_seq_len=32,
    )
    return sana(transformer=net, vae=wan_vae(), **euler(8.0))


def sana_case(kind: str, given: dict[str, Any], inputs: dict[str, Any], modality: str = "image") -> Case:
    """Return a pipeline of the Sana family."""
    return make(f"Sana{kind}", given, inputs, modality, "sana_video" if modality == "video" else "sana")


CHANGE = {"image": picture(32), "strength": 0.9}

BUILDERS: dict[str, Builder] = {
    "Sana": lambda: sana_case("", sana(), SANA_CALL),
    "SanaPAG": lambda: sana_case("PAG", sana(), SANA_CALL | {"pag_scale": 2.0}),
    "SanaControlNet": lambda: sana_case(
        "ControlNet", sana(controlnet=controlnet()), SANA_CALL | {"control_image": picture(32)}
    ),
    "SanaSprint": lambda: sana_case("Sprint", sprint(), SPRINT_CALL),
    "SanaSprintImg2Img": lambda: sana_case(
        "SprintImg2Img", sprint(), SPRINT_CALL | CHANGE | {"intermediate_timesteps": None}
    ),
    "SanaVideo": lambda: sana_case("Video", video(), VIDEO_CALL, "video"),
    "SanaImageToVideo": lambda: sana_case("ImageToVideo", video(), VIDEO_CALL | {"image": picture(32)}, "video"),
}
