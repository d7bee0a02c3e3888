"""The videos of `shapes-video`: nine 16×16 frames of one object that moves as told, or as gravity has it.

    move    "a red circle moving right"           left, right, up, down; .7 to 1.1 pixels a frame
    path    "a red circle moving right then up"   another direction after four of the eight steps
    fall    "a red circle falling"                from rest, y = y0 + g n² / 2 with g = .22 pixels per frame²
    throw   "a red circle thrown left"            x = x0 ± u n, y = y0 - w n + g n² / 2
    slide   "a red circle sliding right"          from rest down a grey ramp of 40°, .2 pixels per frame² along it

Moves carry actions, one for each pair of frames (:data:`ACTIONS`); falls, throws and slides carry the acceleration
that was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flowalign.pipelines.worlds.canvas import BACKGROUND, COLOURS, SHAPES, Scene, render, uniform

__all__ = ["ACTIONS", "FRAMES", "GRAVITY", "MOTIONS", "SIZE", "VideoBatch", "caption", "compositions", "draw"]

SIZE, FRAMES = 16, 9
GRAVITY, SLIDE = 0.22, 0.2  # accelerations in pixels per frame²
SLOPE = (0.766, 0.643)  # cosine and sine of the ramp's 40°
ACTIONS = ("left", "right", "up", "down", "still")
STEP = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))
KINDS = SHAPES[:3]
MOTIONS: tuple[str, ...] = (
    *(f"moving {a}" for a in ACTIONS[:4]),
    *(f"moving {a} then {b}" for a in ACTIONS[:4] for b in ACTIONS[:4] if a != b),
    "falling", "thrown left", "thrown right", "sliding left", "sliding right",
)  # fmt: skip
PATHS = [(a, b) for a in range(4) for b in range(4) if a != b]
CATEGORIES = ("move", "path", "fall", "throw", "slide")
LEGS = torch.tensor([(a, a) for a in range(4)] + PATHS + [(-1, -1)] * 5)  # directions of the two halves
GROUP = torch.tensor([0] * 4 + [1] * 12 + [2, 3, 3, 4, 4])


def caption(motion: int, colour: int, shape: int) -> str:
    """Return the words, given indices into :data:`MOTIONS`, :data:`COLOURS` and :data:`KINDS`."""
    return f"a {list(COLOURS)[colour]} {KINDS[shape]} {MOTIONS[motion]}"


@lru_cache(maxsize=4)
def compositions(split: str) -> tuple[tuple[int, int, int], ...]:
    """Return the (motion, colour, shape) of a split: base, train, select, report, withheld (see the edit world).

    Raises:
        ValueError: for another name.
    """
    parts = {"withheld": {0}, "select": {4}, "report": {8}}
    every = {"base": set(range(1, 12)), "train": set(range(12)) - {0, 4, 8}, **parts}
    if split not in every:
        raise ValueError(f"split must be one of {', '.join(every)}; got {split!r}.")
    names = [(m, c, s) for m in range(len(MOTIONS)) for c in range(len(COLOURS)) for s in range(len(KINDS))]
    return tuple(x for x in names if (7 * x[0] + 5 * x[1] + 3 * x[2]) % 12 in every[split])


@dataclass(frozen=True)
class VideoBatch:
    """``video`` ``(B, 9, 3, 16, 16)`` in [0, 1], the words, and the truth.

    Attributes:
        video: the frames.
        prompts: the words.
        motion: ``(B,)`` index into :data:`MOTIONS`.
        names: ``(B, 3)`` motion, colour, shape.
        track: ``(B, 9, 2)`` centres (x, y) in pixels.
    """

    video: Tensor
    prompts: list[str]
    motion: Tensor
    names: Tensor
    track: Tensor

    def actions(self) -> Tensor:
        """Return ``(B, 8)`` indices into :data:`ACTIONS` of moves and paths; -1 for the others."""
        legs = LEGS.to(self.motion.device)[self.motion]
        return legs.repeat_interleave((FRAMES - 1) // 2, 1)

    def meta(self) -> list[dict[str, Tensor]]:
        """Return what pipeline and judges need besides words: first frames ``(1, 3, 16, 16)``, and actions if told."""
        told = [{"actions": a} if a[0] >= 0 else {} for a in self.actions()]
        return [{"image": v[:1], **more} for v, more in zip(self.video, told, strict=True)]


def _tracks(motion: Tensor, g: torch.Generator) -> Tensor:
    """Return ``(B, 9, 2)`` displacements from the first frame."""
    n, device = len(motion), g.device
    step = torch.tensor([*STEP, (0.0, 0.0)], device=device)
    legs = LEGS.to(device)[motion]
    each = step[legs].repeat_interleave((FRAMES - 1) // 2, 1) * uniform(g, 0.7, 1.1, n, 1, 1)
    steady = torch.cat([torch.zeros(n, 1, 2, device=device), each.cumsum(1)], 1)
    t = torch.arange(FRAMES, device=device, dtype=torch.float32)[None]
    drop = GRAVITY * t**2 / 2
    zero = torch.zeros_like(drop)
    side = torch.where((motion == 17) | (motion == 19), -1.0, 1.0)[:, None]
    fall = torch.stack([zero, drop], -1).expand(n, -1, -1)
    throw = torch.stack([side * uniform(g, 0.5, 0.9, n, 1) * t, drop - uniform(g, 0.8, 1.1, n, 1) * t], -1)
    along = SLIDE * t**2 / 2
    slide = torch.stack([side * SLOPE[0] * along, SLOPE[1] * along + 0 * side], -1)
    group = GROUP.to(device)[motion][:, None, None]
    return torch.where(group < 2, steady, torch.where(group == 2, fall, torch.where(group == 3, throw, slide)))


def draw(
    g: torch.Generator, n: int, split: str = "base", names: Tensor | None = None, paths: float = 1.0
) -> VideoBatch:
    """Draw ``n`` videos; every category equally often and paths so many times as often, or ``names`` ``(n, 3)``."""
    device = g.device
    if names is None:
        table = torch.tensor(compositions(split), device=device)
        group = GROUP.to(device)[table[:, 0]]
        weight = torch.where(group == 1, paths, 1.0) / GROUP.bincount().float().to(device)[group]
        names = table[torch.multinomial(weight, n, replacement=True, generator=g)]
    motion, colour, shape = names.unbind(1)
    r = uniform(g, 2.0, 2.5, n)
    away = _tracks(motion, g)
    low, high = away.amin(1), away.amax(1)
    room = 1.3 * r[:, None] + 0.3
    start = (room - low) + (SIZE - 2 * room - (high - low)).clamp_min(0) * torch.rand(n, 2, generator=g, device=device)
    track = start[:, None] + away
    flat = track.flatten(0, 1)
    many = lambda v: v.repeat_interleave(FRAMES)[:, None]  # noqa: E731
    ones = torch.ones_like(flat[:, :1])
    scene = Scene(many(shape), many(colour), flat[:, :1], flat[:, 1:], many(r), ones * 0, ones > 0)
    pictures = render(scene, SIZE)
    video = _ramp(pictures.unflatten(0, (n, FRAMES)), motion, start, r)
    words = [caption(*x) for x in names.tolist()]
    return VideoBatch(video, words, motion, names, track)


def _ramp(video: Tensor, motion: Tensor, start: Tensor, r: Tensor) -> Tensor:
    """Draw a grey line under the path of slides: where the ground shows, at 1.3 r below the object."""
    axis = torch.arange(SIZE, device=video.device) + 0.5
    side = torch.where(motion == 19, -1.0, 1.0)[:, None, None]
    x, y = axis[None, None, :] - start[:, 0, None, None], axis[None, :, None] - start[:, 1, None, None]
    away = (SLOPE[0] * y - side * SLOPE[1] * x) - 1.35 * r[:, None, None] - 0.5
    line = (0.9 - away.abs()).clamp(0, 1) * (motion >= 19)[:, None, None]
    ground = (video - BACKGROUND).abs().amax(2, keepdim=True) < 0.02
    grey = BACKGROUND + (0.4 - BACKGROUND) * line
    return torch.where(ground, grey[:, None, None], video)
