"""`tones`: audio denoising as a conditional flow, half a second at 4 kHz.

A tone is a sum of decaying harmonics of random phase,

    s(τ) = Σ_{h=1..H} a_h e^{-δ τ} sin(2π h f τ + φ_h),    f in [80, 400] Hz,  H in {2, 3, 4},  a_h ~ U[.4, 1] / h

brought to an RMS of .15 to .25; the noisy version adds white noise at an SNR of 0 to 10 dB. The words say what
is known of the tone: "a low tone with two harmonics" (low: f < 140, middle, high: f ≥ 230).

The model is a stock ``StableAudio3InpaintPipeline``. That pipeline hands its transformer a reference waveform and a
mask, and the mask may say "keep everything": ``audio=noisy, mask_start_seconds=0, mask_end_seconds=0``. The network is
then trained to answer with the clean tone, so "inpainting nothing" means denoising. That reading of the arguments is
the compromise; every component is stock. Its ``AutoencoderSAME`` is not trained but set: without resampling blocks it
is a linear map of 32-sample patches, here the identity scaled to unit variance, exact to round-off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import (
    AutoencoderSAME,
    FlowMatchEulerDiscreteScheduler,
    StableAudio3DiTModel,
    StableAudio3InpaintPipeline,
)
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from torch import Tensor, nn
from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

from flowalign.pipelines.worlds.canvas import uniform
from flowalign.pipelines.worlds.parts import TEXT_WIDTH, TOKENS, flow_times, word_tokenizer
from flowalign.pipelines.worlds.train import Stage, World

__all__ = ["LENGTH", "RATE", "SECONDS", "WORLD", "ToneBatch", "draw", "sample"]

RATE, LENGTH, PATCH = 4000, 2048, 32  # Hz, samples, samples
SECONDS = LENGTH / RATE
PITCHES, NUMBERS = ("low", "middle", "high"), ("two", "three", "four")
BOUNDS = (80.0, 140.0, 230.0, 400.0)  # Hz
LEVEL = 0.25  # RMS of the latents' unit
BATCH, WIDTH = 16, 128
CAPTIONS = tuple(f"a {p} tone with {n} harmonics" for p in PITCHES for n in NUMBERS)


@dataclass(frozen=True)
class ToneBatch:
    """``clean`` and ``noisy`` waveforms ``(B, 1, 2048)`` in [-1, 1]; ``kind`` ``(B,)`` indexes :data:`CAPTIONS`."""

    clean: Tensor
    noisy: Tensor
    kind: Tensor

    @property
    def prompts(self) -> list[str]:
        """Return the words."""
        return [CAPTIONS[k] for k in self.kind.tolist()]

    def meta(self) -> list[dict[str, Tensor]]:
        """Return what the judges compare with, and the condition."""
        return [{"reference": c, "audio": n} for c, n in zip(self.clean, self.noisy, strict=True)]


def draw(g: torch.Generator, n: int) -> ToneBatch:
    """Draw ``n`` tones with their noisy versions, on the generator's device."""
    device = g.device
    pitch = torch.randint(3, (n,), generator=g, device=device)
    number = torch.randint(3, (n,), generator=g, device=device)
    low, high = (torch.tensor(b, device=device)[pitch] for b in (BOUNDS[:-1], BOUNDS[1:]))
    f = low * (high / low) ** torch.rand(n, generator=g, device=device)
    time = torch.arange(LENGTH, device=device) / RATE
    h = torch.arange(1, 5, device=device)
    phase = 2 * math.pi * (h[:, None] * f[:, None, None] * time + torch.rand(n, 4, 1, generator=g, device=device))
    level = uniform(g, 0.4, 1.0, n, 4) / h * (h <= number[:, None] + 2)
    clean = (level[..., None] * phase.sin()).sum(1) * torch.exp(-uniform(g, 0.0, 3.0, n, 1) * time)
    clean = clean * (uniform(g, 0.15, 0.25, n, 1) / clean.square().mean(1, keepdim=True).sqrt())
    snr = uniform(g, 0.0, 10.0, n, 1)
    noise = torch.randn(clean.shape, generator=g, device=device)
    noise = noise * clean.square().mean(1, keepdim=True).sqrt() * 10 ** (-snr / 20)
    clean = clean.clamp(-1, 1)
    return ToneBatch(clean[:, None], (clean + noise).clamp(-1, 1)[:, None], 3 * pitch + number)


def exact_autoencoder() -> AutoencoderSAME:
    """Return an ``AutoencoderSAME`` that cuts the waveform into 64 patches of 32 samples, and back."""
    vae = AutoencoderSAME(
        audio_channels=1, patch_size=PATCH, encoder_strides=[], encoder_c_mults=[], encoder_transformer_depths=[],
        latent_dim=PATCH, sampling_rate=RATE,
    )  # fmt: skip
    for part in (vae.encoder, vae.decoder):
        nn.init.eye_(part.proj.weight)
        nn.init.zeros_(part.proj.bias)
    vae.bottleneck.running_std.fill_(LEVEL)
    return vae.requires_grad_(False).eval()


def text_encoder(vocabulary: int) -> T5GemmaEncoderModel:
    """Return a one-layer T5Gemma encoder."""
    small = dict(
        vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=0, layer_types=["full_attention"],
    )  # fmt: skip
    return T5GemmaEncoderModel(
        T5GemmaConfig(
            encoder=T5GemmaModuleConfig(**small), decoder=T5GemmaModuleConfig(**small), is_encoder_decoder=False,
            vocab_size=vocabulary, dropout_rate=0.0,
        )
    )  # fmt: skip


def build() -> StableAudio3InpaintPipeline:
    """Return the untrained pipeline."""
    tokenizer = word_tokenizer(CAPTIONS)
    transformer = StableAudio3DiTModel(
        io_channels=PATCH, embed_dim=WIDTH, depth=4, num_heads=4, cond_token_dim=TEXT_WIDTH,
        global_cond_dim=TEXT_WIDTH, local_add_cond_dim=PATCH + 1, timestep_features_dim=64, ff_mult=2.0,
        num_memory_tokens=4, use_differential_attention=False,
    )  # fmt: skip
    nn.init.zeros_(transformer.proj_out.weight)
    return StableAudio3InpaintPipeline(
        vae=exact_autoencoder(),
        text_encoder=text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        duration_embedder=StableAudio3DurationEmbedder(output_dim=TEXT_WIDTH, fourier_dim=16, max_val=1.0),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),  # its times are the noise levels
    )


def latents(audio: Tensor) -> Tensor:
    """Return latents ``(B, 32, 64)`` of waveforms ``(B, 1, 2048)``: what the autoencoder does."""
    return audio.reshape(len(audio), -1, PATCH).mT / LEVEL


@lru_cache(maxsize=2)
def ids(tokenizer: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and masks ``(9, TOKENS)`` of all captions."""
    out = tokenizer(list(CAPTIONS), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return out.input_ids.to(device), out.attention_mask.to(device)


def flow_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Train everything but the autoencoder by flow matching."""
    batch = draw(g, BATCH)
    x0, given = latents(batch.clean), latents(batch.noisy)
    tokens, mask = (x[batch.kind] for x in ids(pipe.tokenizer, g.device))
    text = pipe.text_encoder(tokens, attention_mask=mask)[0]
    duration = pipe.encode_duration(SECONDS, g.device, 1, BATCH)
    context, mask = pipe.prepare_cross_attention(text, mask, duration)
    noise = torch.randn(x0.shape, generator=g, device=g.device)
    t = flow_times(BATCH, g)
    s = t[:, None, None]
    v = pipe.transformer(
        (1 - s) * x0 + s * noise,
        t,
        encoder_hidden_states=context,
        global_hidden_states=duration,
        encoder_attention_mask=mask,
        local_add_cond=torch.cat([torch.ones_like(given[:, :1]), given], 1),
        return_dict=False,
    )[0]
    return (v.float() - (noise - x0)).square().mean()


WORLD = World(
    name="tones",
    summary="denoise half a second of harmonics at 4 kHz, flow matching (StableAudio3InpaintPipeline)",
    build=build,
    stages=(
        Stage(
            "flow",
            lambda pipe: [pipe.transformer, pipe.text_encoder, pipe.duration_embedder],
            flow_loss,
            2000,
            lr=1.5e-3,
        ),
    ),
)


def sample(pipe: Any, batch: ToneBatch, *, steps: int = 10, seed: int = 0) -> Tensor:
    """Return denoised waveforms ``(B, 1, 2048)`` by the plain pipeline."""
    noise = torch.randn(len(batch.kind), PATCH, LENGTH // PATCH, generator=torch.Generator().manual_seed(seed))
    return pipe(
        batch.prompts, duration=SECONDS, audio=batch.noisy.to(pipe.device), mask_start_seconds=0, mask_end_seconds=0,
        num_inference_steps=steps, latents=noise.to(pipe.device),
    ).audios.float()  # fmt: skip
