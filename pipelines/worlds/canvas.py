"""A canvas for moving, turning and growing objects: signed distances, palette, scenes without overlap.

`shapes-edit`, `shapes-sr` and `shapes-video` are drawn here, in torch, on any device, from a seeded generator.
An object has a shape, a colour, a centre (x, y) in pixels (y points down), a size r in pixels and an angle in radians
(clockwise, since y points down). Its coverage is ``clamp(1/2 - d, 0, 1)`` with ``d`` the signed distance of the pixel's
centre to the outline, so that centroids and areas are exact to about a hundredth of a pixel.

    circle     |p| - r                                square   max(|x|, |y|) - .9 r
    triangle   max_k <n_k, p> - .725 r  (equilateral) bar      max(|x| - 1.4 r, |y| - .55 r)

Distances: Quilez, https://iquilezles.org/articles/distfunctions2d (the formulas, not the code).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from flowalign.pipelines.worlds.scenes import COLOURS, SIZE

__all__ = ["BACKGROUND", "COLOURS", "REACH", "SHAPES", "SIZE", "Scene", "coverage", "draw_scene", "render", "uniform"]

SHAPES = ("circle", "square", "triangle", "bar")
BACKGROUND = 0.12  # grey level
REACH = (1.0, 1.273, 1.45, 1.504)  # radius of the circumscribed circle over r, by shape


@dataclass(frozen=True)
class Scene:
    """``(B, N)`` objects; ``here`` marks the ones that exist.

    Attributes:
        shape: index into :data:`SHAPES`.
        colour: index into :data:`COLOURS`.
        x: centre, pixels from the left edge.
        y: centre, pixels from the top edge.
        r: size in pixels.
        angle: clockwise, radians.
        here: bool.
    """

    shape: Tensor
    colour: Tensor
    x: Tensor
    y: Tensor
    r: Tensor
    angle: Tensor
    here: Tensor

    def __getitem__(self, rows: Tensor) -> Scene:
        """Select scenes."""
        return Scene(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __len__(self) -> int:
        """Return the number of scenes."""
        return len(self.shape)

    def with_object(self, index: Tensor, **change: Tensor) -> Scene:
        """Return the scenes with the attributes in ``change`` ``(B,)`` set for object ``index`` ``(B,)``."""
        new = {k: getattr(self, k).scatter(1, index[:, None], v[:, None]) for k, v in change.items()}
        return replace(self, **new)

    def reach(self) -> Tensor:
        """Return ``(B, N)`` circumscribed radii in pixels."""
        return self.r * torch.tensor(REACH, device=self.r.device)[self.shape]

    def apart(self, gap: float = 1.0, margin: float = 0.5, size: int = SIZE) -> Tensor:
        """Return ``(B,)``: whether all objects lie inside the canvas and no two come closer than ``gap`` pixels."""
        reach, absent = self.reach(), ~self.here
        low = reach + margin
        inside = (self.x >= low) & (self.x <= size - low) & (self.y >= low) & (self.y <= size - low)
        d = ((self.x[:, :, None] - self.x[:, None]) ** 2 + (self.y[:, :, None] - self.y[:, None]) ** 2).sqrt()
        free = d > reach[:, :, None] + reach[:, None] + gap
        skip = absent[:, :, None] | absent[:, None] | torch.eye(d.shape[1], dtype=torch.bool, device=d.device)
        return (inside | absent).all(1) & (free | skip).flatten(1).all(1)


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Return uniform numbers on [low, high) on the generator's device."""
    return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device)


def distance(shape: Tensor, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Return signed distances (negative inside) of points in the object's own frame; all arguments broadcast."""
    s3 = math.sqrt(3) / 2
    ax, ay = x.abs(), y.abs()
    options = (
        (x * x + y * y).clamp_min(1e-12).sqrt() - r,
        torch.maximum(ax, ay) - 0.9 * r,
        torch.maximum(y, ax * s3 - y / 2) - 0.725 * r,
        torch.maximum(ax - 1.4 * r, ay - 0.55 * r),
    )
    out = options[0]
    for k in range(1, len(options)):
        out = torch.where(shape == k, options[k], out)
    return out


def coverage(scene: Scene, size: int = SIZE) -> Tensor:
    """Return ``(B, N, size, size)`` coverages in [0, 1]."""
    grid = torch.arange(size, device=scene.x.device) + 0.5
    dx = grid[None, None, None, :] - scene.x[..., None, None]
    dy = grid[None, None, :, None] - scene.y[..., None, None]
    c, s = scene.angle.cos()[..., None, None], scene.angle.sin()[..., None, None]
    d = distance(scene.shape[..., None, None], c * dx + s * dy, c * dy - s * dx, scene.r[..., None, None])
    return (0.5 - d).clamp(0, 1) * scene.here[..., None, None]


def render(scene: Scene, size: int = SIZE) -> Tensor:
    """Return images ``(B, 3, size, size)`` in [0, 1]; later objects cover earlier ones."""
    palette = torch.tensor(list(COLOURS.values()), device=scene.x.device)
    cover = coverage(scene, size)
    image = torch.full((len(scene), 3, size, size), BACKGROUND, device=scene.x.device)
    for k in range(cover.shape[1]):
        a = cover[:, k, None]
        image = image * (1 - a) + a * palette[scene.colour[:, k], :, None, None]
    return image


def draw_scene(generator: torch.Generator, n: int, objects: int, r: tuple[float, float], size: int = SIZE) -> Scene:
    """Draw ``n`` scenes of exactly ``objects`` objects of different colours, anywhere: :meth:`Scene.apart` may fail."""
    device = generator.device
    order = torch.rand(n, len(COLOURS), generator=generator, device=device).argsort(1)
    shape = torch.randint(len(SHAPES), (n, objects), generator=generator, device=device)
    return Scene(
        shape,
        order[:, :objects],
        uniform(generator, 4, size - 4, n, objects),
        uniform(generator, 4, size - 4, n, objects),
        uniform(generator, *r, n, objects),
        uniform(generator, 0, 2 * math.pi, n, objects),
        torch.ones(n, objects, dtype=torch.bool, device=device),
    )
