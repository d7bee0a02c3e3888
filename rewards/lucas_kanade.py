"""Optical flow without weights: Lucas and Kanade's least squares, coarse to fine, differentiable.

In a Gaussian window around each pixel the flow solves ``Σ ∇I (∇I·dv + I_t) = 0``, that is

    (G + λ 1) dv = -Σ ∇I I_t,    G = Σ ∇I ∇Iᵀ,    λ = ε + ρ tr G

for the frame warped back by the flow found so far, on a pyramid from coarse to fine; λ leaves flat ground at rest.
Good for a few pixels per frame of textured or edged objects on plain ground, as in small worlds and where RAFT's
weights cannot be had; RAFT is the better eye for real video. Lucas & Kanade 1981; Bouguet 2001 for the pyramid.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from flowalign.rewards.flow import look_up, pixel_grid

__all__ = ["LucasKanade"]


@final
class LucasKanade:
    """A flow function, see :mod:`flowalign.rewards.flow`.

    Args:
        levels: of the pyramid; each doubles the motion that can be followed, and halves the smallest object.
        steps: refinements per level.
        window: standard deviation of the window in pixels.
        floor: ε, the squared gradient below which ground counts as flat.
    """

    def __init__(self, *, levels: int = 3, steps: int = 6, window: float = 1.5, floor: float = 1e-4) -> None:
        if levels < 1 or steps < 1 or window <= 0 or floor <= 0:
            raise ValueError(f"levels and steps must be ≥ 1, window and floor > 0; got {levels, steps, window, floor}.")
        self.levels, self.steps, self.window, self.floor = levels, steps, window, floor

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the flow ``(N, 2, H, W)`` in pixels from frames ``a`` to frames ``b`` ``(N, 3, H, W)``."""
        h, w = a.shape[-2:]
        flow = a.new_zeros(len(a), 2, 1, 1)
        for level in reversed(range(self.levels)):
            size = (max(4, h >> level), max(4, w >> level))
            near, far = (blur(F.interpolate(x, size, mode="bilinear", antialias=True), 0.7) for x in (a, b))
            flow = self._resize(flow, size)
            for _ in range(self.steps):
                flow = flow + self._step(near, far, flow)
        return flow

    @staticmethod
    def _resize(flow: Tensor, size: tuple[int, int]) -> Tensor:
        scale = flow.new_tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]])
        return F.interpolate(flow, size, mode="bilinear", align_corners=False) * scale[None, :, None, None]

    def _step(self, near: Tensor, far: Tensor, flow: Tensor) -> Tensor:
        """Return the correction of the flow, at most a pixel along each axis."""
        warped, _ = look_up(far, pixel_grid(near) + flow)
        padded = F.pad((near + warped) / 2, (1, 1, 1, 1), mode="replicate")
        gx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
        gy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
        gt = warped - near
        products = [(p * q).sum(1) for p, q in ((gx, gx), (gx, gy), (gy, gy), (gx, gt), (gy, gt))]
        xx, xy, yy, xt, yt = blur(torch.stack(products, 1), self.window).unbind(1)
        ridge = self.floor + 0.01 * (xx + yy)
        xx, yy = xx + ridge, yy + ridge
        det = xx * yy - xy * xy
        return torch.stack(((xy * yt - yy * xt) / det, (xy * xt - xx * yt) / det), 1).clamp(-1, 1)


def blur(x: Tensor, std: float) -> Tensor:
    """Return ``(N, C, H, W)`` smoothed by a Gaussian of ``std`` pixels, edges replicated."""
    reach, channels = max(1, round(3 * std)), x.shape[1]
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-at.square() / (2 * std**2))
    kernel = (kernel / kernel.sum()).expand(channels, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel[:, :, None, :], groups=channels)
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel[:, :, :, None], groups=channels)
