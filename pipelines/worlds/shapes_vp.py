"""`shapes-vp`: the shapes by variance-preserving diffusion, in a stock ``StableDiffusionPipeline`` with a small U-Net.

    x_t = √ᾱ_t x0 + √(1 - ᾱ_t) ε,   t uniform on the scheduler's 1,000 steps (Ho et al. 2006.11239, scaled-linear β)

Two worlds: ``EPSILON`` predicts ε, ``VELOCITY`` predicts ``√ᾱ ε - √(1 - ᾱ) x0`` (Salimans & Ho 2202.00512). Autoencoder
and data are those of `shapes`. The ε loss is weighted by min(SNR, 5) / SNR and the v loss by min(SNR, 5) / (SNR + 1),
which is the same weight on x0 (Hang et al. 2303.09556).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from flowalign.pipelines.worlds import scenes, shapes, store
from flowalign.pipelines.worlds.parts import word_tokenizer
from flowalign.pipelines.worlds.train import Stage, World

__all__ = ["EPSILON", "VELOCITY"]

Prediction = Literal["epsilon", "v_prediction"]
TEXT = 64


def build(prediction: Prediction) -> StableDiffusionPipeline:
    """Return the untrained pipeline around the autoencoder of `shapes`."""
    tokenizer = word_tokenizer([str(c) for c in scenes.captions()], shapes.TOKENS)
    unet = UNet2DConditionModel(
        sample_size=scenes.SIZE // 2, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    nn.init.zeros_(unet.conv_out.weight)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=2 * TEXT, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=shapes.TOKENS, eos_token_id=1, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(store.path("shapes"), subfolder="vae"),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def loss(pipe: Any, g: torch.Generator, prediction: Prediction) -> Tensor:
    """Return the weighted squared error of one batch."""
    images, index = shapes.draw(pipe, g, shapes.BATCH, shapes.HARDER)
    with torch.no_grad():
        # StableDiffusionPipeline divides by the scale and knows no shift
        x0 = pipe.vae.encode(2 * images - 1).latent_dist.mean.float() * pipe.vae.config.scaling_factor
    known = shapes.ids(pipe.tokenizer, g.device)
    empty = torch.rand(len(images), generator=g, device=g.device) < shapes.DROPOUT
    text = pipe.text_encoder(known[torch.where(empty, len(known) - 1, index)])[0]
    noise = torch.randn(x0.shape, generator=g, device=g.device)
    t = torch.randint(1000, (len(images),), generator=g, device=g.device)
    kept = pipe.scheduler.alphas_cumprod.to(g.device)[t]
    a, s = kept.sqrt()[:, None, None, None], (1 - kept).sqrt()[:, None, None, None]
    out = pipe.unet(a * x0 + s * noise, t, text, return_dict=False)[0].float()
    snr = kept / (1 - kept)
    if prediction == "epsilon":
        target, weight = noise, snr.clamp(max=5) / snr
    else:
        target, weight = a * noise - s * x0, snr.clamp(max=5) / (snr + 1)
    return (weight * (out - target).square().mean((1, 2, 3))).mean()


def _world(name: str, prediction: Prediction) -> World:
    return World(
        name=name,
        summary=f"the shapes by VP diffusion, {prediction} (StableDiffusionPipeline, DDIM)",
        build=partial(build, prediction),
        stages=(
            Stage("diffusion", lambda p: [p.unet, p.text_encoder], partial(loss, prediction=prediction), 6000, lr=1e-3),
        ),
    )


EPSILON = _world("shapes-vp", "epsilon")
VELOCITY = _world("shapes-vp-v", "v_prediction")
