"""More video transformers: CogVideoX and HunyuanVideo from images, Allegro, Latte, EasyAnimate."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers as tf

from .case import Builder, make
from .dit_image import byt5, euler, t5_side
from .llm import IDS, bpe_tokenizer, qwen25_vl, sizes
from .ltx import TEXT
from .media import clip, picture
from .stable_diffusion import BETAS, SIZE
from .text import WIDTH
from .vaes import hunyuan_video_vae, image_vae
from .video import TEMPLATE, cogvideox, frames, hunyuan, hunyuan_transformer

FIRST = {"image": picture()}
ROTARY = {"use_rotary_positional_embeddings": True}


def allegro() -> dict[str, Any]:
    """Return the components of Allegro, whose autoencoder decodes in tiles only."""
    net = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
    )
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16
    )
    vae.enable_tiling()
    vae.kernel = vae.stride = (8, 16, 16)  # one tile is the clip; by default it would be larger, and nothing decoded
    solver = diffusers.EulerAncestralDiscreteScheduler(**BETAS)
    return {**t5_side(), "vae": vae, "transformer": net, "scheduler": solver}


def latte() -> dict[str, Any]:
    """Return the components of Latte: spatial and temporal blocks in turn, the variance cut off."""
    net = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=3,
    )
    solver = diffusers.DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False)
    return {**t5_side(), "vae": image_vae(), "transformer": net, "scheduler": solver}


def hunyuan15(task: str) -> dict[str, Any]:
    """Return the components of HunyuanVideo 1.5; ``task`` is "t2v" or "i2v"."""
    net = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=16,
        rope_axes_dim=(4, 4, 4),
        target_size=16,
        task_type=task,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    sight = tf.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return {
        "text_encoder": qwen25_vl(layers=3).model.language_model,
        "tokenizer": bpe_tokenizer(),
        **byt5(),
        "transformer": net,
        "vae": vae,
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        "image_encoder": tf.SiglipVisionModel(sight),
        "feature_extractor": tf.SiglipImageProcessor(size={"height": 16, "width": 16}),
        **euler(7.0),
    }


def llava() -> dict[str, Any]:
    """Return the text side of HunyuanVideo's image-to-video: LLaVA sees the first frame as four tokens."""
    vision = tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**sizes(layers=3)),
        image_token_index=IDS["<|image_pad|>"],
        vision_feature_layer=-1,
        pad_token_id=IDS["<|endoftext|>"],
    )
    processor = tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return {"text_encoder": tf.LlavaForConditionalGeneration(config), "image_processor": processor}


def seen_hunyuan() -> dict[str, Any]:
    """Return the components of HunyuanVideo image-to-video."""
    net = hunyuan_transformer(in_channels=9, image_condition_type="latent_concat", guidance_embeds=False)
    return hunyuan(transformer=net, **llava())


def skyreels() -> dict[str, Any]:
    """Return the components of SkyReels V1: the first frame's latent beside the noise, true guidance."""
    return hunyuan(transformer=hunyuan_transformer(in_channels=8), vae=hunyuan_video_vae())


def easyanimate(channels: int, **extra: Any) -> dict[str, Any]:
    """Return the components of EasyAnimate; the transformer reads ``channels`` channels."""
    net = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        patch_size=2,
        sample_width=8,
        sample_height=8,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=2,
        mmdit_layers=1,
        **extra,
    )
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        spatial_group_norm=False,
    )
    return {"text_encoder": qwen25_vl(), "tokenizer": bpe_tokenizer(), "vae": vae, "transformer": net, **euler(5.0)}


EASY = {"prompt": "a red circle moving", "negative_prompt": "blurry", "guidance_scale": 5.0} | frames(5)
PICTURED = {
    "prompt_template": {
        "template": "a <|image_pad|> video of {}",
        "crop_start": 2,
        "image_emb_start": 1,
        "image_emb_end": 5,
        "image_emb_len": 4,
    },
    "image_embed_interleave": 2,
}
LATTE = {key: value for key, value in TEXT.items() if key != "max_sequence_length"}

BUILDERS: dict[str, Builder] = {
    "CogVideoXImageToVideo": lambda: make(
        "CogVideoXImageToVideo", cogvideox(8, **ROTARY), TEXT | frames(9) | FIRST, "video", "cogvideox"
    ),
    "CogVideoXVideoToVideo": lambda: make(
        "CogVideoXVideoToVideo", cogvideox(), TEXT | SIZE | {"video": clip(9), "strength": 0.9}, "video", "cogvideox"
    ),
    "CogVideoXFunControl": lambda: make(
        "CogVideoXFunControl", cogvideox(8), TEXT | SIZE | {"control_video": clip(9)}, "video", "cogvideox"
    ),
    "Allegro": lambda: make(
        "Allegro", allegro(), TEXT | frames(8) | {"clean_caption": False}, "video", "allegro", notes="decodes in tiles"
    ),
    "Latte": lambda: make(
        "Latte", latte(), LATTE | SIZE | {"video_length": 3, "clean_caption": False}, "video", "latte"
    ),
    "HunyuanVideo15": lambda: make(
        "HunyuanVideo15",
        hunyuan15("t2v"),
        {"prompt": "a red circle moving", "negative_prompt": "blurry"} | frames(5),
        "video",
        "hunyuan_video15",
    ),
    "HunyuanVideo15ImageToVideo": lambda: make(
        "HunyuanVideo15ImageToVideo",
        hunyuan15("i2v"),
        {"prompt": "a red circle moving", "negative_prompt": "blurry", "num_frames": 5} | FIRST,
        "video",
        "hunyuan_video15",
    ),
    "HunyuanVideoImageToVideo": lambda: make(
        "HunyuanVideoImageToVideo",
        seen_hunyuan(),
        TEXT | FIRST | PICTURED | frames(5),
        "video",
        "hunyuan_video",
        notes="first frame pinned",
    ),
    "HunyuanSkyreelsImageToVideo": lambda: make(
        "HunyuanSkyreelsImageToVideo",
        skyreels(),
        TEXT | FIRST | TEMPLATE | frames(5) | {"true_cfg_scale": 3.0},
        "video",
        "hunyuan_video",
    ),
    "EasyAnimate": lambda: make("EasyAnimate", easyanimate(4), EASY, "video", "easyanimate"),
}
