"""Videos drawn by formula, with their exact optical flow: a disc on a grey ground, moved, faded or shrunk as told."""

from dataclasses import dataclass

import torch

SIZE = 48
FRAMES = 10
COLOUR = torch.tensor([0.9, 0.3, 0.1])
GROUND = 0.2


@dataclass(frozen=True)
class Clip:
    """Centres ``(F, 2)`` as (x, y), radii ``(F,)`` and opacities ``(F,)`` of one disc."""

    centre: torch.Tensor
    radius: torch.Tensor
    opacity: torch.Tensor

    def video(self):
        """Frames ``(F, 3, H, W)``: a pixel mixes disc and ground by the share that the disc covers."""
        cover = (self.radius[:, None, None] + 0.5 - self._distance()).clamp(0, 1) * self.opacity[:, None, None]
        return GROUND + cover[:, None] * (COLOUR[:, None, None] - GROUND)

    def flow(self):
        """Exact flow ``(F-1, 2, H, W)``: matter inside the disc moves with it, and inwards where it shrinks."""
        inside = (self._distance()[:-1] <= self.radius[:-1, None, None] + 0.5) & (self.opacity[:-1, None, None] > 0)
        step = (self.centre[1:] - self.centre[:-1])[:, :, None, None]
        growth = (self.radius[1:] / self.radius[:-1].clamp(min=1e-6) - 1)[:, None, None, None]
        return inside[:, None] * (step + growth * self._offset()[:-1])

    def _offset(self):
        y, x = torch.meshgrid(torch.arange(SIZE).float(), torch.arange(SIZE).float(), indexing="ij")
        return torch.stack((x, y))[None] - self.centre[:, :, None, None]

    def _distance(self):
        return self._offset().norm(dim=1)


def clip(centre, radius=6.0, opacity=1.0):
    f = len(centre)
    fill = lambda v: torch.as_tensor(v, dtype=torch.float32).expand(f).clone()  # noqa: E731
    return Clip(torch.as_tensor(centre, dtype=torch.float32), fill(radius), fill(opacity))


def ballistic(start, speed, acceleration, frames=FRAMES):
    t = torch.arange(frames).float()[:, None]
    start, speed, acceleration = (torch.tensor(v, dtype=torch.float32) for v in (start, speed, acceleration))
    return start + speed * t + acceleration * t**2 / 2


class AnalyticFlow:
    """A flow function that knows the clips: it answers with their exact flow, forwards or backwards as asked."""

    def __init__(self, clips):
        self.fields = torch.stack([c.flow() for c in clips])

    def __call__(self, a, b):
        return self.fields.flatten(0, 1).to(a)


MOTIONS = {
    "free fall": [((24, 8), (0, 0.3), (0, 0.6)), ((15, 9), (0, 0.6), (0, 0.45)), ((33, 8), (0, 1.5), (0, 0.3))],
    "throw": [((8, 36), (3.2, -5.0), (0, 1.0)), ((40, 30), (-3.0, -3.5), (0, 0.8)), ((9, 40), (2.5, -6.0), (0, 1.2))],
    "ramp": [
        ((9, 10), (0.2, 0.1), (0.6, 0.3)),
        ((38, 10), (-0.4, 0.4), (-0.4, 0.4)),
        ((8, 20), (0.5, 0.2), (0.5, 0.2)),
    ],
}
CASES = [(name, *params) for name, many in MOTIONS.items() for params in many]


def corrupted(start, speed, acceleration):
    """The ways a video breaks the laws, by name, for one true motion."""
    true = ballistic(start, speed, acceleration)
    half = FRAMES // 2
    t = torch.arange(FRAMES).float()
    v = true[1:] - true[:-1]
    flip = v.clone()
    flip[half:] = v[half - 1] - (v[half:] - v[half - 1])  # acceleration changes its sign
    bounce = v.clone()
    bounce[half:] = -v[half:]  # turns back in mid-air
    stop = v.clone()
    stop[half:] = 0
    jump = v.clone()
    jump[half] = v[half] + torch.tensor([0.0, -6.0])
    path = lambda w: torch.cat((true[:1], true[:1] + w.cumsum(0)))  # noqa: E731
    return {
        "acceleration flips": clip(path(flip)),
        "turns in mid-air": clip(path(bounce)),
        "stops in mid-air": clip(path(stop)),
        "jumps": clip(path(jump)),
        "trembles": clip(true + 1.5 * torch.tensor([[(-1.0) ** i, 0.0] for i in range(FRAMES)])),
        "fades": clip(true, opacity=1 - t / FRAMES),
        "shrinks": clip(true, radius=6 - 0.5 * t),
        "grows": clip(true, radius=4 + 0.4 * t),
        "vanishes": clip(true, opacity=(t < half).float()),
        "stands still": clip(true[:1].expand(FRAMES, 2)),
    }
