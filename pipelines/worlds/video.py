"""`shapes-video`: one object in nine 16×16 frames, moving as told or as gravity has it (:mod:`.motions`).

The model is a ``WanImageToVideoPipeline`` of stock parts as in Wan 2.2 (no image encoder), called with
``image=first, height=16, width=16, num_frames=8`` (with an autoencoder that keeps every frame the pipeline rounds 8 up
to 9), ``guidance_scale=1, max_sequence_length=8``; ``first`` ``(1, 3, 16, 16)`` is in [0, 1], or a PIL picture.

The first frame is given, not only for the task's sake: the transformer has rotary positions and nothing else, so in
pure noise its tokens know neither where a frame ends nor which one is first. A text-to-video model a third wider stayed
at 0 strict: from a true point of the path at time .7 one step gave .91 strict videos, at .9 .09. The stock pipeline
takes one picture a call, for however many prompts; :func:`sample` tells how to give each prompt its own.

Its ``AutoencoderKLWan`` is not trained but *set* (:func:`exact_autoencoder`): it only folds 2×2 pixels into channels
and undoes it. A norm and a SiLU stand in the way; both are passed exactly enough by carrying every value as a pair
±z beside large constants K: the norm then divides by nearly a constant, and ``silu(z) - silu(-z) = z``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from flowalign.pipelines.patching import swapped
from flowalign.pipelines.worlds.canvas import COLOURS
from flowalign.pipelines.worlds.motions import FRAMES, KINDS, MOTIONS, SIZE, caption, compositions, draw
from flowalign.pipelines.worlds.parts import TEXT_WIDTH, TOKENS, flow_times, shifted, word_tokenizer
from flowalign.pipelines.worlds.train import Stage, World

__all__ = ["WORLD", "sample"]

BATCH, DROPOUT, WIDTH, GUARD = 8, 0.1, 96, 512.0
CHANNELS = 12  # of the latents: 2×2 pixels of three colours


def exact_autoencoder() -> AutoencoderKLWan:
    """Return an ``AutoencoderKLWan`` that folds 2×2 pixels into 12 channels and back, to 1e-4 (see the module)."""
    z, width = CHANNELS, 26
    vae = AutoencoderKLWan(
        base_dim=width, z_dim=z, dim_mult=[1], num_res_blocks=0, temperal_downsample=[], in_channels=z, out_channels=z,
        patch_size=2, scale_factor_temporal=1, scale_factor_spatial=2, latents_mean=[0.0] * z, latents_std=[1.0] * z,
    )  # fmt: skip
    for p in vae.parameters():
        nn.init.zeros_(p)
    eye = torch.eye(z)
    constants = width - 2 * z
    for part in (vae.encoder, vae.decoder):
        part.conv_in.weight.data[: 2 * z, :, -1, 1, 1] = torch.cat([eye, -eye])
        part.conv_in.bias.data[2 * z :] = GUARD
        part.norm_out.gamma.data.fill_(1.0)
        scale = GUARD * constants**0.5 / width**0.5  # what the norm divides by
        part.conv_out.weight.data[:z, : 2 * z, -1, 1, 1] = torch.cat([eye, -eye], 1) * scale
    vae.quant_conv.weight.data[:z, :z, 0, 0, 0] = eye
    vae.quant_conv.bias.data[z:] = -30.0  # log-variance: no noise
    vae.post_quant_conv.weight.data[:, :, 0, 0, 0] = eye
    return vae.requires_grad_(False).eval()


def build() -> WanImageToVideoPipeline:
    """Return the untrained pipeline."""
    tokenizer = word_tokenizer([caption(*x) for s in ("base", "withheld") for x in compositions(s)])
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=16, num_heads=4, d_ff=128, num_layers=2,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip
    vae = exact_autoencoder()
    x = patchify(2 * draw(torch.Generator().manual_seed(5), 256).video.movedim(2, 1) - 1, 2)
    mean, std = x.mean((0, 2, 3, 4)), x.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=WIDTH // 32, attention_head_dim=32, in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS, text_dim=TEXT_WIDTH, freq_dim=128, ffn_dim=4 * WIDTH, num_layers=4, rope_max_seq_len=32,
    )  # fmt: skip
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return WanImageToVideoPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        transformer=transformer,
    )  # fmt: skip


def latents(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Return normalised latents ``(B, 12, F, 8, 8)`` of videos ``(B, F, 3, 16, 16)``: what the autoencoder does."""
    x = patchify(2 * video.movedim(2, 1) - 1, 2)
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=x.device).reshape(shape)
    return (x - mean) / torch.tensor(vae.config.latents_std, device=x.device).reshape(shape)


def condition(vae: AutoencoderKLWan, first: Tensor) -> Tensor:
    """Return ``(B, 13, 9, 8, 8)`` of first frames ``(B, 3, 16, 16)`` in [0, 1], as the pipeline's ``prepare_latents``.

    One channel tells which frames are given; the others are latents of the first frame and of zeros after it, where
    the pipeline's zeros are a middle grey.
    """
    grey = torch.full_like(first, 0.5)[:, None].expand(-1, FRAMES - 1, -1, -1, -1)
    z = latents(vae, torch.cat([first[:, None], grey], 1))
    mask = torch.zeros_like(z[:, :1])
    mask[:, :, 0] = 1
    return torch.cat([mask, z], 1)


@lru_cache(maxsize=2)
def ids(tokenizer: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and masks ``(21 · 6 · 3 + 1, TOKENS)`` of all captions in order, and of the empty one last."""
    every = [(m, c, s) for m in range(len(MOTIONS)) for c in range(len(COLOURS)) for s in range(len(KINDS))]
    text = [*(caption(*x) for x in every), ""]
    out = tokenizer(text, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return out.input_ids.to(device), out.attention_mask.to(device)


def flow_loss(pipe: Any, g: torch.Generator, shifts: tuple[float, ...] = (1.0, 4.0), paths: float = 1.0) -> Tensor:
    """Train the transformer and the text encoder by flow matching, at times with these shifts; scalar."""
    batch = draw(g, BATCH, paths=paths)
    x0 = latents(pipe.vae, batch.video)
    tokens, mask = ids(pipe.tokenizer, g.device)
    row = (batch.names[:, 0] * len(COLOURS) + batch.names[:, 1]) * len(KINDS) + batch.names[:, 2]
    row = torch.where(torch.rand(BATCH, generator=g, device=g.device) < DROPOUT, len(tokens) - 1, row)
    text = pipe.text_encoder(tokens[row], mask[row]).last_hidden_state * mask[row][..., None]
    noise = torch.randn(x0.shape, generator=g, device=g.device)
    t = shifted(flow_times(BATCH, g), shifts)
    s = t[:, None, None, None, None]
    x = torch.cat([(1 - s) * x0 + s * noise, condition(pipe.vae, batch.video[:, 0])], 1)
    v = pipe.transformer(hidden_states=x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)[0]
    return (v.float() - (noise - x0)).square().mean()


def noisier_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Go on at noisier times: only there has the motion to come from the words and the first frame.

    After 2,000 steps one step from a true point of the path was right .84 of times at time .7, .08 at .9, 0 at .999;
    after these 4,000 more .63 at .9 and .40 at .999.
    """
    return flow_loss(pipe, g, (2.0, 8.0))


def path_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Go on with four times as many paths: 1 in 1,000 was right when .28 of moves were."""
    return flow_loss(pipe, g, (2.0, 8.0), paths=4.0)


def denoisers(pipe: Any) -> list[nn.Module]:
    """Return what flow matching trains."""
    return [pipe.transformer, pipe.text_encoder]


WORLD = World(
    name="shapes-video",
    summary="one moving object, with actions or gravity, 9 frames of 16×16, flow matching (WanImageToVideoPipeline)",
    build=build,
    stages=(
        Stage("flow", denoisers, flow_loss, 6000, lr=1.5e-3, until=0.35),
        Stage("noisier", denoisers, noisier_loss, 4000, lr=1.5e-3),
        Stage("paths", denoisers, path_loss, 5000, lr=1.2e-3),
    ),
)


def sample(
    pipe: Any, prompts: list[str], first: Tensor, *, steps: int = 10, guidance: float = 1.0, seed: int = 0
) -> Tensor:
    """Return videos ``(B, 9, 3, 16, 16)`` that begin with ``first`` ``(B, 3, 16, 16)``, by the plain pipeline.

    The stock ``prepare_latents`` repeats its pictures once for every prompt and so takes one only; here it is asked
    prompt by prompt, and all the rest of the call runs in one batch.
    """
    stock = pipe.prepare_latents

    def prepare(image: Tensor, batch: int, *rest: Any) -> tuple[Tensor, ...]:
        *sizes, start, last = rest
        each = [stock(image[i : i + 1], 1, *sizes, start[i : i + 1], last) for i in range(batch)]
        return tuple(map(torch.cat, zip(*each, strict=True)))

    shape = (len(prompts), CHANNELS, FRAMES, SIZE // 2, SIZE // 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with swapped(pipe, "prepare_latents", prepare):
        return pipe(
            prompt=prompts, image=first.to(pipe.device), height=SIZE, width=SIZE, num_frames=FRAMES - 1,
            num_inference_steps=steps, guidance_scale=guidance, latents=noise.to(pipe.device),
            max_sequence_length=TOKENS, output_type="pt",
        ).frames.float()  # fmt: skip
