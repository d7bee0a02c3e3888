"""NewtonRewards: does matter in the video keep its mass, and does it move with constant acceleration?

Optical flow ``v_t`` stands in for velocity and appearance ``φ_t`` for mass (Le et al. 2025, arXiv 2512.00425; only the
idea is public, so the formulas below are this project's). Follow the matter that moves from pixel ``p`` along the flow,

    p₀ = p,   p₁ = p₀ + v_t(p₀),   p₂ = p₁ + v_{t+1}(p₁),

and weigh each pixel by ``w = s(|v_t(p)|)``, ``s(u) = u²/(u² + τ²)``, eroded by one pixel and zero once ``p₂`` has left
the picture. Then

    kinematic = Σ w |v_{t+2}(p₂) - 2 v_{t+1}(p₁) + v_t(p₀)| / Σ w |v_t(p₀)|         constant acceleration: 0
    known g   = Σ w |v_{t+1}(p₁) - v_t(p₀) - g|             / Σ w |v_t(p₀)|         where meta gives it
    mass      = Σ w (|φ_{t+1}(p₁) - φ_t(p₀)| + |∇·v_t(p₀)|) / Σ w                   continuity: Dρ/Dt = -ρ ∇·v
    static    = max(0, 1 - mean(w) / min_area)
    score     = -(a kinematic + b mass + c static)

Following the matter is what makes a falling ball score 0: at a fixed pixel the flow jumps whenever the ball enters or
leaves it. The difference at a fixed pixel, as the abstract has it, is ``frame="pixel"``; it suits camera motion that
fills the picture. A still video has no kinematic error at all, so a video needs a least area of moving matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from flowalign.gaussian import work_dtype
from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, field
from flowalign.rewards.flow import FlowFunction, flow_by_name, look_up, pixel_grid, video_flow

__all__ = ["Newton", "NewtonOptions", "NewtonTerms"]

FeatureFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class NewtonOptions:
    """How the three laws are weighed.

    Attributes:
        kinematic: weight of the constant-acceleration term.
        mass: weight of the mass term.
        static: weight of the penalty on videos in which nothing moves.
        speed: τ, the speed in pixels per frame at which a pixel counts half as moving; the flow's noise sets it.
        min_area: least mean share of moving pixels below which a video counts as static.
        frame: "material" follows the matter, "pixel" compares at fixed pixels.
    """

    kinematic: float = 1.0
    mass: float = 1.0
    static: float = 1.0
    speed: float = 0.25
    min_area: float = 0.002
    frame: Literal["material", "pixel"] = "material"

    def __post_init__(self) -> None:
        if self.speed <= 0 or not 0 < self.min_area <= 1:
            raise ValueError(
                f"speed must be positive and min_area in (0, 1]; got speed={self.speed}, min_area={self.min_area}."
            )


@dataclass(frozen=True)
class NewtonTerms:
    """The three residuals, ``(B,)`` each, 0 where the law holds."""

    kinematic: Tensor
    mass: Tensor
    static: Tensor


@final
class Newton(Judge):
    """Constant acceleration and conserved mass of moving matter, from optical flow.

    ``meta[i]["acceleration"]`` = (right, down) in pixels per frame², if every sample of the batch has it, replaces
    "some constant acceleration" by that one.

    Args:
        weights: of torchvision's RAFT, see :class:`flowalign.rewards.flow.Raft`, or "lucas-kanade" for a flow that
            needs none; not used where ``flow`` is given.
        flow: any other flow function.
        features: maps frames ``(N, 3, H, W)`` to ``(N, C, h, w)`` whose constancy stands for mass; None: the colours.
        options: the weights and scales.
    """

    card = Card(
        name="newton",
        summary="constant acceleration and conserved mass of what moves, by optical flow",
        modality=("video",),
        differentiable=True,
        range=(-3.0, 0.0),
        licence="BSD-3-Clause (torchvision RAFT code); its weights follow their training sets' terms",
        weights="torchvision raft_large",
        reference="NewtonRewards, arXiv 2512.00425",
    )

    def __init__(
        self,
        weights: str = "download",
        *,
        flow: FlowFunction | None = None,
        features: FeatureFunction | None = None,
        options: NewtonOptions = NewtonOptions(),
    ) -> None:
        super().__init__()
        self.flow = flow_by_name(weights) if flow is None else flow
        self.features = features
        self.options = options
        self.freeze()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` scores of videos ``(B, F, 3, H, W)`` with F ≥ 4; prompts are not read."""
        t = self.terms(media, meta)
        o = self.options
        return -(o.kinematic * t.kinematic + o.mass * t.mass + o.static * t.static).float()

    def terms(self, media: Tensor, meta: Meta | None = None) -> NewtonTerms:
        """Return the residuals one by one.

        Raises:
            ValueError: for fewer than four frames, in which no acceleration can be seen to stay constant.
        """
        if media.shape[1] < 4:
            raise ValueError(f"newton compares three flows in a row and needs at least 4 frames; got {media.shape[1]}.")
        video = media.to(work_dtype(media))
        return self._terms(video, video_flow(self.flow, video), _known_acceleration(meta, video))

    def _terms(self, video: Tensor, v: Tensor, g: Tensor | None) -> NewtonTerms:
        count, steps = v.shape[:2]
        w = _eroded(v.square().sum(2, keepdim=True), self.options.speed)  # (B, F-1, 1, H, W)
        reach = steps - 1 if g is not None else steps - 2
        v0, w0 = v[:, :reach].flatten(0, 1), w[:, :reach].flatten(0, 1)
        v1, p1, in1 = self._follow(v0, pixel_grid(v), v[:, 1 : reach + 1].flatten(0, 1))
        if g is not None:
            residual, w0 = v1 - v0 - g.repeat_interleave(reach, 0)[:, :, None, None], w0 * in1
        else:
            v2, _, in2 = self._follow(v1, p1, v[:, 2:].flatten(0, 1))
            residual, w0 = v2 - 2 * v1 + v0, w0 * in1 * in2
        kinematic = _ratio(w0 * _length(residual), w0 * _length(v0), count)
        return NewtonTerms(kinematic, self._mass(video, v, w, count), self._static(w))

    def _follow(self, step: Tensor, at: Tensor, field: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next flow where the matter has gone, its position, and whether it is still in the picture."""
        if self.options.frame == "pixel":
            return field, at, torch.ones_like(step[:, :1])
        there = at + step
        values, inside = look_up(field, there)
        return values, there, inside

    def _mass(self, video: Tensor, v: Tensor, w: Tensor, count: int) -> Tensor:
        frames = video.flatten(0, 1)
        phi = frames if self.features is None else self.features(frames).to(frames.dtype)
        if phi.shape[-2:] != v.shape[-2:]:
            phi = F.interpolate(phi, v.shape[-2:], mode="bilinear", align_corners=False)
        phi = phi.unflatten(0, video.shape[:2])
        vt, wt = v.flatten(0, 1), w.flatten(0, 1)
        after, inside = look_up(phi[:, 1:].flatten(0, 1), pixel_grid(v) + vt)
        change = (after - phi[:, :-1].flatten(0, 1)).abs().mean(1, keepdim=True)
        return _ratio(wt * inside * (change + _divergence(vt).abs()), wt * inside, count)

    def _static(self, w: Tensor) -> Tensor:
        return (1 - w.flatten(1).mean(1) / self.options.min_area).clamp(min=0)


def _known_acceleration(meta: Meta | None, video: Tensor) -> Tensor | None:
    """Return ``(B, 2)`` accelerations if any sample of the batch has one: then all must, or the scores mix two laws."""
    if meta is None or not any("acceleration" in entry for entry in meta):
        return None
    rows = [torch.as_tensor(g) for g in field(meta, "acceleration", "newton", len(video))]
    wrong = [i for i, g in enumerate(rows) if tuple(g.shape) != (2,)]
    if wrong:
        raise ValueError(
            f"meta[{wrong[0]}]['acceleration'] must be (right, down) in pixels per frame²; got {rows[wrong[0]]}."
        )
    return torch.stack(rows).to(video)


def _eroded(speed2: Tensor, tau: float) -> Tensor:
    """Return ``s(|v|)`` ``(B, T, 1, H, W)``, its least value over 3x3 pixels: an edge of the flow is no motion."""
    s = speed2 / (speed2 + tau**2)
    return -F.max_pool2d(-s.flatten(0, 1), 3, stride=1, padding=1).unflatten(0, s.shape[:2])


def _divergence(v: Tensor) -> Tensor:
    """Return ``∂u/∂x + ∂v/∂y`` ``(N, 1, H, W)`` by central differences."""
    u = F.pad(v, (1, 1, 1, 1), mode="replicate")
    return (u[:, :1, 1:-1, 2:] - u[:, :1, 1:-1, :-2] + u[:, 1:, 2:, 1:-1] - u[:, 1:, :-2, 1:-1]) / 2


def _length(v: Tensor) -> Tensor:
    """Return ``|v|`` over channels, with a finite gradient at rest."""
    return (v.square().sum(1, keepdim=True) + 1e-12).sqrt()


def _ratio(top: Tensor, bottom: Tensor, count: int) -> Tensor:
    """Return per-sample ``Σ top / Σ bottom``; 0 where nothing moves, which the static term answers for."""
    return top.reshape(count, -1).sum(1) / (bottom.reshape(count, -1).sum(1) + 1e-6)
