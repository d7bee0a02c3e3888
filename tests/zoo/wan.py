"""Wan: video flow transformers, the two-expert ones of 2.2 too."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers as tf

from .case import Builder, make
from .media import picture
from .stable_diffusion import SIZE
from .text import WIDTH, t5_tokenizer, umt5
from .vaes import wan_vae

TEXT = {"prompt": "a red circle moving", "negative_prompt": "blurry", "guidance_scale": 5.0, "max_sequence_length": 16}
FRAMES = {"num_frames": 5}


def transformer(**extra: Any) -> diffusers.WanTransformer3DModel:
    """Return two blocks."""
    return diffusers.WanTransformer3DModel(
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": WIDTH,
            "freq_dim": 16,
            "ffn_dim": 48,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            **extra,
        }
    )


def flow_unipc(shift: float = 3.0) -> diffusers.UniPCMultistepScheduler:
    """Return the multistep solver that Wan ships with."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


def parts(**extra: Any) -> dict[str, Any]:
    """Return the components of Wan 2.1 text-to-video."""
    return {
        "transformer": transformer(),
        "vae": wan_vae(),
        "text_encoder": umt5(),
        "tokenizer": t5_tokenizer(),
        "scheduler": flow_unipc(),
        **extra,
    }


def experts(boundary: float = 0.9) -> dict[str, Any]:
    """Return what Wan 2.2 adds: a second transformer for times below the boundary."""
    return {"transformer_2": transformer(), "boundary_ratio": boundary}


def vision() -> dict[str, Any]:
    """Return the CLIP image tower that Wan 2.1 shows the first frame to."""
    config = tf.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    processor = tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return {"image_encoder": tf.CLIPVisionModel(config), "image_processor": processor}


def image_parts(**extra: Any) -> dict[str, Any]:
    """Return the components of image-to-video: 16 noisy channels, 4 of mask and 16 of the picture."""
    return parts(transformer=transformer(in_channels=36, image_dim=8), **vision(), **extra)


def image_experts() -> dict[str, Any]:
    """Return the components of Wan 2.2 image-to-video, which dropped the image tower."""
    return parts(transformer=transformer(in_channels=36), transformer_2=transformer(in_channels=36), boundary_ratio=0.9)


FIRST = {"image": picture()}

BUILDERS: dict[str, Builder] = {
    "Wan": lambda: make("Wan", parts(), TEXT | SIZE | FRAMES, "video", "wan"),
    "Wan_22": lambda: make(
        "Wan", parts(**experts()), TEXT | SIZE | FRAMES, "video", "wan", notes="two experts, parted at t = 0.9"
    ),
    "WanImageToVideo": lambda: make("WanImageToVideo", image_parts(), TEXT | SIZE | FRAMES | FIRST, "video", "wan"),
    "WanImageToVideo_22": lambda: make(
        "WanImageToVideo", image_experts(), TEXT | SIZE | FRAMES | FIRST, "video", "wan", notes="two experts"
    ),
}
