"""Relatives of Stable Diffusion: upscalers, unCLIP, depth, variations, video, and maps of depth and normals."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers as tf
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

from .case import Builder, make
from .media import picture, waves
from .stable_diffusion import BETAS, CHANGE, SIZE, TEXT, parts, unet, v_prediction
from .text import WIDTH, clip_text, clip_tokenizer

FAMILY = "stable_diffusion"


def clip_vision(projection: int = WIDTH, size: int = 16) -> tf.CLIPVisionModelWithProjection:
    """Return a CLIP image tower of four patches."""
    config = tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
        projection_dim=projection,
    )
    return tf.CLIPVisionModelWithProjection(config)


def clip_pixels() -> tf.CLIPImageProcessor:
    """Return the processor that goes with :func:`clip_vision`."""
    return tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def seeing() -> dict[str, Any]:
    """Return an image tower with its processor."""
    return {"image_encoder": clip_vision(), "feature_extractor": clip_pixels()}


def latent_upscaler() -> dict[str, Any]:
    """Return the components of the latent upscaler: Karras' preconditioning, a fifth output channel that is dropped."""
    net = diffusers.UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=(32, 32, 64, 64),
        time_cond_proj_dim=WIDTH + 128,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=WIDTH,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        mid_block_type=None,
        in_channels=8,
        out_channels=5,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    )
    return parts(unet=net, scheduler=diffusers.EulerDiscreteScheduler(prediction_type="sample"))


def unclip_parts(**extra: Any) -> dict[str, Any]:
    """Return what both unCLIP pipelines share: a U-Net told of a noised image embedding."""
    net = unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH)
    squared = {"beta_schedule": "squaredcos_cap_v2"}
    return parts(
        unet=net,
        scheduler=diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction"),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=diffusers.DDPMScheduler(**squared),
        **extra,
    )


def prior_parts() -> dict[str, Any]:
    """Return the first half of unCLIP: a diffusion of image embeddings."""
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1)
    solver = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    return {
        "prior": prior,
        "prior_tokenizer": clip_tokenizer(),
        "prior_text_encoder": clip_text(projection=WIDTH),
        "prior_scheduler": solver,
    }


def svd() -> dict[str, Any]:
    """Return the components of Stable Video Diffusion: v-prediction on Karras' process."""
    net = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    solver = diffusers.EulerDiscreteScheduler(
        **BETAS,
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=16
    )
    tower = {"image_encoder": clip_vision(size=224), "feature_extractor": clip_pixels()}  # resized to 224 inside
    return {**tower, "unet": net, "vae": vae, "scheduler": solver}


def marigold(**extra: Any) -> dict[str, Any]:
    """Return the components of Marigold; the text is always empty."""
    return parts(unet=unet(in_channels=8), scheduler=v_prediction(), **extra)


MAP = {"image": picture(), "processing_resolution": 0}
VARIANT = {"image": picture(), "guidance_scale": 3.0}
DEPTH = {"depth_map": waves(16, 16).mean(0)[None]}
INTRINSICS = {"target_properties": {"prediction_type": "intrinsics", "target_names": ["albedo", "material"]}}


BUILDERS: dict[str, Builder] = {
    "StableDiffusionUpscale": lambda: make(
        "StableDiffusionUpscale",
        parts(
            unet=unet(in_channels=7, num_class_embeds=400),
            scheduler=v_prediction(),
            low_res_scheduler=diffusers.DDPMScheduler(**BETAS),
        ),
        TEXT | {"image": picture(8)},
        "image",
        FAMILY,
    ),
    "StableDiffusionLatentUpscale": lambda: make(
        "StableDiffusionLatentUpscale",
        latent_upscaler(),
        TEXT | {"image": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))},
        "image",
        FAMILY,
    ),
    "StableDiffusionDepth2Img": lambda: make(
        "StableDiffusionDepth2Img", parts(unet=unet(in_channels=5)), TEXT | CHANGE | DEPTH, "image", FAMILY
    ),
    "StableDiffusionImageVariation": lambda: make(
        "StableDiffusionImageVariation", parts(**seeing()), VARIANT | SIZE, "image", FAMILY
    ),
    "StableUnCLIPImg2Img": lambda: make(
        "StableUnCLIPImg2Img", unclip_parts(**seeing()), VARIANT | SIZE | TEXT, "image", "unclip"
    ),
    "StableUnCLIP": lambda: make(
        "StableUnCLIP",
        unclip_parts(**prior_parts()),
        TEXT | SIZE | {"prior_num_inference_steps": 2},
        "image",
        "unclip",
        notes="two loops in one call: prior, then image",
    ),
    "StableVideoDiffusion": lambda: make(
        "StableVideoDiffusion",
        svd(),
        {"image": picture(), "num_frames": 3, "decode_chunk_size": 3} | SIZE,
        "video",
        "stable_video_diffusion",
        notes="noise on the picture is drawn per call",
    ),
    "MarigoldDepth": lambda: make(
        "MarigoldDepth",
        marigold(prediction_type="depth"),
        MAP,
        "image",
        "marigold",
        output_type="pt",
    ),
    "MarigoldNormals": lambda: make(
        "MarigoldNormals", marigold(prediction_type="normals"), MAP, "image", "marigold", output_type="pt"
    ),
    "MarigoldIntrinsics": lambda: make(
        "MarigoldIntrinsics",
        parts(
            unet=unet(in_channels=12, out_channels=8),
            scheduler=v_prediction(),
            prediction_type="intrinsics",
            **INTRINSICS,
        ),
        MAP,
        "image",
        "marigold",
        output_type="pt",
    ),
}
