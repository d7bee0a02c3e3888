"""What coloured objects a small picture shows: connected pieces of one hue, and the shape that fits each best.

A pixel's chroma is its RGB seen along the grey axis, ``u = R - (G + B)/2, w = √3/2 (G - B)``; its length is 0 on any
grey ground and about .7 in an object. Lightly smoothed, it is cut at :data:`CHROMA`; neighbouring pixels of the same of
six hues form a piece (labels spread along rows and columns until nothing changes). A piece of :data:`LEAST` pixels or
more is an object. Its coverage ``a`` is the unsmoothed chroma over its own peak, clamped to [0, 1], on the piece and
the pixels around it. Each shape, drawn at the piece's centroid with the piece's area, is compared by the soft overlap

    fit = Σ min(a, T) / Σ max(a, T)          (1 for the same; an equal-area circle and square: about .85)

and the best one names the shape if its fit is :data:`FIT` or more. Everything is vectorised over the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flowalign.rewards.blobs import COLOURS

__all__ = ["HUES", "SHAPES", "Objects", "find_objects"]

HUES = COLOURS  # the same six, seen here through their chroma
SHAPES = ("circle", "square", "triangle")
CHROMA = 0.33  # half the chroma of a typical object: the cut runs along its edge
LEAST = 8.0  # pixels; drawn objects have 18 or more
FIT = 0.75  # drawn objects reach .9


@dataclass(frozen=True)
class Objects:
    """M objects of a batch of pictures, in no order.

    Attributes:
        row: ``(M,)`` the picture that an object is in.
        area: ``(M,)`` pixels.
        centre: ``(M, 2)`` pixels, x to the right and y down.
        colour: ``(M,)`` index into :data:`HUES`.
        shape: ``(M,)`` index into :data:`SHAPES`; -1 where none fits.
        fit: ``(M, 3)`` soft overlap with each shape.
    """

    row: Tensor
    area: Tensor
    centre: Tensor
    colour: Tensor
    shape: Tensor
    fit: Tensor


def chroma(images: Tensor) -> Tensor:
    """Return ``(B, 2, H, W)`` chroma of RGB pictures."""
    r, g, b = images.unbind(1)
    return torch.stack([r - (g + b) / 2, math.sqrt(0.75) * (g - b)], 1)


def find_objects(images: Tensor) -> Objects:
    """Find the objects in pictures ``(B, 3, H, W)`` in [0, 1]."""
    plane = chroma(images.float())
    line = torch.tensor([1.0, 4.0, 1.0], device=plane.device) / 6
    kernel = (line[:, None] * line[None, :]).expand(2, 1, 3, 3)
    smooth = F.conv2d(F.pad(plane, (1, 1, 1, 1), mode="replicate"), kernel, groups=2)
    palette = torch.tensor(list(HUES.values()), device=plane.device)
    hues = F.normalize(chroma(palette[:, :, None, None])[:, :, 0, 0], dim=1)
    hue = torch.einsum("bchw,kc->bkhw", smooth, hues).argmax(1)
    length = smooth.square().sum(1).sqrt()
    label = _pieces(torch.where(length > CHROMA, hue, -1))
    row, member = _members(label)
    colour = hue.flatten(1)[row, member.float().flatten(1).argmax(1)]
    return _describe(row, member, colour, plane, label, length, hues)


def _pieces(kind: Tensor) -> Tensor:
    """Return ``(B, H, W)`` labels of 4-connected pieces of equal ``kind``, 0 for kind -1."""
    _, h, w = kind.shape
    number = torch.arange(1, h * w + 1, device=kind.device, dtype=torch.int32).view(1, h, w)
    label = torch.where(kind >= 0, number, 0)
    down, right = kind[:, 1:] == kind[:, :-1], kind[:, :, 1:] == kind[:, :, :-1]
    for k in range(h * w):
        old = label.clone()
        for same, axis in ((down, 1), (right, 2)):
            one, two = label.narrow(axis, 0, same.shape[axis]), label.narrow(axis, 1, same.shape[axis])
            most = torch.maximum(one, two) * same
            one.copy_(torch.maximum(one, most))
            two.copy_(torch.maximum(two, most))
        if k % 4 == 3 and torch.equal(old, label):
            break
    return label


def _members(label: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pictures ``(M,)`` and pixels ``(M, H, W)`` of the pieces that are large enough."""
    b, h, w = label.shape
    flat = label.flatten(1).long()
    area = torch.zeros(b, h * w + 1, device=label.device).scatter_add_(
        1, flat, torch.ones_like(flat, dtype=torch.float)
    )
    row, which = (area[:, 1:] >= LEAST).nonzero(as_tuple=True)
    return row, label[row] == (which + 1)[:, None, None]


def _describe(
    row: Tensor, member: Tensor, colour: Tensor, plane: Tensor, label: Tensor, length: Tensor, hues: Tensor
) -> Objects:
    strength = (plane[row] * hues[colour][:, :, None, None]).sum(1).clamp_min(0)
    weight = (length[row] * member).pow(4)
    peak = (strength * weight).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1e-9)
    near = F.max_pool2d(member[:, None].float(), 3, 1, 1)[:, 0].bool() & (member | (label[row] == 0))
    a = (strength / peak[:, None, None].clamp_min(1e-3)).clamp(0, 1) * near
    h, w = a.shape[-2:]
    ys = (torch.arange(h, device=a.device) + 0.5)[None, :, None]
    xs = (torch.arange(w, device=a.device) + 0.5)[None, None, :]
    area = a.sum((1, 2)).clamp_min(1e-6)
    centre = torch.stack([(a * xs).sum((1, 2)), (a * ys).sum((1, 2))], -1) / area[:, None]
    x, y, size = xs - centre[:, 0, None, None], ys - centre[:, 1, None, None], area[:, None, None]
    fit = torch.stack([_overlap(a, t) for t in _templates(x, y, size)], -1)
    shape = torch.where(fit.amax(-1) >= FIT, fit.argmax(-1), -1)
    return Objects(row, area, centre, colour, shape, fit)


def _templates(x: Tensor, y: Tensor, area: Tensor) -> list[Tensor]:
    """Return each shape's coverage with a given area, its centroid at x = y = 0."""
    circle = (x.square() + y.square()).sqrt() - (area / math.pi).sqrt()
    square = torch.maximum(x.abs(), y.abs()) - area.sqrt() / 2
    r = (area / 2.1).sqrt()  # base 2.1 r, height 2 r, the centroid r/3 below the middle
    slope = 2 / 1.05
    y = y + r / 3
    triangle = torch.maximum((x.abs() * slope - (y + r)) / math.hypot(1.0, slope), y - r)
    return [(0.5 - d).clamp(0, 1) for d in (circle, square, triangle)]


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a, b).sum((1, 2)) / torch.maximum(a, b).sum((1, 2)).clamp_min(1e-6)
