"""LTX and LTX 2: video, and video with sound."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.ltx2 import LTX2HDRReferenceCondition, LTX2VideoCondition
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from .case import Builder, Case, make
from .dit_image import euler, t5_side
from .llm import bpe_tokenizer, gemma3
from .media import picture, waves
from .text import WIDTH

TEXT = {"prompt": "a red circle moving", "negative_prompt": "blurry", "guidance_scale": 3.0, "max_sequence_length": 16}
FRAMES = {"height": 32, "width": 32, "num_frames": 9, "frame_rate": 8.0}


def video_vae() -> diffusers.AutoencoderKLLTXVideo:
    """Return an autoencoder of two levels, 8 times smaller in space (with patches of 2) and 4 in time."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=2,
    )


def parts(**extra: Any) -> dict[str, Any]:
    """Return the components of LTX."""
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=WIDTH,
    )
    return {**t5_side(), "vae": video_vae(), "transformer": transformer, **euler(), **extra}


def connectors() -> LTX2TextConnectors:
    """Return the two small networks that turn all layers of Gemma into a video and an audio context."""
    tower = {
        f"{kind}_connector_{key}": value
        for kind in ("video", "audio")
        for key, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    return LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=3, connector_rope_base_seq_len=16, rope_type="split", **tower
    )


def transformer2(**extra: Any) -> diffusers.LTX2VideoTransformer3DModel:
    """Return two blocks with a video stream and a narrower audio stream."""
    return diffusers.LTX2VideoTransformer3DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": WIDTH,
            "rope_type": "split",
            **extra,
        }
    )


def video_vae2() -> diffusers.AutoencoderKLLTX2Video:
    """Return an autoencoder of two levels, 8 times smaller in space (with patches of 2) and 4 in time."""
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=2,
        decoder_causal=False,
    )


def audio_vae() -> diffusers.AutoencoderKLLTX2Audio:
    """Return an autoencoder of mel spectrograms with 8 bins."""
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=16, latent_channels=2, mel_bins=8
    )


def vocoder() -> LTX2Vocoder:
    """Return the network from mel spectrograms to stereo sound."""
    return LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
        output_sampling_rate=16000,
    )


def parts2(**extra: Any) -> dict[str, Any]:
    """Return the components of LTX 2."""
    return {
        "text_encoder": gemma3(),
        "tokenizer": bpe_tokenizer(),
        "connectors": connectors(),
        "transformer": transformer2(),
        "vae": video_vae2(),
        "audio_vae": audio_vae(),
        "vocoder": vocoder(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
        **extra,
    }


def condition(**extra: Any) -> LTX2VideoCondition:
    """Return a picture to stand at the start of a clip, not recompressed."""
    return LTX2VideoCondition(frames=picture(32), index=0, strength=1.0, crf=0, **extra)


def reference() -> dict[str, Any]:
    """Return a picture as the reference of the tone-mapping variant."""
    return {"reference_conditions": LTX2HDRReferenceCondition(frames=waves(32, 32)[None], strength=1.0)}


STG = {"spatio_temporal_guidance_blocks": [1]}


def second(name: str, inputs: dict[str, Any]) -> Case:
    """Return a conditioned pipeline of LTX 2."""
    return make(name, parts2(), TEXT | FRAMES | inputs, "video", "ltx2", notes="video and sound, two schedulers")


BUILDERS: dict[str, Builder] = {
    "LTX": lambda: make("LTX", parts(), TEXT | FRAMES, "video", "ltx"),
    "LTXImageToVideo": lambda: make(
        "LTXImageToVideo", parts(), TEXT | FRAMES | {"image": picture(32)}, "video", "ltx", notes="first frame pinned"
    ),
    "LTX2": lambda: make(
        "LTX2", parts2(), TEXT | FRAMES | STG, "video", "ltx2", notes="video and sound, two schedulers"
    ),
    "LTX2ImageToVideo": lambda: make(
        "LTX2ImageToVideo", parts2(), TEXT | FRAMES | STG | {"image": picture(32), "image_crf": 0}, "video", "ltx2"
    ),
    "LTXCondition": lambda: make(
        "LTXCondition",
        parts(),
        TEXT | FRAMES | {"image": picture(32)},
        "video",
        "ltx",
        notes="fresh noise on conditioned tokens in each iteration",
    ),
    "LTX2Condition": lambda: second("LTX2Condition", STG | {"conditions": condition()}),
    "LTX2InContext": lambda: second("LTX2InContext", STG | {"conditions": condition()}),
    "LTX2HDR": lambda: second("LTX2HDR", reference()),
}
