"""Kandinsky 2.1, 2.2 and 3: a prior over image embeddings, decoders with a learned variance, a text U-Net."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from .case import Builder, Case, make
from .dit_image import t5_side
from .media import mask, picture, waves
from .sd_special import clip_pixels, clip_vision
from .stable_diffusion import TEXT, unet
from .text import WIDTH, clip_text, clip_tokenizer, t5_pieces, t5_tokenizer

SIZE = {"height": 64, "width": 64}  # 8 times smaller, whatever the autoencoder says
CHANGE = {"image": picture(64), "strength": 0.9}
PAINT = {"image": picture(64), "mask_image": mask(64)}
HINT = {"hint": waves(64, 64)[None]}
RAW = {"output_type": "pt"}


def movq() -> diffusers.VQModel:
    """Return the spatially normalised autoencoder, 8 times smaller."""
    return diffusers.VQModel(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=16,
        vq_embed_dim=4,
    )


def decoder(channels: int, added: str, projected: str) -> diffusers.UNet2DConditionModel:
    """Return the U-Net of Kandinsky 2, conditioned on an image embedding."""
    return unet(
        in_channels=channels,
        out_channels=8,
        addition_embed_type=added,
        encoder_hid_dim_type=projected,
        encoder_hid_dim=WIDTH,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )


def ddim() -> diffusers.DDIMScheduler:
    """Return the solver of the Kandinsky 2 decoders."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def embeds() -> dict[str, Any]:
    """Return two image embeddings, as a prior would give them."""
    drawn = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    return {"image_embeds": drawn[0], "negative_image_embeds": drawn[1], "guidance_scale": 4.0}


def multilingual() -> MultilingualCLIP:
    """Return Kandinsky 2.1's text encoder."""
    config = MCLIPConfig(
        transformerDimSize=WIDTH,
        imageDimSize=WIDTH,
        numDims=WIDTH,
        transformerDimensions=WIDTH,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=len(t5_pieces()),
        max_position_embeddings=96,
    )
    return MultilingualCLIP(config)


def v21(kind: str, channels: int, inputs: dict[str, Any]) -> Case:
    """Return a decoder of Kandinsky 2.1."""
    parts = {
        "text_encoder": multilingual(),
        "tokenizer": t5_tokenizer(),
        "unet": decoder(channels, "text_image", "text_image_proj"),
        "movq": movq(),
        "scheduler": ddim(),
    }
    text = {"prompt": "a red circle", "negative_prompt": "blurry"}
    return make(f"Kandinsky{kind}", parts, text | embeds() | SIZE | inputs, "image", "kandinsky", **RAW)


def v22(kind: str, channels: int, inputs: dict[str, Any], added: str = "image") -> Case:
    """Return a decoder of Kandinsky 2.2."""
    parts = {"unet": decoder(channels, added, "image_proj"), "movq": movq(), "scheduler": ddim()}
    kw = {} if "Controlnet" in kind else {"output_type": "latent"}
    return make(f"KandinskyV22{kind}", parts, embeds() | SIZE | inputs, "image", "kandinsky2_2", **(RAW | kw))


def prior(kind: str, inputs: dict[str, Any], family: str) -> Case:
    """Return a prior: what it samples is an image embedding, not an image."""
    net = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1)
    solver = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    parts = {
        "prior": net,
        "image_encoder": clip_vision(),
        "text_encoder": clip_text(projection=WIDTH),
        "tokenizer": clip_tokenizer(),
        "scheduler": solver,
        "image_processor": clip_pixels(),
    }
    notes = "the sample is an embedding"
    return make(f"Kandinsky{kind}", parts, TEXT | inputs, "image", family, notes=notes, **RAW)


def v3(kind: str, inputs: dict[str, Any]) -> Case:
    """Return a pipeline of Kandinsky 3."""
    net = diffusers.Kandinsky3UNet(
        time_embedding_dim=8,
        groups=4,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        encoder_hid_dim=WIDTH,
    )
    solver = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    parts = {**t5_side(), "unet": net, "movq": movq(), "scheduler": solver}
    return make(f"Kandinsky3{kind}", parts, TEXT | inputs, "image", "kandinsky3")


BUILDERS: dict[str, Builder] = {
    "Kandinsky": lambda: v21("", 4, {}),
    "KandinskyImg2Img": lambda: v21("Img2Img", 4, CHANGE),
    "KandinskyInpaint": lambda: v21("Inpaint", 9, PAINT),
    "KandinskyPrior": lambda: prior("Prior", {}, "kandinsky"),
    "KandinskyV22": lambda: v22("", 4, {}),
    "KandinskyV22Img2Img": lambda: v22("Img2Img", 4, CHANGE),
    "KandinskyV22Inpaint": lambda: v22("Inpaint", 9, PAINT),
    "KandinskyV22Controlnet": lambda: v22("Controlnet", 8, HINT, "image_hint"),
    "KandinskyV22ControlnetImg2Img": lambda: v22("ControlnetImg2Img", 8, HINT | CHANGE, "image_hint"),
    "KandinskyV22Prior": lambda: prior("V22Prior", {}, "kandinsky2_2"),
    "KandinskyV22PriorEmb2Emb": lambda: prior("V22PriorEmb2Emb", {"image": picture(), "strength": 0.9}, "kandinsky2_2"),
    "Kandinsky3": lambda: v3("", SIZE),
    "Kandinsky3Img2Img": lambda: v3("Img2Img", CHANGE),
}
