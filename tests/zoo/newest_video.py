"""Video and sound pipelines that no reference run has covered: Framepack, Kandinsky 6, AudioLDM 2."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers as tf

from .case import Builder, make
from .dit_image import BIG, euler
from .llm import vlm_parts
from .ltx import TEXT
from .media import picture
from .text import WIDTH, clip_text, clip_tokenizer
from .vaes import hunyuan_video_vae
from .video import TEMPLATE, hunyuan


def framepack() -> dict[str, Any]:
    """Return the components of Framepack, which predicts section after section from a compressed past."""
    net = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 4, 4),
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    sight = tf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return hunyuan(
        transformer=net,
        image_encoder=tf.SiglipVisionModel(sight),
        feature_extractor=tf.SiglipImageProcessor(size={"height": 16, "width": 16}),
    )


def kandinsky6() -> dict[str, Any]:
    """Return the components of Kandinsky 6: video and sound in one transformer."""
    net = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        in_audio_dim=4,
        out_audio_dim=4,
    )
    text = vlm_parts()
    return {
        "text_encoder": text["text_encoder"],
        "tokenizer": text["processor"],
        "text_encoder_2": clip_text(),
        "tokenizer_2": clip_tokenizer(),
        "transformer": net,
        "vae": hunyuan_video_vae(4),
        "audio_vae": diffusers.MMAudioVAE(
            mel_bins=16,
            latent_channels=4,
            hidden_channels=8,
            channel_multipliers=(1, 2),
            layers_per_block=1,
            sample_rate=1600,
            n_fft=64,
            hop_length=16,
        ),
        "vocoder": diffusers.MMAudioVocoder(
            num_mels=16,
            upsample_initial_channel=16,
            upsample_rates=(4, 4),
            upsample_kernel_sizes=(8, 8),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1,),),
        ),
        **euler(5.0),
    }


PACK = {"prompt": "a red circle moving", "image": picture(32), "num_frames": 9, "latent_window_size": 3}

BUILDERS: dict[str, Builder] = {
    "HunyuanVideoFramepack": lambda: make(
        "HunyuanVideoFramepack",
        framepack(),
        PACK | BIG | TEMPLATE | {"max_sequence_length": 16},
        "video",
        "hunyuan_video",
        notes="section by section, the last one first",
    ),
    "Kandinsky6TI2VA": lambda: make(
        "Kandinsky6TI2VA",
        kandinsky6(),
        TEXT | BIG | {"num_frames": 5, "frame_rate": 8.0, "max_sequence_length": 64},
        "video",
        "kandinsky6",
        notes="video and sound, two schedulers",
    ),
}
