"""Video and sound pipelines that no reference run has covered: Framepack, Kandinsky 6, Sana WM, AudioLDM 2."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers as tf

from .audio import TEXT as SOUND
from .case import Builder, make
from .dit_image import BIG, euler
from .llm import bpe_tokenizer, decoder, vlm_parts
from .ltx import TEXT, video_vae2
from .ltx import parts as ltx
from .media import picture
from .stable_diffusion import BETAS
from .text import WIDTH, clip_text, clip_tokenizer, t5, t5_pieces, t5_tokenizer
from .vaes import hunyuan_video_vae, image_vae
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


def sana_wm() -> dict[str, Any]:
    """Return the components of Sana WM, a world model steered by camera poses."""
    net = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=16,
        chunk_plucker_channels=24,
        chunk_plucker_post_attn_blocks=2,
        caption_channels=WIDTH,
        image_size=32,
    )
    text = {"text_encoder": decoder("Gemma2"), "tokenizer": bpe_tokenizer()}
    return {**text, "vae": video_vae2(), "transformer": net, **euler(5.0)}


def clap() -> tf.ClapModel:
    """Return a CLAP, of which only the text half is read unless several sounds are ranked."""
    config = tf.ClapConfig(
        text_config={
            "vocab_size": len(t5_pieces()),
            "hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "projection_dim": WIDTH,
        },
        audio_config={
            "spec_size": 8,
            "window_size": 4,
            "num_mel_bins": 8,
            "depths": [1],
            "num_attention_heads": [2],
            "hidden_size": 16,
            "patch_embeds_hidden_size": 16,
            "patch_size": 2,
            "patch_stride": [2, 2],
            "projection_dim": WIDTH,
        },
        projection_dim=WIDTH,
    )
    return tf.ClapModel(config)


def audioldm2() -> dict[str, Any]:
    """Return the components of AudioLDM 2: a language model turns two texts into what the U-Net reads."""
    net = diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(None, WIDTH, WIDTH),
        attention_head_dim=2,
    )
    gpt = tf.GPT2Config(vocab_size=64, n_embd=WIDTH, n_head=2, n_layer=1, n_positions=160)
    language = tf.GPT2LMHeadModel(gpt)
    language.config.max_new_tokens = 4
    hifigan = tf.SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )
    return {
        "unet": net,
        "vae": image_vae(in_channels=1, out_channels=1),
        "text_encoder": clap(),
        "tokenizer": t5_tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": t5_tokenizer(),
        "language_model": language,
        "projection_model": diffusers.AudioLDM2ProjectionModel(WIDTH, WIDTH, WIDTH),
        "feature_extractor": tf.ClapFeatureExtractor(feature_size=8, hop_length=400),
        "vocoder": tf.SpeechT5HifiGan(hifigan),
        "scheduler": diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    }


CAMERA = {"action": "w-8", "intrinsics": [16.0, 16.0, 16.0, 16.0], "num_frames": 9, "chi_prompt": ["a video of"]}
WINDOWS = {"seed": None, "cond_image": picture(32), "num_frames": 17, "temporal_tile_size": 16, "temporal_overlap": 8}
PACK = {"prompt": "a red circle moving", "image": picture(32), "num_frames": 9, "latent_window_size": 3}

BUILDERS: dict[str, Builder] = {
    "AudioLDM2": lambda: make(
        "AudioLDM2", audioldm2(), SOUND | {"audio_length_in_s": 0.004}, "audio", "audioldm2", output_type="pt"
    ),
    "SanaWM": lambda: make(
        "SanaWM",
        sana_wm(),
        TEXT | BIG | CAMERA | {"image": picture(32)},
        "video",
        "sana_wm",
        notes="first frame pinned; times by token",
    ),
    "LTXI2VLongMultiPrompt": lambda: make(
        "LTXI2VLongMultiPrompt", ltx(), TEXT | BIG | WINDOWS, "video", "ltx", notes="window by window"
    ),
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
