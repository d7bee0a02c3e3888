"""`shapes-vp`: the shapes by variance-preserving diffusion, in a stock ``StableDiffusionPipeline`` with a small U-Net.

    x_t = √ᾱ_t x0 + √(1 - ᾱ_t) ε,   t uniform on the scheduler's 1,000 steps (Ho et al. 2006.11239, scaled-linear β)

Two worlds: ``EPSILON`` predicts ε, ``VELOCITY`` predicts ``√ᾱ ε - √(1 - ᾱ) x0`` (Salimans & Ho 2202.00512) and starts
from the trained ε model. Autoencoder and data are those of `shapes`, and so is the teacher: with a = √ᾱ, s = √(1 - ᾱ)
the same point, over a + s, lies on the flow's path at time τ = s / (a + s) (Karras et al. 2206.00364, section 2), so
that the velocity u which `shapes` has there names both ends of it,

    x̂0 = x_τ - τ u,   ε̂ = x_τ + (1 - τ) u

and the student learns ε̂ instead of the noise that was drawn: nearly the same mean, far less spread. Squared errors of
x0 are weighted by the signal-to-noise ratio within [.1, 5] (Hang et al. 2303.09556, who do without the floor). The
noisiest tenth of the times comes first, with two of the four words of relations, as in `shapes` and for its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from flowalign.pipelines.worlds import scenes, shapes, store
from flowalign.pipelines.worlds.parts import word_tokenizer
from flowalign.pipelines.worlds.train import Stage, World

__all__ = ["EPSILON", "VELOCITY", "ends"]

Prediction = Literal["epsilon", "v_prediction"]
Velocity = Callable[[Tensor, Tensor], Tensor]
TEXT = 64


def schedule(prediction: Prediction) -> DDIMScheduler:
    """Return the scheduler; trailing steps begin at the noisiest time (Lin et al. 2305.08891)."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="trailing", prediction_type=prediction,
    )  # fmt: skip


def build(prediction: Prediction) -> StableDiffusionPipeline:
    """Return the pipeline around the autoencoder of `shapes`: untrained, or `shapes-vp` about to predict v."""
    if prediction == "v_prediction":
        pipe: StableDiffusionPipeline = DiffusionPipeline.from_pretrained(store.path("shapes-vp"))
        pipe.register_modules(scheduler=schedule(prediction))
        return pipe
    tokenizer = word_tokenizer([str(c) for c in scenes.captions()], shapes.TOKENS)
    unet = UNet2DConditionModel(
        sample_size=scenes.SIZE // 2, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    nn.init.zeros_(unet.conv_out.weight)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=2 * TEXT, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=shapes.TOKENS, eos_token_id=1, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(store.path("shapes"), subfolder="vae"),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=schedule(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def ends(velocity: Velocity, x: Tensor, kept: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Return the data point and the noise that a flow model sees behind a VP point, ``(B, C, H, W)`` each.

    Args:
        velocity: the flow model, ``(x_τ, τ (B,)) → ε - x0`` on latents less ``shift``.
        x: ``√ᾱ x0 + √(1 - ᾱ) ε``.
        kept: ᾱ ``(B,)``.
        shift: what the flow's latents lack: StableDiffusionPipeline scales latents and knows no shift.
    """
    a, s = kept.sqrt(), (1 - kept).sqrt()
    tau, total, a = s / (a + s), (a + s)[:, None, None, None], a[:, None, None, None]
    flow = (x - a * shift) / total
    u = velocity(flow, tau).float()
    tau_ = tau[:, None, None, None]
    return flow - tau_ * u + shift, flow + (1 - tau_) * u


def loss(
    pipe: Any, g: torch.Generator, prediction: Prediction, mix: Sequence[float] = shapes.SETTLE, earliest: int = 0,
    simple: bool = False,
) -> Tensor:  # fmt: skip
    """Return the weighted squared error of one batch, at times from ``earliest`` on; the rest as in `shapes`."""
    images, index = shapes.draw(g, shapes.BATCH, mix, simple)
    known, master = shapes.ids(pipe.tokenizer, g.device), store.frozen("shapes", g.device)
    empty = torch.rand(len(images), generator=g, device=g.device) < shapes.DROPOUT
    tokens = known[torch.where(empty, len(known) - 1, index)]
    scale = pipe.vae.config.scaling_factor
    with torch.no_grad():
        x0 = pipe.vae.encode(2 * images - 1).latent_dist.mean.float() * scale
        noise = torch.randn(x0.shape, generator=g, device=g.device)
        t = torch.randint(earliest, 1000, (len(images),), generator=g, device=g.device)
        kept = pipe.scheduler.alphas_cumprod.to(g.device)[t]
        a, s = kept.sqrt()[:, None, None, None], (1 - kept).sqrt()[:, None, None, None]
        x = a * x0 + s * noise
        embeds, pooled = shapes.encode(master, tokens)
        x0, noise = ends(
            lambda x, tau: master.transformer(x, embeds, pooled, 1000 * tau, return_dict=False)[0],
            x, kept, pipe.vae.config.shift_factor * scale,
        )  # fmt: skip
    out = pipe.unet(x, t, pipe.text_encoder(tokens)[0], return_dict=False)[0].float()
    snr = kept / (1 - kept)
    target, per_x0 = (noise, snr) if prediction == "epsilon" else (a * noise - s * x0, snr + 1)
    return (snr.clamp(0.1, 5) / per_x0 * (out - target).square().mean((1, 2, 3))).mean()


def _world(name: str, prediction: Prediction, *parts: tuple[str, int, float, dict[str, Any]]) -> World:
    """Return a world with a stage for each (name, steps, rate, what :func:`loss` is told)."""
    return World(
        name=name,
        summary=f"the shapes by VP diffusion, {prediction} (StableDiffusionPipeline, DDIM)",
        build=partial(build, prediction),
        stages=tuple(
            Stage(part, lambda p: [p.unet, p.text_encoder], partial(loss, prediction=prediction, **told), steps, lr=lr)
            for part, steps, lr, told in parts
        ),
    )


WORDINGS = {"mix": shapes.WORDING, "earliest": 900}
EPSILON = _world(
    "shapes-vp",
    "epsilon",
    ("first", 1000, 1e-3, {**WORDINGS, "simple": True}),
    ("means", 1000, 1e-3, WORDINGS),
    ("diffusion", 4000, 1e-3, {}),
)
VELOCITY = _world("shapes-vp-v", "v_prediction", ("diffusion", 1500, 5e-4, {}))
