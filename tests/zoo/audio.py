"""Sound: Stable Audio and its like."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

from .case import Builder, make
from .dit_image import t5_side
from .text import WIDTH

TEXT = {"prompt": "a bell", "negative_prompt": "noise", "guidance_scale": 4.0}


def oobleck(latent: int = 4, rate: int = 64) -> diffusers.AutoencoderOobleck:
    """Return an autoencoder of stereo sound, 8 times shorter."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=latent,
        audio_channels=2,
        sampling_rate=rate,
    )


def stable_audio() -> dict[str, Any]:
    """Return the components of Stable Audio Open: v-prediction on Karras' process, a stochastic solver."""
    transformer = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=12,
        time_proj_dim=8,
        global_states_input_dim=24,
        cross_attention_input_dim=12,
    )
    projection = StableAudioProjectionModel(text_encoder_dim=WIDTH, conditioning_dim=12, min_value=0, max_value=16)
    return {
        **t5_side(),
        "vae": oobleck(),
        "projection_model": projection,
        "transformer": transformer,
        "scheduler": diffusers.CosineDPMSolverMultistepScheduler(sigma_schedule="exponential"),
    }


BUILDERS: dict[str, Builder] = {
    "StableAudio": lambda: make(
        "StableAudio", stable_audio(), TEXT | {"audio_end_in_s": 1.0}, "audio", "stable_audio", notes="needs torchsde"
    ),
}
