"""`shapes-sr`: from 8×8 to 32×32, the captioned scenes of `shapes`.

    low = mean over 4×4 pixels of the picture + N(0, .02²),     condition = low, enlarged to 32×32 bilinearly

An object of 7 pixels covers about two low-resolution pixels each way: place and colour survive, the shape hardly. The
caption names it, so words and pixels must be read together, and there is something to win between blur (high PSNR)
and a crisp guess (a strict judge).

The model is a ``FluxControlPipeline`` of stock parts (:mod:`~flowalign.pipelines.worlds.parts`): the enlarged picture
is its ``control_image``; called with ``height=32, width=32, max_sequence_length=10``; it has no guidance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from flowalign.pipelines.worlds import scenes, splits, store
from flowalign.pipelines.worlds.edit import denoisers
from flowalign.pipelines.worlds.parts import (
    as_control,
    flow_loss,
    flux_control,
    latents,
    token_ids,
    without_noise,
)
from flowalign.pipelines.worlds.train import Stage, World

__all__ = ["FACTOR", "WORLD", "PairBatch", "draw", "enlarge", "reduce", "sample"]

FACTOR, NOISE = 4, 0.02
BATCH, POOL = 16, 8_000
TOKENS = 10  # the longest caption has eight words, and an end


@dataclass(frozen=True)
class PairBatch:
    """``low`` ``(B, 3, 8, 8)`` and ``high`` ``(B, 3, 32, 32)`` pictures in [0, 1], and captions of the scenes."""

    low: Tensor
    high: Tensor
    prompts: list[str]

    def meta(self) -> list[dict[str, Tensor]]:
        """Return of each sample the enlarged picture, the reference, and what the pipeline wants of the former."""
        images = enlarge(self.low)
        return [
            {"image": image, "reference": high, "control_image": as_control(image)[None]}
            for image, high in zip(images, self.high, strict=True)
        ]


def reduce(images: Tensor) -> Tensor:
    """Return pictures averaged over :data:`FACTOR` × :data:`FACTOR` pixels."""
    return F.avg_pool2d(images, FACTOR)


def enlarge(low: Tensor) -> Tensor:
    """Return low-resolution pictures at full size, bilinearly: what the pipeline is given."""
    return F.interpolate(low, scale_factor=FACTOR, mode="bilinear", align_corners=False)


@lru_cache(maxsize=4)
def layout(captions: tuple[scenes.Caption, ...], device: torch.device) -> scenes.Layout:
    """Return the layouts of captions."""
    return scenes.Layout(captions, device)


def draw(g: torch.Generator, n: int, captions: tuple[scenes.Caption, ...] | None = None) -> PairBatch:
    """Draw ``n`` pairs of the base captions, every category equally often, or of the given captions in order."""
    device = g.device
    if captions is None:
        groups = splits.base_groups(device)
        kind = torch.randint(len(groups), (n,), generator=g, device=device)
        u = torch.rand(n, generator=g, device=device)
        sizes = torch.tensor([len(x) for x in groups], device=device)
        offset = sizes.cumsum(0) - sizes
        index = torch.cat(groups)[offset[kind] + (u * sizes[kind]).long()]
        table = layout(splits.base(), device)
    else:
        table, index = layout(captions, device), torch.arange(n, device=device) % len(captions)
    high = scenes.draw(table(index, g))
    low = reduce(high)
    low = (low + NOISE * torch.randn(low.shape, generator=g, device=device)).clamp(0, 1)
    return PairBatch(low, high, [str(table.captions[i]) for i in index.tolist()])


def build() -> Any:
    """Return the untrained pipeline around the autoencoder of `shapes`.

    One trained here, on crisp and enlarged pictures, blurred the shapes so that the judge passed .56 of its pictures;
    of this one's it passes .99. Enlarged pictures are only read, never drawn.
    """
    vae = AutoencoderKL.from_pretrained(store.path("shapes"), subfolder="vae")
    without_noise(vae)
    return flux_control([str(c) for c in scenes.captions()], vae, length=TOKENS, shift=2.0)


@lru_cache(maxsize=1)
def pool(pipe: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents of :data:`POOL` pictures and of their conditions, and token ids."""
    g = torch.Generator(device).manual_seed(17)
    x0, c, ids = [], [], []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for _ in range(POOL // 500):
            batch = draw(g, 500)
            x0.append(latents(pipe.vae, batch.high).float())
            c.append(latents(pipe.vae, enlarge(batch.low)).float())
            ids.append(token_ids(pipe.tokenizer, batch.prompts, device))
    return torch.cat(x0), torch.cat(c), torch.cat(ids)


def pair_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Train the transformer and the text encoders by flow matching."""
    x0, c, ids = pool(pipe, g.device)
    rows = torch.randint(len(x0), (BATCH,), generator=g, device=g.device)
    return flow_loss(pipe, x0[rows], c[rows], ids[rows], g, (1.0, 3.0))


WORLD = World(
    name="shapes-sr",
    summary="8×8 to 32×32 super-resolution of captioned shapes, flow matching (FluxControlPipeline)",
    build=build,
    stages=(Stage("flow", denoisers, pair_loss, 5000, lr=1.2e-3),),
)


def sample(pipe: Any, batch: PairBatch, *, steps: int = 10, seed: int = 0) -> Tensor:
    """Return pictures ``(B, 3, 32, 32)`` by the plain pipeline."""
    n, c = len(batch.prompts), pipe.vae.config.latent_channels * 4
    noise = torch.randn(n, 64, c, generator=torch.Generator().manual_seed(seed)).to(pipe.device)
    return pipe(
        prompt=batch.prompts, control_image=as_control(enlarge(batch.low)).to(pipe.device), height=32, width=32,
        latents=noise, num_inference_steps=steps, max_sequence_length=TOKENS, output_type="pt",
    ).images.float()  # fmt: skip
