"""Drawn pictures with the flaws that a generator or a camera adds, and captions that are nearly right."""

import random

import torch
from torchvision.transforms.functional import gaussian_blur

from flowalign.pipelines.worlds.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Caption,
    Group,
    Layout,
    captions,
    draw,
)  # fmt: skip


def pictures(n, seed, *, noise=0.05, blur=0.5, gain=0.1):
    """Return ``(n, 3, 32, 32)`` degraded pictures and their captions, the categories equally often."""
    g = torch.Generator().manual_seed(seed)
    by_category = {}
    for i, c in enumerate(captions()):
        by_category.setdefault(c.category, []).append(i)
    rng = random.Random(seed)
    index = torch.tensor([rng.choice(group) for _ in range(n // 4) for group in by_category.values()])
    images = draw(Layout(captions())(index, g))
    images = images * (1 + gain * (2 * torch.rand(len(images), 3, 1, 1, generator=g) - 1))
    if blur:
        images = gaussian_blur(images, 5, blur)
    images = images + noise * torch.randn(images.shape, generator=g)
    return images.clamp(0, 1), [captions()[i] for i in index]


def near_miss(caption, rng):
    """Return a caption that is wrong in one thing: a number, a colour, a shape, or the relation."""
    ways = ["colour", "shape", "number"] if caption.relation is None else ["colour", "shape", "relation"]
    while True:
        way, groups, relation = rng.choice(ways), list(caption.groups), caption.relation
        i = rng.randrange(len(groups))
        g = groups[i]
        if way == "colour":
            groups[i] = Group(g.number, rng.choice([c for c in COLOURS if c != g.colour]), g.shape)
        elif way == "shape":
            groups[i] = Group(g.number, g.colour, rng.choice([s for s in SHAPES if s != g.shape]))
        elif way == "number":
            groups[i] = Group(g.number + rng.choice([-1, 1]), g.colour, g.shape)
        else:
            at = RELATIONS.index(relation)
            relation = RELATIONS[at ^ 1]  # above / below, left of / right of
        wrong = Caption(tuple(groups), relation)
        if wrong in captions():
            return wrong
