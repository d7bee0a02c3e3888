"""Two-stage and odd ones: Stable Cascade and Shap-E, whose samples are no pictures."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers as tf
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from diffusers.pipelines.shap_e import ShapERenderer

from .case import Builder, Case, make
from .media import picture
from .sd_special import clip_pixels
from .stable_diffusion import TEXT
from .text import WIDTH, clip_text, clip_tokenizer


def cascade_text() -> dict[str, Any]:
    """Return what both stages share: a projecting CLIP and the cosine solver."""
    return {
        "text_encoder": clip_text(projection=WIDTH),
        "tokenizer": clip_tokenizer(),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
    }


def cascade_prior() -> Case:
    """Return stage C: text to a small latent."""
    net = diffusers.StableCascadeUNet(
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        switch_level=(False,),
        timestep_ratio_embedding_dim=16,
        clip_image_in_channels=768,
        clip_text_in_channels=WIDTH,
        clip_text_pooled_in_channels=WIDTH,
    )
    call = TEXT | {"height": 128, "width": 128}
    notes = "a cosine ratio instead of a time"
    given = {**cascade_text(), "prior": net, "resolution_multiple": 16.0}
    return make("StableCascadePrior", given, call, "image", "stable_cascade", notes=notes, output_type="pt")


def cascade_decoder() -> Case:
    """Return stage B: the small latent to a larger one, decoded by stage A."""
    layers = ["SDCascadeResBlock", "SDCascadeTimestepBlock"]
    net = diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=(layers, [*layers, "SDCascadeAttnBlock"]),
        timestep_ratio_embedding_dim=16,
        clip_text_pooled_in_channels=WIDTH,
        effnet_in_channels=16,
        patch_size=2,
    )
    vqgan = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=8, embed_dim=8)
    drawn = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    call = TEXT | {"image_embeddings": drawn}
    given = {**cascade_text(), "decoder": net, "vqgan": vqgan, "latent_dim_scale": 4.0}
    return make("StableCascadeDecoder", given, call, "image", "stable_cascade")


def shap_e(**extra: Any) -> dict[str, Any]:
    """Return what both Shap-E pipelines share: a prior over 32 tokens and a renderer that is not used."""
    net = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=WIDTH,
        num_embeddings=32,
        embedding_proj_dim=WIDTH,
        time_embed_dim=32,
        num_layers=1,
        clip_embed_dim=2 * WIDTH,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
        **extra,
    )
    render = ShapERenderer(param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=WIDTH, d_hidden=8)
    solver = diffusers.HeunDiscreteScheduler(
        beta_schedule="exp", prediction_type="sample", use_karras_sigmas=True, clip_sample=True
    )
    return {"prior": net, "shap_e_renderer": render, "scheduler": solver}


def shape_from_text() -> Case:
    """Return Shap-E from text."""
    text = {"text_encoder": clip_text(projection=WIDTH), "tokenizer": clip_tokenizer()}
    call = {"prompt": "a red circle", "guidance_scale": 4.0, "frame_size": 8}
    return make("ShapE", {**text, **shap_e()}, call, "image", "shap_e", notes="the sample is a network's weights")


def shape_from_image() -> Case:
    """Return Shap-E from a picture, which is resized to 224 inside."""
    config = tf.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        projection_dim=WIDTH,
    )
    sight = {"image_encoder": tf.CLIPVisionModel(config), "image_processor": clip_pixels()}
    call = {"image": picture(), "guidance_scale": 4.0, "frame_size": 8}
    given = {**sight, **shap_e(embedding_proj_norm_type="layer")}
    return make("ShapEImg2Img", given, call, "image", "shap_e", notes="the sample is a network's weights")


BUILDERS: dict[str, Builder] = {
    "StableCascadePrior": cascade_prior,
    "StableCascadeDecoder": cascade_decoder,
    "ShapE": shape_from_text,
    "ShapEImg2Img": shape_from_image,
}
