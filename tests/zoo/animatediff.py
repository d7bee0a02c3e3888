"""AnimateDiff: an image U-Net with motion modules between its layers."""

from __future__ import annotations

from typing import Any

import diffusers

from . import sdxl
from .case import Builder, Case, make
from .media import clip
from .sd_control import controlnet
from .stable_diffusion import BETAS, SIZE, TEXT, parts, unet
from .text import WIDTH

FRAMES = {"num_frames": 3}
HINT = {"conditioning_frames": clip(3)}
CHANGE = {"video": clip(3), "strength": 0.9}
MOTION = {
    "block_out_channels": (8, 16),
    "motion_layers_per_block": 1,
    "motion_norm_num_groups": 4,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 8,
}


def sparse() -> diffusers.SparseControlNetModel:
    """Return the ControlNet for hints at some frames only."""
    return diffusers.SparseControlNetModel(
        conditioning_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        motion_num_attention_heads=2,
        conditioning_embedding_out_channels=(4, 8),
        use_simplified_condition_embedding=False,
    )


def animate(kind: str, inputs: dict[str, Any], **extra: Any) -> Case:
    """Return an AnimateDiff pipeline on Stable Diffusion 1.5."""
    adapter = diffusers.MotionAdapter(**MOTION)
    solver = diffusers.DDIMScheduler(**BETAS | {"beta_schedule": "linear"}, clip_sample=False, steps_offset=1)
    given = parts(unet=unet(), motion_adapter=adapter, scheduler=solver, **extra)
    return make(f"AnimateDiff{kind}", given, TEXT | SIZE | inputs, "video", "animatediff")


def animate_xl() -> Case:
    """Return AnimateDiff on SDXL."""
    adapter = diffusers.MotionAdapter(**MOTION, use_motion_mid_block=False)
    solver = diffusers.DDIMScheduler(**BETAS | {"beta_schedule": "linear"}, clip_sample=False)
    given = sdxl.parts(motion_adapter=adapter, scheduler=solver)
    return make("AnimateDiffSDXL", given, TEXT | SIZE | FRAMES, "video", "animatediff")


BUILDERS: dict[str, Builder] = {
    "AnimateDiff": lambda: animate("", FRAMES),
    "AnimateDiffPAG": lambda: animate("PAG", FRAMES | {"pag_scale": 2.0}),
    "AnimateDiffControlNet": lambda: animate("ControlNet", FRAMES | HINT, controlnet=controlnet()),
    "AnimateDiffSparseControlNet": lambda: animate(
        "SparseControlNet", FRAMES | HINT | {"controlnet_frame_indices": [0, 1, 2]}, controlnet=sparse()
    ),
    "AnimateDiffVideoToVideo": lambda: animate("VideoToVideo", CHANGE),
    "AnimateDiffVideoToVideoControlNet": lambda: animate(
        "VideoToVideoControlNet", CHANGE | HINT, controlnet=controlnet()
    ),
    "AnimateDiffSDXL": animate_xl,
}
