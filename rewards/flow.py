"""Optical flow: how far each pixel travels between two frames, and what is found where it lands.

A flow function maps frames ``a, b`` ``(N, 3, H, W)`` in [0, 1] to ``(N, 2, H, W)`` in pixels, (right, down), with

    b(p + flow(p)) = a(p)        brightness constancy.

Any such function serves: the frozen RAFT of torchvision (Teed & Deng 2020, arXiv 2003.12039), another network, or, in
tests, the analytic flow of a video drawn by formula. Gradients reach the frames if the function lets them through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FlowFunction", "Raft", "flow_by_name", "look_up", "pixel_grid", "video_flow"]

FlowFunction = Callable[[Tensor, Tensor], Tensor]


def pixel_grid(like: Tensor) -> Tensor:
    """Return the pixel positions ``(1, 2, H, W)`` as (x, y) of a field ``(*, H, W)``."""
    h, w = like.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(h, device=like.device, dtype=like.dtype),
        torch.arange(w, device=like.device, dtype=like.dtype),
        indexing="ij",
    )
    return torch.stack((x, y))[None]


def look_up(field: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Read a field at real-valued positions, bilinearly.

    Args:
        field: ``(N, C, H, W)``.
        at: ``(N, 2, H, W)`` positions (x, y) in pixels.

    Returns:
        ``(N, C, H, W)`` values, differentiable in both arguments, and ``(N, 1, H, W)`` with 1 where the position lies
        inside the picture: what has left it can be judged no more.
    """
    h, w = field.shape[-2:]
    x, y = at[:, 0], at[:, 1]
    grid = torch.stack((2 * x / max(w - 1, 1) - 1, 2 * y / max(h - 1, 1) - 1), dim=-1)
    inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
    values = F.grid_sample(field, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return values, inside[:, None].to(field.dtype)


def video_flow(flow: FlowFunction, video: Tensor) -> Tensor:
    """Return the flow ``(B, F-1, 2, H, W)`` between neighbouring frames of ``(B, F, 3, H, W)``.

    Raises:
        ValueError: where the flow function returns another shape.
    """
    b, f = video.shape[:2]
    out = flow(video[:, :-1].flatten(0, 1), video[:, 1:].flatten(0, 1))
    want = (b * (f - 1), 2, *video.shape[-2:])
    if tuple(out.shape) != want:
        raise ValueError(f"the flow function must return {want} (pixels, right and down); got {tuple(out.shape)}.")
    return out.to(torch.promote_types(out.dtype, torch.float32)).unflatten(0, (b, f - 1))


@final
class Raft(nn.Module):
    """Torchvision's RAFT, frozen, in float32, for frames of any size.

    RAFT needs sides divisible by 8 and at least 128: frames are resized bilinearly to the next such size and the
    flow is scaled back to the original pixels.

    Args:
        weights: a file of torchvision's state dict (safetensors, or a pickle read with ``weights_only=True``);
            "download" takes torchvision's own published weights; "random" draws them, for trying the plumbing.
        size: "small" (1 M parameters) or "large" (5 M).
        updates: refinement steps; torchvision's default is 12.
    """

    def __init__(
        self, weights: Path | str = "download", *, size: Literal["small", "large"] = "large", updates: int = 12
    ) -> None:
        super().__init__()
        from torchvision.models import optical_flow

        build = optical_flow.raft_small if size == "small" else optical_flow.raft_large
        self.net = build(weights="DEFAULT" if weights == "download" else None)
        if weights not in ("download", "random"):
            self.net.load_state_dict(_state_dict(Path(weights)))
        self.net.eval().requires_grad_(False)
        self.updates = updates

    def train(self, mode: bool = True) -> Raft:
        """Stay in evaluation mode: RAFT has batch norms that must not follow the judged videos."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the flow ``(N, 2, H, W)`` in pixels from frames ``a`` to frames ``b``."""
        h, w = a.shape[-2:]
        size = [max(128, 8 * math.ceil(side / 8)) for side in (h, w)]
        with torch.autocast(a.device.type, enabled=False):
            frames = [2 * F.interpolate(x.float(), size, mode="bilinear", align_corners=False) - 1 for x in (a, b)]
            out = self.net(*frames, num_flow_updates=self.updates)[-1]
            out = F.interpolate(out, (h, w), mode="bilinear", align_corners=False)
        return out * out.new_tensor([w / size[1], h / size[0]])[None, :, None, None]


def flow_by_name(weights: str) -> FlowFunction:
    """Return the flow function that a reward's ``weights`` name: "lucas-kanade" needs none, all else is RAFT's."""
    if weights == "lucas-kanade":
        from flowalign.rewards.lucas_kanade import LucasKanade

        return LucasKanade()
    return Raft(weights)


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file without running any code from it."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
