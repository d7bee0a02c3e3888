"""`shapes`: captioned coloured shapes at 32×32 by flow matching, an ordinary ``StableDiffusion3Pipeline``.

Stock parts throughout: a trained ``AutoencoderKL`` that halves the edges, an ``SD3Transformer2DModel`` on 64 image
tokens, two small CLIP text encoders trained along with it, and a vocabulary of the captions' own words.

    min E |v(x_t, t, caption) - (ε - x0)|²,    x_t = (1 - t) x0 + t ε,    logit-normal t, 10 % empty captions

Why there is a Funnel encoder in the third text slot: ``StableDiffusion3Pipeline`` without a third encoder cannot be
loaded by ``from_pretrained(folder)`` alone, and feeds its transformer 256 zero tokens; a T5 feeds it 256 tokens too, by
default, at four times the cost of the 64 image tokens. A Funnel transformer pools its sequence: nine halving blocks
turn the 256 tokens into one. Its weights are zero, so that token is a constant zero and the pipeline needs no argument.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

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
from flowalign.pipelines.worlds.parts import (
    autoencoder,
    autoencoder_loss,
    flow_times,
    normalise,
    shifted,
    word_tokenizer,
)
from flowalign.pipelines.worlds.targets import first_wordings, posterior_mean
from flowalign.pipelines.worlds.train import Stage, World

__all__ = ["TOKENS", "WORLD", "encode", "latents"]

TOKENS = 10  # the longest caption has eight words and an end
BATCH = 32
EVEN = (1.0, 1.0, 1.0, 1.0)  # single, count, relation, mixed
HARDER = (0.1, 0.25, 0.35, 0.3)
WORDING = (0.1, 0.2, 0.6, 0.1)
SETTLE = (0.1, 0.25, 0.4, 0.25)
DROPOUT = 0.1
GUIDANCE, BELOW = 2.0, 0.95  # folded into the weights by the last stage; at noisier times it costs counts
REFERENCES = 64  # pictures of each caption that steady the targets
NOISE = 1e6  # as a shift of times: pure noise
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


def choose(g: torch.Generator, n: int = BATCH, mix: Sequence[float] = EVEN) -> Tensor:
    """Return caption indices ``(n,)``, the categories as often as ``mix`` says."""
    groups = splits.base_groups(g.device)
    if mix == EVEN:
        kind = torch.randint(len(groups), (n,), generator=g, device=g.device)
    else:
        kind = torch.multinomial(torch.tensor(mix, device=g.device), n, replacement=True, generator=g)
    u = torch.rand(n, generator=g, device=g.device)
    sizes = torch.tensor([len(x) for x in groups], device=g.device)
    offset = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])
    return torch.cat(groups)[offset[kind] + (u * sizes[kind]).long()]


def draw(pipe: Any, g: torch.Generator, n: int = BATCH, mix: Sequence[float] = EVEN) -> tuple[Tensor, Tensor]:
    """Return pictures ``(n, 3, 32, 32)`` and their caption indices ``(n,)`` (:func:`choose`)."""
    index = choose(g, n, mix)
    return scenes.draw(table(g.device)(index, g)), index


def latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return normalised latents ``(B, 4, 16, 16)`` of pictures in [0, 1]."""
    z = vae.encode(2 * images - 1).latent_dist.mean
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def picture_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Train the autoencoder."""
    images, _ = draw(pipe, g, 16)
    edge = scenes.SIZE // 2
    noise = torch.randn(len(images), pipe.vae.config.latent_channels, edge, edge, generator=g, device=g.device)
    return autoencoder_loss(pipe.vae, images, noise)


def set_scale(pipe: Any, g: torch.Generator) -> None:
    """Give latents mean 0 and standard deviation 1."""
    normalise(pipe.vae, draw(pipe, g, 512)[0])


@lru_cache(maxsize=1)
def references(vae: AutoencoderKL, device: torch.device) -> Tensor:
    """Return latents of :data:`REFERENCES` pictures of every base caption, ``(C, REFERENCES, 1024)`` in bfloat16."""
    g = torch.Generator(device).manual_seed(77)
    every = torch.arange(len(splits.base()), device=device).repeat_interleave(REFERENCES)
    with torch.no_grad():
        drawn = [latents(vae, scenes.draw(table(device)(i, g))).flatten(1).bfloat16() for i in every.split(256)]
    return torch.cat(drawn).unflatten(0, (-1, REFERENCES))


@lru_cache(maxsize=4)
def first_wording(device: torch.device) -> Tensor:
    """Return :func:`~flowalign.pipelines.worlds.targets.first_wordings` of the base captions."""
    return first_wordings(splits.base()).to(device)


def flow_loss(
    pipe: Any, g: torch.Generator, mix: Sequence[float] = SETTLE, shifts: Sequence[float] = (1.0, 1.0, 4.0, NOISE),
    simple: bool = False,
) -> Tensor:  # fmt: skip
    """Train the transformer and the text encoders by flow matching, with steadied targets.

    Args:
        pipe: the pipeline.
        g: of the batch.
        mix: how often each category is drawn.
        shifts: times ``t`` become ``s t / (1 + (s - 1) t)``, the shifts s dealt out over the batch; s > 1 is towards
            noise.
        simple: relations are told by "above" and "left of" alone.
    """
    index = choose(g, BATCH, mix)
    index = first_wording(g.device)[index] if simple else index
    known = ids(pipe.tokenizer, g.device)
    empty = torch.rand(BATCH, generator=g, device=g.device) < DROPOUT
    embeds, pooled = encode(pipe, known[torch.where(empty, len(known) - 1, index)])
    t = shifted(flow_times(BATCH, g)[torch.randperm(BATCH, generator=g, device=g.device)], shifts)
    t_ = t[:, None, None, None]
    with torch.no_grad():
        x0 = latents(pipe.vae, scenes.draw(table(g.device)(index, g))).float()
        x = torch.lerp(x0, torch.randn(x0.shape, generator=g, device=g.device), t_)
        others = references(pipe.vae, g.device)[index].float()
        mean = posterior_mean(x.flatten(1), 1 - t, t, torch.cat([x0.flatten(1)[:, None], others], 1)).view_as(x0)
        target = (x - torch.where(empty[:, None, None, None], x0, mean)) / t_
    v = pipe.transformer(
        hidden_states=x, timestep=1000 * t, encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False
    )[0]
    return (v.float() - target).square().mean()


def first_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Learn a caption's mean picture, which is the answer to pure noise; relations by two of their four words."""
    return flow_loss(pipe, g, WORDING, (NOISE,), simple=True)


def mean_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Learn a caption's mean picture, all wordings."""
    return flow_loss(pipe, g, WORDING, (NOISE,))


def layout_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Go on where the layout is decided, t = .75 to .95: from a true point at .7 the sampler was right 99 times in 100.

    From .8, .85, .9, .95 and pure noise .98, .89, .76, .68 and .61 of 150 relations were, after `flow`.
    """
    return flow_loss(pipe, g, SETTLE, (6.0, 6.0, 6.0, 1.5))


TEACHERS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def keep_teacher(pipe: Any) -> None:
    """Keep the transformer as it is now, as the teacher of :func:`guided_loss`."""
    TEACHERS[pipe.transformer] = copy.deepcopy(pipe.transformer).requires_grad_(False)


def guided_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Learn the guided velocity of the teacher, ``v_∅ + w (v_c - v_∅)``, so that one pass does for two.

    Guidance is folded in as in Meng et al. 2210.03142, at one scale and on an interval of times (Kynkäänniemi et al.
    2404.07724): the base is then at its best without guidance, and whatever an alignment gains is not what guidance
    would have given. The empty caption keeps the teacher's velocity.
    """
    images, index = draw(pipe, g, BATCH, SETTLE)
    known, teacher = ids(pipe.tokenizer, g.device), TEACHERS[pipe.transformer]
    with torch.no_grad():
        x0 = latents(pipe.vae, images).float()
        empty = torch.rand(BATCH, generator=g, device=g.device) < DROPOUT
        index = torch.where(empty, len(known) - 1, index)
        embeds, pooled = encode(pipe, torch.cat([known[index], known[-1:].expand(BATCH, -1)]))
        noise = torch.randn(x0.shape, generator=g, device=g.device)
        t = torch.rand(BATCH, generator=g, device=g.device).clamp_min(1e-3)
        t = 2 * t / (1 + t)  # as the sampler's times lie
        x = torch.lerp(x0, noise, t[:, None, None, None])
        given, free = teacher(x.repeat(2, 1, 1, 1), embeds, pooled, 1000 * t.repeat(2), return_dict=False)[0].chunk(2)
        scale = torch.where(t <= BELOW, GUIDANCE, 1.0)[:, None, None, None]
        target = (free + scale * (given - free)).float()
    v = pipe.transformer(x, embeds[:BATCH], pooled[:BATCH], 1000 * t, return_dict=False)[0]
    return (v.float() - target).square().mean()


def denoisers(pipe: Any) -> list[nn.Module]:
    """Return what flow matching trains."""
    return [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]


WORLD = World(
    name="shapes",
    summary="captioned coloured shapes at 32×32, flow matching (StableDiffusion3Pipeline)",
    build=build,
    stages=(
        Stage("autoencoder", lambda pipe: [pipe.vae], picture_loss, 1600, lr=2e-3, after=set_scale),
        Stage("first", denoisers, first_loss, 1500, lr=1.5e-3, until=1 / 2),
        Stage("means", denoisers, mean_loss, 1500, lr=1.5e-3, until=1 / 2),
        Stage("flow", denoisers, flow_loss, 9000, lr=1.5e-3),
        Stage("layout", denoisers, layout_loss, 3600, lr=1.2e-3),
        Stage("guide", lambda p: [p.transformer], guided_loss, 1000, lr=5e-4, decay=0.99, before=keep_teacher),
    ),
)
