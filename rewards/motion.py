"""Motion smoothness and dynamic degree: two views of one optical flow that keep each other honest.

With the flows ``f⁺`` and ``f⁻`` from a frame to the next and to the previous one,

    smoothness = 1 - Σ |f⁺ + f⁻| / (Σ (|f⁺| + |f⁻|) + ε)     in [0, 1]: uniform motion 1, trembling in place 0
    dynamics   = mean over frame pairs of the mean of the fastest 5 % of |f|, in pixels at a short side of 256

A still video is perfectly smooth (1), which is why smoothness alone rewards freezing; use it with the dynamic degree.
Both names come from VBench (Huang et al. 2024, arXiv 2311.17982), which measures smoothness with a frame interpolation
network and thresholds the dynamic degree into yes or no; these are continuous, differentiable and not its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge
from flowalign.rewards.flow import FlowFunction, flow_by_name, video_flow

__all__ = ["DynamicDegree", "MotionSmoothness"]

LICENCE = "BSD-3-Clause (torchvision RAFT code); its weights follow their training sets' terms"


@final
class MotionSmoothness(Judge):
    """Share of the motion that neither starts, stops nor turns within two frames.

    Args:
        weights: of torchvision's RAFT, see :class:`flowalign.rewards.flow.Raft`, or "lucas-kanade" for a flow that
            needs none; not used where ``flow`` is given.
        flow: any other flow function.
        floor: mean speed in pixels per frame below which motion counts as noise of the flow (ε per pixel).
    """

    card = Card(
        name="motion-smoothness",
        summary="how little the flow changes within two frames; 1 for uniform motion and for none",
        modality=("video",),
        differentiable=True,
        range=(0.0, 1.0),
        licence=LICENCE,
        weights="torchvision raft_large",
        reference="after VBench, arXiv 2311.17982",
    )

    def __init__(self, weights: str = "download", *, flow: FlowFunction | None = None, floor: float = 1e-3) -> None:
        super().__init__()
        self.flow = flow_by_name(weights) if flow is None else flow
        self.floor = floor
        self.freeze()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` scores in [0, 1] of videos ``(B, F, 3, H, W)`` with F ≥ 3; prompts are not read."""
        if media.shape[1] < 3:
            raise ValueError(f"motion-smoothness looks a frame ahead and a frame back: 3 frames; got {media.shape[1]}.")
        video = media.float()
        ahead = video_flow(self.flow, video[:, 1:])
        back = video_flow(self.flow, video.flip(1)[:, 1:]).flip(1)
        turn = _speed(ahead + back).flatten(1).sum(1)
        travel = (_speed(ahead) + _speed(back)).flatten(1)
        return 1 - turn / (travel.sum(1) + self.floor * travel.shape[1])


@final
class DynamicDegree(Judge):
    """Speed of the fastest pixels: what a video loses when a model learns to stand still.

    Args:
        weights: of torchvision's RAFT, see :class:`flowalign.rewards.flow.Raft`, or "lucas-kanade" for a flow that
            needs none; not used where ``flow`` is given.
        flow: any other flow function.
        share: share of pixels that count as the fastest.
        cap: speed above which more motion earns nothing; None for no cap.
    """

    card = Card(
        name="dynamic-degree",
        summary="mean speed of the fastest 5 % of pixels, in pixels per frame at a short side of 256",
        modality=("video",),
        differentiable=True,
        range=(0.0, 40.0),
        licence=LICENCE,
        weights="torchvision raft_large",
        reference="after VBench, arXiv 2311.17982",
    )

    def __init__(
        self,
        weights: str = "download",
        *,
        flow: FlowFunction | None = None,
        share: float = 0.05,
        cap: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1]; got {share}.")
        self.flow = flow_by_name(weights) if flow is None else flow
        self.share = share
        self.cap = cap
        self.freeze()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` speeds of videos ``(B, F, 3, H, W)`` with F ≥ 2; prompts are not read."""
        if media.shape[1] < 2:
            raise ValueError(f"dynamic-degree needs 2 frames; got {media.shape[1]}.")
        speed = _speed(video_flow(self.flow, media.float())).flatten(2) * (256 / min(media.shape[-2:]))
        fastest = speed.topk(max(1, round(self.share * speed.shape[2])), dim=2).values.mean(2)
        return (fastest if self.cap is None else fastest.clamp(max=self.cap)).mean(1)


def _speed(v: Tensor) -> Tensor:
    """Return ``|v|`` ``(B, T, H, W)`` of flows ``(B, T, 2, H, W)``, 0 with a zero gradient at rest."""
    square = v.square().sum(2)
    moving = square > 0
    return torch.where(moving, torch.where(moving, square, 1.0).sqrt(), 0.0)
