"""Stable Diffusion and SDXL with ControlNets, T2I adapters and perturbed-attention guidance."""

from __future__ import annotations

from typing import Any

import diffusers

from . import sdxl
from .case import Builder, Case, make
from .media import mask, picture
from .stable_diffusion import CHANGE, SIZE, TEXT, parts
from .text import WIDTH

HINT = picture(phase=1.0)
PAINT = CHANGE | {"mask_image": mask()}
PAG = {"pag_scale": 2.0}
UNION = {"control_image": [HINT], "control_mode": [1]}
SHARED = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "conditioning_embedding_out_channels": (4, 8),
}
LIKE_XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
    "cross_attention_dim": 2 * WIDTH,
}


def controlnet() -> diffusers.ControlNetModel:
    """Return the copy of the U-Net's first half that reads the hint."""
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D")
    return diffusers.ControlNetModel(**SHARED, down_block_types=blocks, cross_attention_dim=WIDTH)


def controlnet_xl() -> diffusers.ControlNetModel:
    """Return the same for SDXL."""
    return diffusers.ControlNetModel(**SHARED, **LIKE_XL)


def union_xl() -> diffusers.ControlNetUnionModel:
    """Return a ControlNet that serves several kinds of hint."""
    return diffusers.ControlNetUnionModel(
        **SHARED, **LIKE_XL, num_control_type=3, num_trans_channel=8, num_trans_head=2, num_proj_channel=8
    )


def adapter(kind: str, shrink: int) -> diffusers.T2IAdapter:
    """Return a T2I adapter of two levels."""
    return diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=shrink, adapter_type=kind)


def sd(name: str, inputs: dict[str, Any], **changed: Any) -> Case:
    """Return a Stable Diffusion pipeline."""
    return make(name, parts(**changed), TEXT | inputs, "image", "stable_diffusion")


def xl(name: str, inputs: dict[str, Any], **changed: Any) -> Case:
    """Return an SDXL pipeline."""
    return make(name, sdxl.parts(**changed), TEXT | inputs, "image", "stable_diffusion_xl")


def with_net(name: str, inputs: dict[str, Any]) -> Case:
    """Return a ControlNet pipeline of Stable Diffusion."""
    return sd(f"StableDiffusionControlNet{name}", inputs, controlnet=controlnet())


def with_xl_net(name: str, inputs: dict[str, Any]) -> Case:
    """Return a ControlNet pipeline of SDXL."""
    return xl(f"StableDiffusionXLControlNet{name}", inputs, controlnet=controlnet_xl())


def with_union(name: str, inputs: dict[str, Any]) -> Case:
    """Return a union ControlNet pipeline of SDXL."""
    return xl(f"StableDiffusionXLControlNetUnion{name}", UNION | inputs, controlnet=union_xl())


BUILDERS: dict[str, Builder] = {
    "StableDiffusionControlNet": lambda: with_net("", {"image": HINT} | SIZE),
    "StableDiffusionControlNetImg2Img": lambda: with_net("Img2Img", CHANGE | {"control_image": HINT} | SIZE),
    "StableDiffusionControlNetInpaint": lambda: with_net("Inpaint", PAINT | {"control_image": HINT} | SIZE),
    "StableDiffusionControlNetPAG": lambda: with_net("PAG", {"image": HINT} | PAG | SIZE),
    "StableDiffusionControlNetPAGInpaint": lambda: with_net("PAGInpaint", PAINT | {"control_image": HINT} | PAG | SIZE),
    "StableDiffusionPAG": lambda: sd("StableDiffusionPAG", PAG | SIZE),
    "StableDiffusionPAGImg2Img": lambda: sd("StableDiffusionPAGImg2Img", PAG | CHANGE),
    "StableDiffusionPAGInpaint": lambda: sd("StableDiffusionPAGInpaint", PAG | PAINT | SIZE),
    "StableDiffusionAdapter": lambda: sd(
        "StableDiffusionAdapter", {"image": HINT} | SIZE, adapter=adapter("full_adapter", 2)
    ),
    "StableDiffusionXLAdapter": lambda: xl(
        "StableDiffusionXLAdapter", {"image": HINT} | SIZE, adapter=adapter("full_adapter_xl", 4)
    ),
    "StableDiffusionXLControlNet": lambda: with_xl_net("", {"image": HINT} | SIZE),
    "StableDiffusionXLControlNetImg2Img": lambda: with_xl_net("Img2Img", CHANGE | {"control_image": HINT} | SIZE),
    "StableDiffusionXLControlNetInpaint": lambda: with_xl_net("Inpaint", PAINT | {"control_image": HINT} | SIZE),
    "StableDiffusionXLControlNetPAG": lambda: with_xl_net("PAG", {"image": HINT} | PAG | SIZE),
    "StableDiffusionXLControlNetPAGImg2Img": lambda: with_xl_net(
        "PAGImg2Img", CHANGE | {"control_image": HINT} | PAG | SIZE
    ),
    "StableDiffusionXLControlNetUnion": lambda: with_union("", SIZE),
    "StableDiffusionXLControlNetUnionImg2Img": lambda: with_union("Img2Img", CHANGE | SIZE),
    "StableDiffusionXLControlNetUnionInpaint": lambda: with_union("Inpaint", PAINT | SIZE),
    "StableDiffusionXLPAG": lambda: xl("StableDiffusionXLPAG", PAG | SIZE),
    "StableDiffusionXLPAGImg2Img": lambda: xl("StableDiffusionXLPAGImg2Img", PAG | CHANGE),
    "StableDiffusionXLPAGInpaint": lambda: xl("StableDiffusionXLPAGInpaint", PAG | PAINT | SIZE),
}
