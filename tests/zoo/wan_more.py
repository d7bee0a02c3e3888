"""Transformers grown from Wan: control, animation, SkyReels V2, ChronoEdit, Lucy, and Wan 2.2 with times by token."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, Case, make
from .media import clip, picture
from .stable_diffusion import SIZE
from .text import WIDTH
from .wan import FRAMES, TEXT, flow_unipc, parts, transformer, vision

SHAPE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
SEEN = {"in_channels": 36, "image_dim": 8}
FIRST = {"image": picture()}
LAST = {"last_image": picture(phase=1.0)}
CLIP = {"video": clip(5)}


def video(name: str, given: dict[str, Any], inputs: dict[str, Any], family: str = "wan", notes: str = "") -> Case:
    """Return a text-guided video pipeline at the smallest size."""
    return make(name, given, TEXT | SIZE | inputs, "video", family, notes=notes)


def by_token() -> dict[str, Any]:
    """Return the components of the 5B model, in which every token has a time of its own."""
    return parts(transformer=transformer(), expand_timesteps=True)


def vace(**extra: Any) -> dict[str, Any]:
    """Return the components of VACE; 96 control channels: two clips and a mask in 8x8 pixels."""
    net = diffusers.WanVACETransformer3DModel(**SHAPE, vace_layers=[0, 1], vace_in_channels=96)
    return parts(transformer=net, **extra)


def animate() -> dict[str, Any]:
    """Return the components of Wan Animate, driven by a pose and a face clip."""
    net = diffusers.WanAnimateTransformer3DModel(
        **SHAPE,
        image_dim=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return parts(transformer=net, **vision())


def skyreels(**extra: Any) -> dict[str, Any]:
    """Return the components of SkyReels V2."""
    net = diffusers.SkyReelsV2Transformer3DModel(**SHAPE, **extra)
    return parts(transformer=net, scheduler=flow_unipc(8.0), **vision())


def chrono() -> dict[str, Any]:
    """Return the components of ChronoEdit, which edits a picture as the end of a short clip."""
    net = diffusers.ChronoEditTransformer3DModel(**SHAPE, **SEEN, rope_temporal_skip_len=4)
    return parts(transformer=net, **vision())


def lucy() -> dict[str, Any]:
    """Return the components of Lucy, which sees the clip to be edited beside the noise."""
    return parts(transformer=transformer(in_channels=32))


ANIMATE = {
    "image": picture(),
    "pose_video": clip(5),
    "face_video": clip(5),
    "segment_frame_length": 5,
}

BUILDERS: dict[str, Builder] = {
    "Wan_22_5B": lambda: video("Wan", by_token(), FRAMES, notes="one time per token"),
    "WanImageToVideo_22_5B": lambda: video("WanImageToVideo", by_token(), FRAMES | FIRST, notes="first frame pinned"),
    "WanImageToVideo_last": lambda: video(
        "WanImageToVideo", parts(transformer=transformer(in_channels=36)), FRAMES | FIRST | LAST
    ),
    "WanVideoToVideo": lambda: video("WanVideoToVideo", parts(), CLIP | {"strength": 0.9}),
    "WanVACE": lambda: video("WanVACE", vace(), FRAMES | CLIP),
    "WanVACE_22": lambda: video(
        "WanVACE", vace() | {"transformer_2": vace()["transformer"], "boundary_ratio": 0.9}, FRAMES
    ),
    "WanAnimate": lambda: video("WanAnimate", animate(), ANIMATE, notes="segment by segment"),
    "ChronoEdit": lambda: video("ChronoEdit", chrono(), FRAMES | FIRST, "chronoedit"),
    "LucyEdit": lambda: video("LucyEdit", lucy(), FRAMES | CLIP, "lucy"),
    "SkyReelsV2": lambda: video("SkyReelsV2", skyreels(), FRAMES, "skyreels_v2"),
    "SkyReelsV2ImageToVideo": lambda: video("SkyReelsV2ImageToVideo", skyreels(**SEEN), FRAMES | FIRST, "skyreels_v2"),
}
