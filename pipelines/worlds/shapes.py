"""`shapes`: captioned coloured shapes at 32×32 by flow matching, an ordinary ``StableDiffusion3Pipeline``.

Stock parts throughout: a trained ``AutoencoderKL`` that halves the edges, an ``SD3Transformer2DModel`` on 64 image
tokens, two small CLIP text encoders trained along with it, and a vocabulary of the captions' own words.

    min E |v(x_t, t, caption) - (ε - x0)|²,    x_t = (1 - t) x0 + t ε    (:mod:`.shapes_training` says in what order)

Why there is a Funnel encoder in the third text slot: ``StableDiffusion3Pipeline`` without a third encoder cannot be
loaded by ``from_pretrained(folder)`` alone, and feeds its transformer 256 zero tokens; a T5 feeds it 256 tokens too, by
default, at four times the cost of the 64 image tokens. A Funnel transformer pools its sequence: nine halving blocks
turn the 256 tokens into one. Its weights are zero, so that token is a constant zero and the pipeline needs no argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, FunnelBaseModel, FunnelConfig

from flowalign.pipelines.worlds import scenes, splits
from flowalign.pipelines.worlds.parts import autoencoder, word_tokenizer
from flowalign.pipelines.worlds.targets import first_wordings

__all__ = ["TOKENS", "build", "choose", "draw", "encode", "ids", "latents", "table"]

TOKENS = 10  # the longest caption has eight words and an end
BATCH = 32
EVEN = (1.0, 1.0, 1.0, 1.0)  # single, count, relation, mixed
HARDER = (0.1, 0.25, 0.35, 0.3)
WORDING = (0.1, 0.2, 0.6, 0.1)
SETTLE = (0.1, 0.25, 0.4, 0.25)
DROPOUT = 0.1
WIDTH = 96
TEXT = 64  # of each CLIP encoder


def clip_encoder(vocabulary: int, width: int = TEXT) -> CLIPTextModelWithProjection:
    """Return a two-layer CLIP text encoder."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=TOKENS, eos_token_id=1, bos_token_id=0, pad_token_id=0,
            projection_dim=width,
        )
    )  # fmt: skip


def zero_encoder(vocabulary: int, width: int = 2 * TEXT) -> FunnelBaseModel:
    """Return an encoder whose output is one zero token, whatever it reads (see the top of this file)."""
    model = FunnelBaseModel(
        FunnelConfig(
            vocab_size=vocabulary, block_sizes=[1] * 9, num_decoder_layers=0, d_model=width, n_head=1, d_head=2,
            d_inner=2, separate_cls=False, truncate_seq=False, hidden_dropout=0.0, attention_dropout=0.0,
        )
    )  # fmt: skip
    for p in model.parameters():
        nn.init.zeros_(p)
    return model.requires_grad_(False)


def build() -> StableDiffusion3Pipeline:
    """Return the untrained pipeline."""
    tokenizer = word_tokenizer([str(c) for c in scenes.captions()], TOKENS)
    vae = autoencoder((16, 32), latent_channels=4)
    transformer = SD3Transformer2DModel(
        sample_size=scenes.SIZE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=4,
        attention_head_dim=32, num_attention_heads=WIDTH // 32, caption_projection_dim=WIDTH,
        joint_attention_dim=2 * TEXT, pooled_projection_dim=2 * TEXT, pos_embed_max_size=scenes.SIZE // 4,
        qk_norm="rms_norm",
    )  # fmt: skip
    # modulation and output start at zero, as DiTs do: every block is the identity at first
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name == "proj_out" or (name.endswith(".linear") and "norm" in name)):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    n = len(tokenizer)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),  # ten steps do better where layouts are decided
        vae=vae,
        text_encoder=clip_encoder(n),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(n),
        tokenizer_2=tokenizer,
        text_encoder_3=zero_encoder(n),
        tokenizer_3=tokenizer,
    )


@lru_cache(maxsize=4)
def table(device: torch.device) -> scenes.Layout:
    """Return the layouts of all captions that the base model is shown."""
    return scenes.Layout(splits.base(), device)


@lru_cache(maxsize=4)
def ids(tokenizer: Any, device: torch.device) -> Tensor:
    """Return the token ids of all base captions, and of the empty one last, ``(C + 1, TOKENS)``."""
    text = [*map(str, splits.base()), ""]
    out = tokenizer(text, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return out.input_ids.to(device)


def encode(pipe: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return prompt embeddings ``(B, TOKENS + 1, 128)``, pooled ones ``(B, 128)``, as ``encode_prompt`` makes."""
    one = pipe.text_encoder(tokens, output_hidden_states=True)
    two = pipe.text_encoder_2(tokens, output_hidden_states=True)
    clip = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
    return nn.functional.pad(clip, (0, 0, 0, 1)), torch.cat([one[0], two[0]], -1)


@lru_cache(maxsize=4)
def first_wording(device: torch.device) -> Tensor:
    """Return :func:`~flowalign.pipelines.worlds.targets.first_wordings` of the base captions."""
    return first_wordings(splits.base()).to(device)


def choose(g: torch.Generator, n: int = BATCH, mix: Sequence[float] = EVEN, simple: bool = False) -> Tensor:
    """Return caption indices ``(n,)``, the categories as often as ``mix`` says.

    ``simple`` ones tell relations by "above" and "left of" (:func:`first_wording`).
    """
    groups = splits.base_groups(g.device)
    if mix == EVEN:
        kind = torch.randint(len(groups), (n,), generator=g, device=g.device)
    else:
        kind = torch.multinomial(torch.tensor(mix, device=g.device), n, replacement=True, generator=g)
    u = torch.rand(n, generator=g, device=g.device)
    sizes = torch.tensor([len(x) for x in groups], device=g.device)
    offset = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])
    index = torch.cat(groups)[offset[kind] + (u * sizes[kind]).long()]
    return first_wording(g.device)[index] if simple else index


def draw(
    g: torch.Generator, n: int = BATCH, mix: Sequence[float] = EVEN, simple: bool = False
) -> tuple[Tensor, Tensor]:
    """Return pictures ``(n, 3, 32, 32)`` and their caption indices ``(n,)`` (:func:`choose`)."""
    index = choose(g, n, mix, simple)
    return scenes.draw(table(g.device)(index, g)), index


def latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return normalised latents ``(B, 4, 16, 16)`` of pictures in [0, 1]."""
    z = vae.encode(2 * images - 1).latent_dist.mean
    return (z - vae.config.shift_factor) * vae.config.scaling_factor
