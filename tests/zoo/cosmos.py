"""Cosmos: world models on Karras' process, rectified flow, and one transformer for everything."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin

from .case import Builder, Case, make
from .dit_image import t5_side
from .llm import bpe_tokenizer, qwen25_vl
from .ltx import TEXT
from .media import clip, picture
from .text import WIDTH
from .vaes import wan_vae

BIG = {"height": 32, "width": 32}
SHAPE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "mlp_ratio": 2.0,
    "adaln_lora_dim": 4,
    "max_size": (4, 16, 16),
    "extra_pos_embed_type": "learnable",
}


class OpenDoor(diffusers.ModelMixin, ConfigMixin):
    """A guardrail that lets everything pass, in place of one that needs a download."""

    def __init__(self) -> None:
        super().__init__()
        self.here = torch.nn.Parameter(torch.zeros(1))  # tells diffusers the device

    def check_text_safety(self, prompt: str) -> bool:
        """Return that the prompt is safe."""
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        """Return the frames as they are."""
        return frames


def transformer(channels: int = 17, out: int = 16, **extra: Any) -> diffusers.CosmosTransformer3DModel:
    """Return two blocks."""
    return diffusers.CosmosTransformer3DModel(
        **{"in_channels": channels, "out_channels": out, "num_layers": 2, "text_embed_dim": WIDTH, **SHAPE, **extra}
    )


def first(channels: int) -> dict[str, Any]:
    """Return the components of Cosmos 1: Karras' process."""
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=32,
        num_layers=1,
        patch_size=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        latents_mean=[0.0] * 4 * 16,
        latents_std=[1.0] * 4 * 16,
    )
    solver = diffusers.EDMEulerScheduler(sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min")
    net = transformer(channels, 4)
    return {**t5_side(), "vae": vae, "transformer": net, "scheduler": solver, "safety_checker": OpenDoor()}


def second(channels: int = 17) -> dict[str, Any]:
    """Return the components of Cosmos 2: rectified flow read through ``sigma / (1 + sigma)``."""
    solver = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    net = transformer(channels)
    return {**t5_side(), "vae": wan_vae(), "transformer": net, "scheduler": solver, "safety_checker": OpenDoor()}


LONG = {"max_sequence_length": 128}  # the chat template comes first


def later(**extra: Any) -> dict[str, Any]:
    """Return the components of Cosmos 2.5, whose text encoder hands out all its layers side by side."""
    net = transformer(**{"text_embed_dim": 2 * WIDTH, **extra})
    return {
        "text_encoder": qwen25_vl(),
        "tokenizer": bpe_tokenizer(),
        "vae": wan_vae(),
        "transformer": net,
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        "safety_checker": OpenDoor(),
    }


def transfer() -> dict[str, Any]:
    """Return the components of Cosmos 2.5 Transfer, a ControlNet on video."""
    seen = {"img_context_dim_in": 16, "img_context_dim_out": 2 * WIDTH}
    net = diffusers.CosmosControlNetModel(
        **SHAPE,
        **seen,
        n_controlnet_blocks=2,
        in_channels=18,
        latent_channels=18,
        model_channels=32,
        text_embed_dim=2 * WIDTH,
    )
    return later(controlnet_block_every_n=1, img_context_num_tokens=2, **seen) | {"controlnet": net}


def omni() -> dict[str, Any]:
    """Return the components of Cosmos 3."""
    net = diffusers.Cosmos3OmniTransformer(
        head_dim=12,
        hidden_size=24,
        intermediate_size=32,
        latent_channel=16,
        latent_patch_size=2,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=64,
        rope_axes_dim=[2, 2, 2],
        vocab_size=1024,
    )
    return {
        "text_tokenizer": bpe_tokenizer(),
        "vae": wan_vae(),
        "transformer": net.to(torch.float32),
        "scheduler": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        "enable_safety_checker": False,
    }


def cosmos(name: str, given: dict[str, Any], inputs: dict[str, Any], modality: str = "video", **rest: Any) -> Case:
    """Return a pipeline of the Cosmos family."""
    return make(name, given, TEXT | BIG | inputs, modality, "cosmos", **rest)


FIVE, FIRST = {"num_frames": 5}, {"image": picture(32)}
TWICE = "step is called twice in an iteration"
CONTROL = {"controls": clip(5, 32), "num_frames": 5, "num_frames_per_chunk": 5}
OMNI = {"prompt": "a red circle", "num_frames": 5, "guidance_scale": 3.0, "use_system_prompt": False} | BIG

BUILDERS: dict[str, Builder] = {
    "CosmosTextToWorld": lambda: cosmos("CosmosTextToWorld", first(4), FIVE, notes=TWICE),
    "CosmosVideoToWorld": lambda: cosmos(
        "CosmosVideoToWorld", first(5), FIVE | FIRST, notes=f"{TWICE}; draws noise in the loop"
    ),
    "Cosmos2TextToImage": lambda: cosmos("Cosmos2TextToImage", second(16), {}, "image"),
    "Cosmos2VideoToWorld": lambda: cosmos("Cosmos2VideoToWorld", second(), FIVE | FIRST),
    "Cosmos2_5_PredictBase": lambda: cosmos("Cosmos2_5_PredictBase", later(), FIVE | LONG),
    "Cosmos2_5_PredictBase_image": lambda: cosmos("Cosmos2_5_PredictBase", later(), FIVE | FIRST | LONG),
    "Cosmos2_5_Transfer": lambda: cosmos("Cosmos2_5_Transfer", transfer(), CONTROL | LONG, notes="chunk by chunk"),
    "Cosmos3Omni": lambda: make("Cosmos3Omni", omni(), OMNI, "video", "cosmos3"),
}
