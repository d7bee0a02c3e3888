"""More sound: AceStep, Stable Audio 3, LongCat."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers as tf
from diffusers.pipelines.ace_step import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer, AceStepConditionEncoder
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

from .audio import oobleck
from .case import Builder, Case, make
from .llm import bpe_tokenizer, decoder, sizes
from .text import WIDTH, t5_tokenizer, umt5

ACE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 16,
}
POOL: dict[str, Any] = {"audio_acoustic_hidden_dim": 8, "pool_window_size": 2, "num_attention_pooler_hidden_layers": 1}


def ace_step(turbo: bool) -> dict[str, Any]:
    """Return the components of AceStep: the noise sits beside a source and a mask, 8 channels each.

    Args:
        turbo: Whether guidance is distilled; if not, it keeps a momentum from step to step.
    """
    tokens = AceStepAudioTokenizer(**ACE, **POOL, fsq_dim=16, fsq_input_levels=[4, 4, 4])
    condition = AceStepConditionEncoder(
        **ACE,
        text_hidden_dim=WIDTH,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )
    net = diffusers.AceStepTransformer1DModel(
        **ACE, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, is_turbo=turbo
    )
    return {
        "text_encoder": decoder("Qwen3"),
        "tokenizer": bpe_tokenizer(),
        "condition_encoder": condition,
        "audio_tokenizer": tokens,
        "audio_token_detokenizer": AceStepAudioTokenDetokenizer(**ACE, **POOL),
        "transformer": net,
        "vae": oobleck(latent=8, rate=64),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    }


def t5gemma() -> tf.PreTrainedModel:
    """Return the encoder half of a T5Gemma."""
    half = {**sizes(), "layer_types": ["full_attention"] * 2, "sliding_window": 64}
    module = tf.T5GemmaModuleConfig(**half)
    config = tf.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    return tf.T5GemmaEncoderModel(config)


def stable_audio3() -> dict[str, Any]:
    """Return the components of Stable Audio 3: rectified flow with a memory and a mask of what is given."""
    net = diffusers.StableAudio3DiTModel(
        io_channels=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=9,
        timestep_features_dim=8,
        ff_mult=2,
        num_memory_tokens=2,
    )
    vae = diffusers.AutoencoderSAME(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        use_differential_attention=False,
        dim_heads=8,
        ff_mult=2,
        sampling_rate=32,
    )
    return {
        "text_encoder": t5gemma(),
        "tokenizer": bpe_tokenizer(),
        "duration_embedder": StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=8),
        "transformer": net,
        "vae": vae,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    }


def longcat() -> dict[str, Any]:
    """Return the components of LongCat Audio."""
    net = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=WIDTH, latent_dim=8, text_conv=False, ff_mult=2.0
    )
    vae = diffusers.LongCatAudioDiTVae(
        channels=8,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=240,
    )
    solver = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True)
    return {
        "text_encoder": umt5(),
        "tokenizer": t5_tokenizer(),
        "transformer": net,
        "vae": vae,
        "scheduler": solver,
    }


def third(kind: str, inputs: dict[str, Any]) -> Case:
    """Return a pipeline of Stable Audio 3."""
    text = {"prompt": "a bell", "duration": 1.0}
    return make(f"StableAudio3{kind}", stable_audio3(), text | inputs, "audio", "stable_audio_3")


def tone(samples: int) -> torch.Tensor:
    """Return stereo sound ``(1, 2, L)``: two sines."""
    t = torch.arange(samples) / 8
    return torch.stack([t.sin(), (1.5 * t).sin()])[None]


SONG = {"prompt": "a bell", "lyrics": "one two three", "audio_duration": 0.5}

BUILDERS: dict[str, Builder] = {
    "AceStep": lambda: make("AceStep", ace_step(turbo=True), SONG, "audio", "ace_step"),
    "AceStep_guided": lambda: make(
        "AceStep",
        ace_step(turbo=False),
        SONG | {"guidance_scale": 4.0},
        "audio",
        "ace_step",
        notes="guidance keeps a momentum from step to step",
    ),
    "StableAudio3": lambda: third("", {"negative_prompt": "noise", "guidance_scale": 4.0}),
    "StableAudio3AudioToAudio": lambda: third("AudioToAudio", {"audio": tone(32), "init_noise_level": 0.8}),
    "StableAudio3Inpaint": lambda: third(
        "Inpaint", {"audio": tone(32), "mask_start_seconds": 0.25, "mask_end_seconds": 0.75}
    ),
    "LongCatAudioDiT": lambda: make(
        "LongCatAudioDiT",
        longcat(),
        {"prompt": "a bell", "negative_prompt": "noise", "audio_duration_s": 0.2, "guidance_scale": 4.0},
        "audio",
        "longcat_audio",
    ),
}
