"""`shapes-turbo`: `shapes` in one to four steps, by consistency distillation; ``FlowMatchLCMScheduler``.

With the velocity v the data point that a noisy one leads to is ``f(x, t) = x - t v(x, t)``. A consistent f gives the
same point all along a path of the teacher's ODE, so with one Euler step of the teacher from t to s = t - 1/12

    min E |f_θ(x_t, t) - sg f_θ(x_s, s)|_H,     x_s = x_t - (t - s) v(x_t, t)

(Song et al. 2303.01469). f(x, 0) = x holds by construction. The teacher goes without guidance, which is in its weights.
|d|_H = √(|d|² + c²) - c is the pseudo-Huber distance of Song & Dhariwal 2310.14189. The best that the student can be is
the teacher at these twelve even steps. Sample at guidance 1. diffusers' grid ends at σ = .001, so of n ≥ 2 steps the
last changes next to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler, StableDiffusion3Pipeline
from torch import Tensor

from flowalign.pipelines.worlds import shapes, store
from flowalign.pipelines.worlds.train import Stage, World

__all__ = ["GRID", "WORLD", "consistency_loss"]

GRID = 12


def build() -> StableDiffusion3Pipeline:
    """Return the student: a copy of `shapes` with the consistency scheduler."""
    pipe: StableDiffusion3Pipeline = DiffusionPipeline.from_pretrained(store.path("shapes"))
    pipe.register_modules(scheduler=FlowMatchLCMScheduler())
    return pipe


def consistency_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Return the distance between the student's data points at neighbouring times of one path."""
    images, index = shapes.draw(g, shapes.BATCH, shapes.HARDER)
    known = shapes.ids(pipe.tokenizer, g.device)
    with torch.no_grad():
        x0 = shapes.latents(pipe.vae, images).float()
        text, pooled = shapes.encode(pipe, known[index])
        noise = torch.randn(x0.shape, generator=g, device=g.device)
        t = torch.randint(1, GRID + 1, (len(x0),), generator=g, device=g.device) / GRID
        x = torch.lerp(x0, noise, t[:, None, None, None])
        v = _velocity(store.frozen("shapes", g.device), x, t, text, pooled)
        s = t - 1 / GRID
        x_s = x - v / GRID
        target = x_s - s[:, None, None, None] * _velocity(pipe, x_s, s, text, pooled)
    d = x - t[:, None, None, None] * _velocity(pipe, x, t, text, pooled) - target
    c = 0.00054 * d[0].numel() ** 0.5
    return ((d.square().flatten(1).sum(1) + c**2).sqrt() - c).mean()


def _velocity(pipe: Any, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    out: Tensor = pipe.transformer(x, text, pooled, 1000 * t, return_dict=False)[0]
    return out.float()


WORLD = World(
    name="shapes-turbo",
    summary="`shapes` distilled to one to four steps (consistency, FlowMatchLCMScheduler)",
    build=build,
    stages=(Stage("distil", lambda pipe: [pipe.transformer], consistency_loss, 2500, lr=3e-4, decay=0.99),),
)
