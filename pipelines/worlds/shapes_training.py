"""How `shapes` is trained: from a caption's mean picture to its layouts, guidance folded in last.

    autoencoder
    first     the answer to pure noise, a caption's mean picture; relations by two of their four words
    means     the same, all wordings
    flow      all times
    layout    where the layout is decided
    guide     the guided velocity in one pass

Captions aim at the mean over what they could have shown (:mod:`.targets`), the empty one at the picture that was drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from flowalign.pipelines.worlds import scenes, splits
from flowalign.pipelines.worlds.parts import autoencoder_loss, flow_times, normalise, shifted
from flowalign.pipelines.worlds.shapes import (
    BATCH,
    DROPOUT,
    SETTLE,
    WORDING,
    build,
    choose,
    draw,
    encode,
    ids,
    latents,
    table,
)
from flowalign.pipelines.worlds.targets import posterior_mean
from flowalign.pipelines.worlds.train import Stage, World

__all__ = ["WORLD"]

# guidance scales folded into the weights by the last stage, and up to which time; at noisier times it costs counts
GUIDANCE = {"single": (2.0, 0.95), "count": (2.0, 0.95), "relation": (4.0, 1.0), "mixed": (2.0, 0.95)}
REFERENCES = 64  # pictures of each caption that steady the targets
NOISE = 1e6  # as a shift of times: pure noise


def picture_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Train the autoencoder."""
    images, _ = draw(g, 16)
    edge = scenes.SIZE // 2
    noise = torch.randn(len(images), pipe.vae.config.latent_channels, edge, edge, generator=g, device=g.device)
    return autoencoder_loss(pipe.vae, images, noise)


def set_scale(pipe: Any, g: torch.Generator) -> None:
    """Give latents mean 0 and standard deviation 1."""
    normalise(pipe.vae, draw(g, 512)[0])


@lru_cache(maxsize=1)
def references(vae: AutoencoderKL, device: torch.device) -> Tensor:
    """Return latents of :data:`REFERENCES` pictures of every base caption, ``(C, REFERENCES, 1024)`` in bfloat16."""
    g = torch.Generator(device).manual_seed(77)
    every = torch.arange(len(splits.base()), device=device).repeat_interleave(REFERENCES)
    with torch.no_grad():
        drawn = [latents(vae, scenes.draw(table(device)(i, g))).flatten(1).bfloat16() for i in every.split(256)]
    return torch.cat(drawn).unflatten(0, (-1, REFERENCES))


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
        simple: as in :func:`choose`.
    """
    index = choose(g, BATCH, mix, simple)
    known = ids(pipe.tokenizer, g.device)
    empty = torch.rand(BATCH, generator=g, device=g.device) < DROPOUT
    embeds, pooled = encode(pipe, known[torch.where(empty, len(known) - 1, index)])
    t = shifted(flow_times(BATCH, g), shifts)
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

    From .8, .85, .9, .94 and pure noise .98, .89, .76, .68 and .61 of 150 relations were, after 9,000 steps of `flow`.
    """
    return flow_loss(pipe, g, SETTLE, (6.0, 6.0, 6.0, 1.5))


@lru_cache(maxsize=4)
def guidance(device: torch.device) -> Tensor:
    """Return :data:`GUIDANCE` of all base captions, and of the empty one last, ``(C + 1, 2)``."""
    return torch.tensor([*(GUIDANCE[c.category] for c in splits.base()), (1.0, 0.0)], device=device)


TEACHERS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def keep_teacher(pipe: Any) -> None:
    """Keep the transformer as it is now, as the teacher of :func:`guided_loss`."""
    TEACHERS[pipe.transformer] = copy.deepcopy(pipe.transformer).requires_grad_(False)


def guided_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Learn the guided velocity of the teacher, ``v_∅ + w (v_c - v_∅)``, so that one pass does for two.

    Guidance is folded in as in Meng et al. 2210.03142, at one scale a category and on an interval of times
    (Kynkäänniemi et al. 2404.07724): the base is then at its best without guidance, and whatever an alignment gains is
    not what guidance would have given. The empty caption keeps the teacher's velocity.
    """
    images, index = draw(g, BATCH, SETTLE)
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
        scale, until = guidance(g.device)[index].unbind(1)
        scale = torch.where(t <= until, scale, 1.0)[:, None, None, None]
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
        Stage("flow", denoisers, flow_loss, 9000, lr=1.5e-3, until=2 / 3),
        Stage("layout", denoisers, layout_loss, 9000, lr=1.2e-3),
        Stage("guide", lambda p: [p.transformer], guided_loss, 1500, lr=5e-4, decay=0.99, before=keep_teacher),
    ),
)
