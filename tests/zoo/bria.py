"""Bria and its Fibo models, which are prompted in JSON."""

from __future__ import annotations

from typing import Any

import diffusers

from .case import Builder, make
from .dit_image import BIG, CFG, t5_side
from .flux import flow_scheduler
from .llm import bpe_tokenizer, decoder, vlm3_parts
from .media import picture
from .newest_image import DEEP
from .stable_diffusion import SIZE, TEXT
from .text import WIDTH
from .vaes import flux2_vae, image_vae, wan_vae

BRIA: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": [4, 6, 6],
}


def bria() -> dict[str, Any]:
    """Return the components of Bria."""
    net = diffusers.BriaTransformer2DModel(**BRIA, joint_attention_dim=WIDTH)
    return {**t5_side(), "vae": image_vae(shift_factor=0.0), "transformer": net, "scheduler": flow_scheduler()}


def fibo() -> dict[str, Any]:
    """Return the components of Bria Fibo, which feeds a layer of SmolLM to each block."""
    net = diffusers.BriaFiboTransformer2DModel(**BRIA, joint_attention_dim=2 * WIDTH, text_encoder_dim=WIDTH)
    text = {"text_encoder": decoder("SmolLM3", head="ForCausalLM"), "tokenizer": bpe_tokenizer()}
    vae = wan_vae(in_channels=12, out_channels=12, patch_size=2, is_residual=True, scale_factor_spatial=16)
    return {**text, "vae": vae, "transformer": net, "scheduler": flow_scheduler()}


def fibo2() -> dict[str, Any]:
    """Return the components of Bria Fibo 2, which injects five bundles of text features."""
    net = diffusers.BriaFibo2Transformer2DModel(
        in_channels=2,
        dim=32,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=3 * WIDTH,
        injection_layer_ids=(0, 1, 2, 3, 4),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=4,
        gist_max_text_len=64,
        axes_dims=(4, 6, 6),
        axes_lens=(256, 32, 32),
    )
    return {**vlm3_parts(layers=DEEP), "vae": flux2_vae(), "transformer": net, "scheduler": flow_scheduler()}


FIBO = TEXT | BIG | {"prompt": '{"text": "a red circle"}', "max_sequence_length": 64}
EDIT = {
    "prompt": '{"text": "a red circle", "edit_instruction": "make the circle red"}',
    "image": picture(64),
    "_auto_resize": False,
}

BUILDERS: dict[str, Builder] = {
    "Bria": lambda: make("Bria", bria(), CFG, "image", "bria"),
    "BriaFibo": lambda: make("BriaFibo", fibo(), FIBO, "image", "bria_fibo"),
    "BriaFiboEdit": lambda: make("BriaFiboEdit", fibo(), FIBO | EDIT, "image", "bria_fibo"),
    "BriaFibo2": lambda: make("BriaFibo2", fibo2(), TEXT | SIZE | {"render_text_images": False}, "image", "bria_fibo2"),
}
