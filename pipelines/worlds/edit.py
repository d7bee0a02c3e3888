"""`shapes-edit`: move, turn or resize the named object; everything else must stay.

    "move the red circle left"   left, right, up, down: by 8 pixels, the other axis stays
    "turn the blue bar clockwise"  clockwise, counterclockwise: by 30 degrees (circles cannot be turned)
    "make the cyan square bigger"  bigger, smaller: r times 1.45, or divided by it

A scene has two or three objects of different colours, so the name is unambiguous. The amounts are fixed: a model that
had seen them spread (moves of 5 to 11 pixels, turns of 20 to 40 degrees, 1.3 to 1.6) left the named object half melted
between them, .10 strict; it is where this one starts. Eight pixels are two of the transformer's tokens. Turns are the
hardest, from any angle to any: 1 in 100 was right until a stage of their own. Some compositions (operation × colour ×
shape) are withheld from the model, others only from alignment: :func:`compositions`.

The model is a ``FluxControlPipeline`` of stock parts (:mod:`~flowalign.pipelines.worlds.parts`): the source picture is
its ``control_image``. The pipeline has no classifier-free guidance; it is called with ``height=32, width=32,
max_sequence_length=8``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowalign.pipelines.worlds.canvas import COLOURS, SHAPES, Scene, draw_scene, render, uniform
from flowalign.pipelines.worlds.parts import (
    as_control,
    autoencoder,
    autoencoder_loss,
    flow_loss,
    flux_control,
    latents,
    normalise,
    token_ids,
    without_noise,
)
from flowalign.pipelines.worlds.train import Stage, World

__all__ = ["EDITS", "WORLD", "EditBatch", "Split", "compositions", "draw", "instruction", "sample"]

Split = Literal["base", "train", "select", "report", "withheld"]
EDITS = {
    "left": "move the {} left",
    "right": "move the {} right",
    "up": "move the {} up",
    "down": "move the {} down",
    "clockwise": "turn the {} clockwise",
    "counterclockwise": "turn the {} counterclockwise",
    "bigger": "make the {} bigger",
    "smaller": "make the {} smaller",
}
CATEGORY = dict(zip(EDITS, ["move"] * 4 + ["turn"] * 2 + ["resize"] * 2, strict=True))
Range = tuple[float, float]
FIXED: tuple[Range, Range, Range] = ((8.0, 8.0), (30.0, 30.0), (1.45, 1.45))  # pixels, degrees, ratio of radii
SPREAD: tuple[Range, Range, Range] = ((5.0, 11.0), (20.0, 40.0), (1.3, 1.6))
RADIUS = (3.4, 4.2)
TRIES = 160  # layouts drawn for one that is kept: about 1 in 40 has room for three objects and an edit


def instruction(edit: int, colour: int, shape: int) -> str:
    """Return the words of an edit, given indices into :data:`EDITS`, :data:`COLOURS` and :data:`SHAPES`."""
    return list(EDITS.values())[edit].format(f"{list(COLOURS)[colour]} {SHAPES[shape]}")


@lru_cache(maxsize=8)
def compositions(split: Split) -> tuple[tuple[int, int, int], ...]:
    """Return the (edit, colour, shape) of a split.

    A Latin pattern decides, so that every edit, colour and shape, and every pair of them, occurs in ``train``:
    ``withheld`` (1/12) is never shown to the base model; ``select`` and ``report`` (1/12 each) are shown to it but not
    used in alignment; ``train`` is the rest, and ``base`` all but ``withheld``.

    Raises:
        ValueError: for another name.
    """
    parts = {"withheld": {0}, "select": {4}, "report": {8}}
    every = {"base": set(range(12)) - {0}, "train": set(range(12)) - {0, 4, 8}, **parts}
    if split not in every:
        raise ValueError(f"split must be one of {', '.join(every)}; got {split!r}.")
    turnable = [(e, c, s) for e in range(8) for c in range(6) for s in range(4) if not (e in (4, 5) and s == 0)]
    return tuple(x for x in turnable if (2 * x[0] + 5 * x[1] + 3 * x[2]) % 12 in every[split])


@dataclass(frozen=True)
class EditBatch:
    """``source`` and ``target`` pictures ``(B, 3, 32, 32)`` in [0, 1] and the words between them.

    ``edit`` ``(B,)`` indexes :data:`EDITS`; the scenes are what was drawn, the edited object is object 0 in both.
    """

    source: Tensor
    target: Tensor
    prompts: list[str]
    edit: Tensor
    before: Scene
    after: Scene

    def meta(self) -> list[dict[str, Tensor]]:
        """Return what the judge and the pipeline need besides the words: the source pictures."""
        return [{"image": image, "control_image": as_control(image)[None]} for image in self.source]


def apply(scene: Scene, edit: Tensor, generator: torch.Generator, amounts: tuple[Range, Range, Range]) -> Scene:
    """Return the scene after edit ``(B,)`` of object 0, by an amount drawn from the ranges of moves, turns, ratios."""
    move, turn, grow = (uniform(generator, *x, len(scene)) for x in amounts)
    turn = turn * math.pi / 180
    zero = torch.zeros_like(move)
    dx = torch.where(edit == 0, -move, torch.where(edit == 1, move, zero))
    dy = torch.where(edit == 2, -move, torch.where(edit == 3, move, zero))
    da = torch.where(edit == 4, turn, torch.where(edit == 5, -turn, zero))
    k = torch.where(edit == 6, grow, torch.where(edit == 7, 1 / grow, zero + 1))
    first = torch.zeros_like(edit)
    return scene.with_object(
        first, x=scene.x[:, 0] + dx, y=scene.y[:, 0] + dy, angle=scene.angle[:, 0] + da, r=scene.r[:, 0] * k
    )


def scenes(
    generator: torch.Generator, n: int, split: Split, amounts: tuple[Range, Range, Range] = FIXED, turns: float = 0.0
) -> tuple[Scene, Scene, Tensor]:
    """Return ``n`` scenes before and after, and the edits ``(n,)``; each has room for its edit.

    All compositions are equally likely, but for ``turns``: in that share of the scenes the edit is a turn in any case.

    Every row draws its composition first and then :data:`TRIES` layouts, of which it keeps the first that has room, so
    that no edit is rarer for needing more of it; the few rows without luck (2 %) repeat another row.
    """
    device = generator.device
    table = torch.tensor(compositions(split), device=device)
    row = torch.randint(len(table), (n,), generator=generator, device=device)
    if turns:
        turning = torch.isin(table[:, 0], torch.tensor([4, 5], device=device)).nonzero()[:, 0]
        other = turning[torch.randint(len(turning), (n,), generator=generator, device=device)]
        row = torch.where(torch.rand(n, generator=generator, device=device) < turns, other, row)
    which = table[row].repeat_interleave(TRIES, 0)
    third = (torch.rand(n, generator=generator, device=device) < 0.5).repeat_interleave(TRIES)
    scene = draw_scene(generator, n * TRIES, 3, RADIUS)
    # the named object's colour trades places with whichever object had it
    swapped = torch.where(scene.colour == which[:, 1:2], scene.colour[:, :1], scene.colour)
    scene.here[:, 2] = third
    first = torch.zeros_like(which[:, 0])
    scene = replace(scene, colour=swapped).with_object(first, colour=which[:, 1], shape=which[:, 2])
    after = apply(scene, which[:, 0], generator, amounts)
    room = (scene.apart() & after.apart()).reshape(n, TRIES)
    pick = torch.arange(n, device=device) * TRIES + room.int().argmax(1)
    lucky = room.any(1).nonzero()[:, 0]
    pick = torch.where(room.any(1), pick, pick[lucky[torch.arange(n, device=device) % len(lucky)]])
    return scene[pick], after[pick], which[pick, 0]


def draw(
    generator: torch.Generator, n: int, split: Split = "base", amounts: tuple[Range, Range, Range] = FIXED,
    turns: float = 0.0,
) -> EditBatch:  # fmt: skip
    """Draw ``n`` edits of a split with their pictures, on the generator's device (``turns``: see :func:`scenes`)."""
    before, after, edit = scenes(generator, n, split, amounts, turns)
    names = torch.stack([edit, before.colour[:, 0], before.shape[:, 0]], 1).tolist()
    return EditBatch(render(before), render(after), [instruction(*x) for x in names], edit, before, after)


BATCH, POOL = 16, 8_000
TURNS = 0.5  # of the last stage's scenes, besides the turns that fall to all


def build() -> Any:
    """Return the untrained pipeline."""
    return flux_control([instruction(*x) for s in ("base", "withheld") for x in compositions(s)], autoencoder())


def picture_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Train the autoencoder on source pictures."""
    images = draw(g, 16, amounts=SPREAD).source
    c = pipe.vae.config.latent_channels
    return autoencoder_loss(pipe.vae, images, torch.randn(len(images), c, 16, 16, generator=g, device=g.device))


def set_scale(pipe: Any, g: torch.Generator) -> None:
    """Give latents mean 0 and standard deviation 1, and no noise: the pipeline samples the given picture's."""
    normalise(pipe.vae, draw(g, 512, amounts=SPREAD).source)
    without_noise(pipe.vae)


@lru_cache(maxsize=1)
def pool(
    pipe: Any, device: torch.device, amounts: tuple[Range, Range, Range], size: int = POOL, turns: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents of ``size`` targets and sources, and token ids: encoding costs half as much as learning."""
    g = torch.Generator(device).manual_seed(18 if turns else 17)
    x0, c, ids = [], [], []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for _ in range(size // 500):
            d = draw(g, 500, amounts=amounts, turns=turns)
            x0.append(latents(pipe.vae, d.target).float())
            c.append(latents(pipe.vae, d.source).float())
            ids.append(token_ids(pipe.tokenizer, d.prompts, device))
    return torch.cat(x0), torch.cat(c), torch.cat(ids)


def edit_loss(
    pipe: Any, g: torch.Generator, amounts: tuple[Range, Range, Range] = SPREAD, size: int = POOL, turns: float = 0.0,
    shifts: Sequence[float] = (1.0,),
) -> Tensor:  # fmt: skip
    """Train the transformer and the text encoders by flow matching on a :func:`pool`; shifts are those of the times."""
    x0, c, ids = pool(pipe, g.device, amounts, size, turns)
    rows = torch.randint(len(x0), (BATCH,), generator=g, device=g.device)
    return flow_loss(pipe, x0[rows], c[rows], ids[rows], g, shifts)


def fixed_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Go on with fixed amounts, more of them, and at noisier times: there it is decided where the object goes.

    From a true point of the path at time .6 one step gave .93 strict pictures, at .8 .48, from noise .09.
    """
    return edit_loss(pipe, g, FIXED, 2 * POOL, shifts=(1.0, 4.0))


def turn_loss(pipe: Any, g: torch.Generator) -> Tensor:
    """Go on with more turns, from any angle to any: .01 of them were right when .94 of the moves were."""
    return edit_loss(pipe, g, FIXED, 3 * POOL, TURNS, (1.0, 4.0))


def denoisers(pipe: Any) -> list[nn.Module]:
    """Return what flow matching trains."""
    return [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]


WORLD = World(
    name="shapes-edit",
    summary="move, turn or resize the named object at 32×32, flow matching (FluxControlPipeline)",
    build=build,
    stages=(
        Stage("autoencoder", lambda pipe: [pipe.vae], picture_loss, 1200, lr=3e-3, after=set_scale, decay=0.995),
        Stage("flow", denoisers, edit_loss, 5000, lr=1.2e-3),
        Stage("fixed", denoisers, fixed_loss, 5000, lr=1.2e-3),
        Stage("turns", denoisers, turn_loss, 6000, lr=1e-3),
    ),
)


def sample(pipe: Any, batch: EditBatch, *, steps: int = 10, seed: int = 0) -> Tensor:
    """Return edited pictures ``(B, 3, 32, 32)`` by the plain pipeline."""
    n, c = len(batch.prompts), pipe.vae.config.latent_channels * 4
    noise = torch.randn(n, 64, c, generator=torch.Generator().manual_seed(seed)).to(pipe.device)
    return pipe(
        prompt=batch.prompts, control_image=as_control(batch.source).to(pipe.device), height=32, width=32,
        latents=noise, num_inference_steps=steps, max_sequence_length=8, output_type="pt",
    ).images.float()  # fmt: skip
