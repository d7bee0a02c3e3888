"""Spatial edits: was the object moved, resized or turned as the instruction says (in the manner of Talk2Move).

Each sample's meta holds the picture before the edit and the edit itself:

    source: (3, H, W) in [0, 1]      edit: {"object": "circle", "kind": "move", "direction": "left", "amount": .2}
                                           {"object": "circle", "kind": "resize", "factor": 1.5}
                                           {"object": "circle", "kind": "rotate", "degrees": 90}

With centres c and sizes s = √area of the object before (0) and after (1), lengths in units of the picture's side:

    move     clip(d·u / amount, 0, 1) · exp(−|d − (d·u)u| / τ) · exp(−|log s₁/s₀| / τ),   d = c₁ − c₀, u the direction
    resize   exp(−|log (s₁/s₀) − log factor| / τ) · exp(−|d| / τ)
    rotate   exp(−angle(θ₁ − θ₀, degrees) / (90° τ)) · exp(−|d| / τ),   θ the mask's principal axis, modulo 180°

each in [0, 1], 1 for the exact edit. An object that is gone after the edit scores 0, since the edit lost it; one that
is not found before the edit cannot be judged. Talk2Move's code is not public: the terms are its description's, the
formulae ours. Reference: Talk2Move (2601.02356).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, field
from flowalign.rewards.detect import Detector, Found, TorchvisionDetector

__all__ = ["DIRECTIONS", "Spatial", "axis_angle"]

_D = math.sqrt(0.5)
DIRECTIONS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up left": (-_D, -_D),
    "up right": (_D, -_D),
    "down left": (-_D, _D),
    "down right": (_D, _D),
}


def axis_angle(mask: Tensor) -> float:
    """Return the angle in degrees, [0, 180), of the longest axis of a ``(H, W)`` mask, clockwise from the x axis.

    Raises:
        ValueError: an empty mask, or one without a longest axis (a disc, a square).
    """
    y, x = (v.double() for v in mask.nonzero(as_tuple=True))
    if len(x) < 2:
        raise ValueError("a mask of fewer than two pixels has no axis.")
    points = torch.stack([x - x.mean(), y - y.mean()])
    values, vectors = torch.linalg.eigh(points @ points.T / len(x))
    if values[1] < 1.05 * values[0]:
        raise ValueError("the object is as long as it is wide: its rotation cannot be seen.")
    return math.degrees(math.atan2(vectors[1, 1].item(), vectors[0, 1].item())) % 180


class Spatial(Judge):
    """Move, resize and rotate rewards.

    Args:
        detector: None for torchvision's Mask R-CNN; rotations need masks.
        tolerance: τ; smaller is stricter.
        confidence: objects below it are not seen.
    """

    card = Card(
        "spatial",
        "object moved, resized or turned as instructed",
        licence="BSD-3 (torchvision)",
        weights="torchvision maskrcnn_resnet50_fpn_v2 COCO_V1",
        reference="arXiv:2601.02356",
    )

    def __init__(self, detector: Detector | None = None, tolerance: float = 0.25, confidence: float = 0.3) -> None:
        super().__init__()
        if tolerance <= 0:
            raise ValueError(f"tolerance must be positive; got {tolerance}.")
        self.detector: Detector = detector or TorchvisionDetector()
        self.tolerance, self.confidence = tolerance, confidence

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Detect before and after, and compare.

        Raises:
            Unjudged: the object is not found before the edit, or a rotation cannot be seen.
        """
        count = len(media)
        edits = field(meta, "edit", self.card.name, count)
        sources = field(meta, "source", self.card.name, count)
        for i, edit in enumerate(edits):
            _check(edit, self.detector.labels, i)
        before = [self.detector(s.unsqueeze(0).to(media))[0] for s in sources]
        after = self.detector(media.detach())
        scores, reasons = torch.full((count,), torch.nan), {}
        for i, edit in enumerate(edits):
            old, new = (self._best(objects, edit["object"]) for objects in (before[i], after[i]))
            if old is None:
                reasons[i] = f"no {edit['object']!r} is found before the edit"
            elif new is None:
                scores[i] = 0.0
            else:
                try:
                    scores[i] = self.compare(old, new, edit, tuple(sources[i].shape[-2:]), tuple(media.shape[-2:]))
                except ValueError as error:
                    reasons[i] = str(error)
        self.unjudged(scores, reasons)
        return scores.to(media.device)

    def _best(self, objects: Sequence[Found], label: str) -> Found | None:
        return next((f for f in objects if f.label == label and f.score >= self.confidence), None)

    def compare(
        self, old: Found, new: Found, edit: Mapping[str, Any], size0: tuple[int, ...], size1: tuple[int, ...]
    ) -> float:
        """Return the score of one edit; picture sizes are ``(H, W)`` before and after."""
        (x0, y0), s0 = _place(old, size0)
        (x1, y1), s1 = _place(new, size1)
        dx, dy, tau = x1 - x0, y1 - y0, self.tolerance
        still = math.exp(-math.hypot(dx, dy) / tau)
        if edit["kind"] == "move":
            ux, uy = DIRECTIONS[edit["direction"]]
            along = dx * ux + dy * uy
            aside = math.hypot(dx - along * ux, dy - along * uy)
            reached = min(max(along / edit["amount"], 0.0), 1.0)
            return reached * math.exp(-aside / tau) * math.exp(-abs(math.log(s1 / s0)) / tau)
        if edit["kind"] == "resize":
            return still * math.exp(-abs(math.log(s1 / s0) - math.log(edit["factor"])) / tau)
        if old.mask is None or new.mask is None:
            raise ValueError("rotations need a detector with masks")
        turned = axis_angle(new.mask) - axis_angle(old.mask)
        gap = abs((turned - edit["degrees"] + 90) % 180 - 90)
        return still * math.exp(-gap / (90 * tau))


def _place(found: Found, size: tuple[int, ...]) -> tuple[tuple[float, float], float]:
    """Return the centre and √area, in units of the picture's sides."""
    h, w = size
    x, y = found.centre
    area = found.size[0] * found.size[1] / (h * w)
    return (x / w, y / h), math.sqrt(max(area, 1e-8))


def _check(edit: Mapping[str, Any], labels: Sequence[str], i: int) -> None:
    """Refuse an edit that could never be fulfilled."""
    kind = edit.get("kind")
    fine = {
        "move": edit.get("direction") in DIRECTIONS and _positive(edit.get("amount")),
        "resize": _positive(edit.get("factor")),
        "rotate": isinstance(edit.get("degrees"), int | float) and math.isfinite(edit["degrees"]),
    }
    if not fine.get(str(kind), False):
        raise ValueError(
            f"sample {i}: wanted kind move (direction of {', '.join(DIRECTIONS)}; amount > 0), resize (factor > 0) "
            f"or rotate (degrees); got {dict(edit)}."
        )
    if edit.get("object") not in labels:
        raise ValueError(f"sample {i}: the detector knows no object {edit.get('object')!r}.")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf
