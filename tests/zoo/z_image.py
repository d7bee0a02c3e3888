"""Z-Image: text-to-image, image-to-image, inpainting, ControlNet."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers as tf

from .case import Builder, Case, make
from .dit_image import CFG, euler
from .llm import bpe_tokenizer, decoder
from .media import mask, picture
from .stable_diffusion import CHANGE
from .text import WIDTH
from .vaes import flow_vae


def z_image_transformer(**extra: Any) -> diffusers.ZImageTransformer2DModel:
    """Return one context refiner, one noise refiner and two joint blocks."""
    return diffusers.ZImageTransformer2DModel(
        **{
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": WIDTH,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 32, 32],
            **extra,
        }
    )


def z_image(**extra: Any) -> dict[str, Any]:
    """Return the components of Z-Image, whose text encoder is Qwen 3."""
    text = {"text_encoder": decoder("Qwen3"), "tokenizer": bpe_tokenizer()}
    return {**text, "vae": flow_vae(), "transformer": z_image_transformer(), **euler(), **extra}


def controlnet(extra: int = 0) -> diffusers.ZImageControlNetModel:
    """Return a ControlNet of one layer, which borrows the transformer's embedders."""
    return diffusers.ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=4 + extra,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )


def omni() -> dict[str, Any]:
    """Return the components of the omni variant, which shows its pictures to a SigLIP tower."""
    config = tf.Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=8,
        num_patches=16,
    )
    sight = {
        "siglip": tf.Siglip2VisionModel(config),
        "siglip_processor": tf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    }
    vae = flow_vae().bfloat16()  # the pipeline encodes in this precision whatever the autoencoder has
    return z_image(transformer=z_image_transformer(siglip_feat_dim=16), vae=vae, **sight)


def z(kind: str, inputs: dict[str, Any], given: dict[str, Any] | None = None) -> Case:
    """Return a pipeline of the Z-Image family."""
    notes = "edits the caller's list of prompts"
    if "ControlNet" in kind:
        notes += "; in diffusers 0.42.1 the ControlNet lacks the attribute gradient_checkpointing: no_grad only"
    return make(f"ZImage{kind}", given or z_image(), CFG | inputs, "image", "z_image", notes=notes)


HINT = {"control_image": picture(phase=1.0)}
PAINT = {"image": picture(), "mask_image": mask()}

BUILDERS: dict[str, Builder] = {
    "ZImage": lambda: z("", {}),
    "ZImageImg2Img": lambda: z("Img2Img", CHANGE),
    "ZImageInpaint": lambda: z("Inpaint", PAINT | CHANGE),
    "ZImageControlNet": lambda: z("ControlNet", HINT, z_image(controlnet=controlnet())),
    "ZImageControlNetInpaint": lambda: z("ControlNetInpaint", HINT | PAINT, z_image(controlnet=controlnet(extra=5))),
    "ZImageOmni": lambda: z("Omni", {"image": [picture(64)]}, omni()),
}
