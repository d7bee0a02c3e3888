"""Images from transformers that read a vision-language model: Joy, Krea 2, DreamLite, Nucleus, PRX."""

from __future__ import annotations

from typing import Any

import diffusers

from .audio_more import t5gemma
from .case import Builder, make
from .dit_image import BIG, CFG, NO_BINS, euler
from .flux import flow_scheduler
from .llm import bpe_tokenizer, decoder, vlm3_parts
from .media import picture
from .stable_diffusion import SIZE, TEXT
from .text import WIDTH
from .vaes import deep_wan_vae, flow_vae, qwen_vae

JOY: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": WIDTH,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}


def joy(net: diffusers.ModelMixin) -> dict[str, Any]:
    """Return the components of JoyImage Edit with the transformer ``net``."""
    return {**vlm3_parts(), "vae": deep_wan_vae(), "transformer": net, **euler(4.0)}


def krea() -> dict[str, Any]:
    """Return the components of Krea 2, which reads several layers of its text encoder."""
    net = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=24,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    text = vlm3_parts()
    text["text_encoder"] = text["text_encoder"].model
    return {
        **text,
        "vae": qwen_vae(),
        "transformer": net,
        "scheduler": flow_scheduler(),
        "text_encoder_select_layers": (0, 2),
    }


def dreamlite() -> dict[str, Any]:
    """Return the components of DreamLite: a U-Net in rectified flow, a picture beside the noise."""
    net = diffusers.DreamLiteUNetModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        layers_per_block=1,
        norm_num_groups=4,
        transformer_layers_per_block=1,
    )
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return {**vlm3_parts(), "vae": vae, "unet": net, **euler()}


def nucleus() -> dict[str, Any]:
    """Return the components of Nucleus, a mixture of experts."""
    net = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        moe_enabled=False,
        capacity_factors=[4.0, 4.0],
    )
    return {**vlm3_parts(), "vae": qwen_vae(), "transformer": net, "scheduler": flow_scheduler()}


PRX: dict[str, Any] = {"context_in_dim": WIDTH, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2}


def prx() -> dict[str, Any]:
    """Return the components of PRX."""
    net = diffusers.PRXTransformer2DModel(**PRX, in_channels=4, axes_dim=[4, 4])
    text = {"text_encoder": t5gemma().encoder, "tokenizer": bpe_tokenizer()}
    return {**text, "vae": flow_vae(), "transformer": net, **euler(), "default_sample_size": 16}


def prx_pixel() -> dict[str, Any]:
    """Return the components of PRX in pixels."""
    net = diffusers.PRXTransformer2DModel(
        **PRX, in_channels=3, axes_dim=[4, 4], bottleneck_size=8, resolution_embeds=True
    )
    text = {"text_encoder": decoder("Qwen3"), "tokenizer": bpe_tokenizer()}
    return {**text, "transformer": net, **euler(), "default_sample_size": 16, "prompt_max_tokens": 16}


LONG = {"max_sequence_length": 128}  # the chat template comes first
PRX_CALL = TEXT | SIZE | NO_BINS
EDIT = CFG | BIG | {"image": picture(32)}

BUILDERS: dict[str, Builder] = {
    "JoyImageEdit": lambda: make(
        "JoyImageEdit", joy(diffusers.JoyImageEditTransformer3DModel(**JOY)), EDIT, "image", "joyimage"
    ),
    "JoyImageEditPlus": lambda: make(
        "JoyImageEditPlus",
        joy(diffusers.JoyImageEditPlusTransformer3DModel(**JOY)),
        CFG | {"height": 128, "width": 128, "images": [picture(32)]},
        "image",
        "joyimage",
        notes="reference latents are rewritten in place in each iteration",
    ),
    "Krea2": lambda: make("Krea2", krea(), CFG, "image", "krea2"),
    "DreamLite": lambda: make("DreamLite", dreamlite(), CFG | LONG, "image", "dreamlite"),
    "DreamLite_edit": lambda: make("DreamLite", dreamlite(), CFG | LONG | {"image": picture()}, "image", "dreamlite"),
    "DreamLiteMobile": lambda: make(
        "DreamLiteMobile",
        dreamlite(),
        {"prompt": "a red circle"} | LONG | SIZE,
        "image",
        "dreamlite",
    ),
    "NucleusMoEImage": lambda: make(
        "NucleusMoEImage", nucleus(), CFG | {"return_index": -1, "max_sequence_length": 512}, "image", "nucleus"
    ),
    "PRX": lambda: make("PRX", prx(), PRX_CALL, "image", "prx"),
    "PRXPixel": lambda: make("PRXPixel", prx_pixel(), PRX_CALL, "image", "prx", output_type="pt"),
}
