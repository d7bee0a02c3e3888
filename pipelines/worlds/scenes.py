"""Captioned scenes of coloured shapes: what a caption means, how to lay it out, how to draw it.

A :class:`Caption` is one or two groups of like objects, with a relation between two single ones:

    single    "a red circle"
    count     "three cyan squares"                          2 to 4 objects
    relation  "a red circle above a blue square"            of different colour and shape
    mixed     "two red circles and one blue square"         3 or 4 objects of two kinds

The words are the whole of it: :func:`parse` gives back the caption from the text alone, so a judge needs no other
record. Objects stand in different cells of a 3×3 grid, a little off-centre, and never touch. They are drawn by signed
distance (:func:`coverage`): a pixel's colour is the background's and the object's, mixed by the share of the pixel
that the object covers.  Everything is vectorised over the batch and runs on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = [
    "CATEGORIES", "COLOURS", "GRID", "MAX_OBJECTS", "NUMBERS", "RELATIONS", "SHAPES", "SIZE", "Caption", "Group",
    "Layout", "Scenes", "captions", "coverage", "draw", "parse", "place", "relation_holds",
]  # fmt: skip

SIZE = 32  # pixels along an edge
GRID = 3  # cells along an edge
MAX_OBJECTS = 4
RADIUS = (3.2, 3.9)  # pixels; largest extent 1.05 r + jitter = 4.6, so two neighbours are 1.4 pixels apart or more
JITTER = 0.5  # pixels off the centre of the cell, along x and y
MARGIN = 4.0  # pixels by which "above" must be above; neighbouring cells are 10.7 apart
BACKGROUND = (0.08, 0.20)  # grey level

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "cyan": (0.15, 0.85, 0.90),
    "magenta": (0.90, 0.20, 0.85),
}
SHAPES = ("circle", "square", "triangle")
NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = ("above", "below", "left of", "right of")
CATEGORIES = ("single", "count", "relation", "mixed")
MIXED = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))


@dataclass(frozen=True)
class Group:
    """``number`` like objects: ``colour`` and ``shape`` are words of :data:`COLOURS` and :data:`SHAPES`."""

    number: int
    colour: str
    shape: str

    @property
    def kind(self) -> tuple[str, str]:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Caption:
    """What a prompt asks for; ``str()`` gives the words.

    Attributes:
        groups: one or two groups, of different kinds.
        relation: of the first object to the second, a word of :data:`RELATIONS`; None elsewhere.
    """

    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def category(self) -> str:
        """Return the category, a word of :data:`CATEGORIES`."""
        if self.relation is not None:
            return "relation"
        if len(self.groups) == 2:
            return "mixed"
        return "single" if self.groups[0].number == 1 else "count"

    @property
    def total(self) -> int:
        """Return the number of objects."""
        return sum(g.number for g in self.groups)

    def __str__(self) -> str:
        if self.category in ("single", "relation"):
            words = [f"a {g.colour} {g.shape}" for g in self.groups]
            return words[0] if self.relation is None else f"{words[0]} {self.relation} {words[1]}"
        return " and ".join(
            f"{NUMBERS[g.number]} {g.colour} {g.shape}{'s' if g.number > 1 else ''}" for g in self.groups
        )


@lru_cache(maxsize=1)
def captions() -> tuple[Caption, ...]:
    """Return every caption of the grammar: 18 single, 54 count, 720 relation, 1,530 mixed.

    The two objects of a relation differ in colour and in shape: that category is there to show harm, so the base must
    be good at it, and telling a red circle from a red square beside it was what kept it from that.
    """
    kinds = [(c, s) for c in COLOURS for s in SHAPES]
    pairs = [(a, b) for a in kinds for b in kinds if a != b]
    apart = [(a, b) for a, b in pairs if a[0] != b[0] and a[1] != b[1]]
    out = [Caption((Group(1, *k),)) for k in kinds]
    out += [Caption((Group(n, *k),)) for n in (2, 3, 4) for k in kinds]
    out += [Caption((Group(1, *a), Group(1, *b)), r) for r in RELATIONS for a, b in apart]
    out += [Caption((Group(n, *a), Group(m, *b))) for n, m in MIXED for a, b in pairs]
    return tuple(out)


@lru_cache(maxsize=1)
def _table() -> dict[str, Caption]:
    return {str(c): c for c in captions()}


def parse(prompt: str) -> Caption:
    """Return the caption that ``prompt`` spells.

    Raises:
        ValueError: for words outside the grammar, which no judge of this world can read.
    """
    found = _table().get(" ".join(prompt.lower().strip(" .").split()))
    if found is None:
        raise ValueError(
            f"{prompt!r} is not a caption of the shapes world. Captions read 'a red circle', 'three cyan squares', "
            f"'a red circle above a blue square' or 'two red circles and one blue square', with the colours "
            f"{', '.join(COLOURS)}, the shapes {', '.join(SHAPES)}, the relations {', '.join(RELATIONS)} and two to "
            "four objects."
        )
    return found


def relation_holds(relation: str, first: Tensor, second: Tensor, margin: float = MARGIN) -> Tensor:
    """Say whether ``first`` stands in ``relation`` to ``second``.

    Args:
        relation: a word of :data:`RELATIONS`.
        first: centres ``(..., 2)`` in pixels, x to the right and y down.
        second: likewise.
        margin: pixels by which it must.

    Returns:
        Booleans ``(...)``.
    """
    x, y = (first - second).unbind(-1)
    return {"above": -y, "below": y, "left of": -x, "right of": x}[relation] > margin


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes, ready to draw; N objects at most, absent ones have radius 0.

    Attributes:
        centre: ``(B, N, 2)`` pixels, x to the right and y down.
        radius: ``(B, N)`` pixels.
        colour: ``(B, N, 3)`` RGB.
        shape: ``(B, N)`` indices into :data:`SHAPES`.
        background: ``(B, 3)`` RGB.
        angle: ``(B, N)`` radians, clockwise on the screen.
    """

    centre: Tensor
    radius: Tensor
    colour: Tensor
    shape: Tensor
    background: Tensor
    angle: Tensor


class Layout:
    """Draws scenes of given captions at random. Tables of all captions are made once, so a batch is a few gathers.

    Args:
        chosen: the captions, in the order that indices into this object mean.
        device: where scenes are made.
    """

    def __init__(self, chosen: tuple[Caption, ...], device: torch.device | str = "cpu") -> None:
        self.captions = chosen
        shape = torch.zeros(len(chosen), MAX_OBJECTS, dtype=torch.long)
        colour = torch.zeros(len(chosen), MAX_OBJECTS, dtype=torch.long)
        present = torch.zeros(len(chosen), MAX_OBJECTS)
        for i, caption in enumerate(chosen):
            kinds = [g.kind for g in caption.groups for _ in range(g.number)]
            for j, (c, s) in enumerate(kinds):
                colour[i, j], shape[i, j], present[i, j] = list(COLOURS).index(c), SHAPES.index(s), 1
        self.shape, self.colour, self.present = shape.to(device), colour.to(device), present.to(device)
        relation = [RELATIONS.index(c.relation) if c.relation else -1 for c in chosen]
        self.relation = torch.tensor(relation, device=device)
        self.palette = torch.tensor(list(COLOURS.values()), device=device)

    def __call__(self, index: Tensor, generator: torch.Generator) -> Scenes:
        """Return one scene for each caption ``index`` ``(B,)``, random in everything the caption leaves open."""
        device = self.palette.device
        cells = place(self.relation[index], generator)
        count = (len(index), MAX_OBJECTS)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(shape, generator=generator, device=device)

        centre = torch.stack([cells % GRID, cells // GRID], -1) * (SIZE / GRID) + SIZE / GRID / 2
        centre = centre + uniform(-JITTER, JITTER, *count, 2)
        radius = uniform(*RADIUS, *count) * self.present[index]
        colour = self.palette[self.colour[index]] * uniform(0.9, 1.0, *count, 1)
        grey = uniform(*BACKGROUND, len(index), 1).expand(-1, 3)
        return Scenes(centre, radius, colour, self.shape[index], grey, torch.zeros_like(radius))


def place(relation: Tensor, generator: torch.Generator) -> Tensor:
    """Choose different cells for the objects of each scene.

    Args:
        relation: ``(B,)`` index into :data:`RELATIONS` that the first two objects must obey, or -1.
        generator: on the device of ``relation``.

    Returns:
        Cell numbers ``(B, MAX_OBJECTS)``, row by row; uniform among the placements that the relation allows.
    """
    n, device = len(relation), relation.device
    order = torch.rand(n, GRID * GRID, generator=generator, device=device).argsort(-1)[:, :MAX_OBJECTS]
    pairs = [(a, b) for a in range(GRID**2) for b in range(GRID**2) if a // GRID < b // GRID]  # a above b
    above = torch.tensor(pairs, device=device)
    pick = above[torch.randint(len(pairs), (n,), generator=generator, device=device)]
    pick = torch.where(((relation == 1) | (relation == 3))[:, None], pick.flip(-1), pick)
    turned = (pick % GRID) * GRID + pick // GRID
    pick = torch.where((relation >= 2)[:, None], turned, pick)
    order[:, :2] = torch.where((relation >= 0)[:, None], pick, order[:, :2])  # such captions have two objects only
    return order


def coverage(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Return the share of each pixel that an object covers: its signed distance, clamped to one pixel's width.

    Args:
        x: pixel centres relative to the object's, to the right in its own (turned) frame.
        y: likewise, downwards.
        radius: the object's size in pixels, broadcast against ``x``.
        shape: index into :data:`SHAPES`, likewise.

    Returns:
        Values in [0, 1]; 0 where the radius is.
    """
    circle = (x.square() + y.square()).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    slope = 2.0 / 1.05  # of the triangle's sides: height 2 r over half the width
    side = (x.abs() * slope - (y + radius)) / math.hypot(1.0, slope)
    triangle = torch.maximum(side, y - radius)
    distance = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
    return (0.5 - distance).clamp(0, 1) * (radius > 0)


def draw(scenes: Scenes, size: int = SIZE) -> Tensor:
    """Return the pictures ``(B, 3, size, size)`` in [0, 1] of scenes laid out on :data:`SIZE` pixels."""
    scale = SIZE / size
    axis = (torch.arange(size, device=scenes.centre.device) + 0.5) * scale
    dx = axis[None, None, None, :] - scenes.centre[..., 0, None, None]
    dy = axis[None, None, :, None] - scenes.centre[..., 1, None, None]
    cos, sin = scenes.angle.cos()[..., None, None], scenes.angle.sin()[..., None, None]
    x, y = dx * cos + dy * sin, dy * cos - dx * sin
    radius = scenes.radius[..., None, None]
    mask = coverage(x / scale, y / scale, radius / scale, scenes.shape[..., None, None])
    image = scenes.background[:, :, None, None].expand(-1, -1, size, size)
    for k in range(mask.shape[1]):
        image = image + mask[:, k, None] * (scenes.colour[:, k, :, None, None] - image)
    return image
