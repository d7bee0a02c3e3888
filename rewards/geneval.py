"""GenEval: whether what the prompt asks for is there, in number, colour and place.

Each sample's ``meta`` holds the rules of GenEval's own JSON lines:

    include: [{"class": "cat", "count": 2, "color": "red", "position": ["left of", 0]}, ...]
    exclude: [{"class": "cat", "count": 3}]        tag: "counting" (raises the confidence threshold to .9)

``strict`` is the published verdict: 1 if every rule holds, else 0. ``partial``, for training, is the mean over the
rules' parts (how near the count is, the share of rightly coloured objects, the relation) in [0, 1], after Flow-GRPO's
server. "left of" holds if, after shrinking the offset of the centres by .1 of the summed sizes, its x component is
below −.5 of the offset's length; likewise the others.

The published figures use Mask2Former of mmdet 2; detectors differ, so compare only scores of one detector. Colours
are named by CLIP on the masked crop. Reference: Ghosh et al., GenEval (2310.11513); rules re-written.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, field
from flowalign.rewards.detect import Detector, Found, TorchvisionDetector, iou
from flowalign.rewards.towers import OpenClipTower, Tower

__all__ = ["COLOURS", "ClipColour", "GenEval", "relations"]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
ColourNamer = Callable[[Tensor, Sequence[Found], str], list[str]]
Rule = Mapping[str, Any]


@dataclass(frozen=True)
class Thresholds:
    """The published settings.

    Attributes:
        confidence: objects below it are not counted ...
        counting: ... nor below this where the tag is ``counting``.
        objects: at most so many per class.
        overlap: of two objects of a class that overlap more, the weaker is dropped; 1 keeps all.
        position: share of the summed sizes by which two centres must differ.
    """

    confidence: float = 0.3
    counting: float = 0.9
    objects: int = 16
    overlap: float = 1.0
    position: float = 0.1


def relations(a: Found, b: Found, margin: float = 0.1) -> set[str]:
    """Return where ``a`` lies as seen from ``b``: of left of, right of, above and below."""
    offset = [p - q for p, q in zip(a.centre, b.centre, strict=True)]
    sizes = [p + q for p, q in zip(a.size, b.size, strict=True)]
    rest = [math.copysign(max(abs(o) - margin * s, 0), o) for o, s in zip(offset, sizes, strict=True)]
    length = math.hypot(*offset)
    if max(map(abs, rest)) < 1e-3:
        return set()
    dx, dy = (r / length for r in rest)
    names = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in names.items() if holds}


class ClipColour(nn.Module):
    """Name the colour of objects by zero-shot CLIP on the crop, the rest of the picture greyed out by the mask.

    Args:
        tower: CLIP; None for OpenAI's ViT-L/14 as published.
    """

    def __init__(self, tower: Tower | None = None) -> None:
        super().__init__()
        self.tower = tower or OpenClipTower.load("ViT-L-14-quickgelu", "openai")
        self.requires_grad_(False)
        self.known: dict[str, Tensor] = {}

    def classifier(self, name: str) -> Tensor:
        """Return ``(10, D)``: each colour's mean text feature over three templates."""
        if name not in self.known:
            forms = ("a photo of a {c} {n}", "a photo of a {c}-colored {n}", "a photo of a {c} object")
            texts = [f.format(c=c, n=name) for c in COLOURS for f in forms]
            self.known[name] = nn.functional.normalize(
                self.tower.text(texts).unflatten(0, (-1, len(forms))).mean(1), dim=-1
            )
        return self.known[name]

    @torch.no_grad()
    def forward(self, picture: Tensor, objects: Sequence[Found], name: str) -> list[str]:
        """Return the colour of each object of ``picture`` ``(3, H, W)``."""
        crops = []
        for f in objects:
            x = picture if f.mask is None else torch.where(f.mask.to(picture.device), picture, 0.6)  # #999
            h, w = picture.shape[-2:]
            left, top = (max(0, min(round(v), n - 1)) for v, n in zip(f.box[:2], (w, h), strict=True))
            right, bottom = max(left + 1, round(f.box[2])), max(top + 1, round(f.box[3]))
            crops.append(self.tower.image(x[None, :, top:bottom, left:right]))
        scores = torch.cat(crops) @ self.classifier(name).T
        return [COLOURS[i] for i in scores.argmax(-1).tolist()]


class GenEval(Judge):
    """Count, colour and relation of objects.

    Args:
        detector: None for torchvision's Mask R-CNN.
        colour: names colours; None for :class:`ClipColour`, loaded when a rule first asks for a colour.
        mode: ``strict`` (published) or ``partial``.
        thresholds: of confidence, overlap and position.
    """

    card = Card(
        "geneval",
        "objects in the asked number, colour and place",
        licence="BSD-3 (torchvision), MIT (CLIP)",
        weights="torchvision maskrcnn_resnet50_fpn_v2 COCO_V1; open_clip ViT-L-14-quickgelu/openai",
        reference="arXiv:2310.11513",
    )

    def __init__(
        self,
        detector: Detector | None = None,
        colour: ColourNamer | None = None,
        mode: Literal["strict", "partial"] = "strict",
        thresholds: Thresholds | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("strict", "partial"):
            raise ValueError(f"mode must be strict or partial; got {mode!r}.")
        self.detector: Detector = detector or TorchvisionDetector()
        self.colour, self.mode, self.thresholds = colour, mode, thresholds or Thresholds()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Detect once and apply each sample's rules."""
        field(meta, "include", self.card.name, len(media))
        assert meta is not None
        for i, m in enumerate(meta):
            self._check(m, i)
        scores = []
        for picture, objects, rules in zip(media.detach(), self.detector(media), meta, strict=True):
            parts = self.parts(picture, self.kept(objects, rules.get("tag")), rules)
            scores.append(float(min(parts) >= 1) if self.mode == "strict" else sum(parts) / len(parts))
        return torch.tensor(scores, device=media.device)

    def kept(self, objects: Sequence[Found], tag: str | None) -> dict[str, list[Found]]:
        """Return the objects that count, by class, the most confident first."""
        t = self.thresholds
        floor = t.counting if tag == "counting" else t.confidence
        kept: dict[str, list[Found]] = {}
        by_class: dict[str, list[Found]] = {}
        for f in sorted(objects, key=lambda f: -f.score):
            if f.score > floor:
                by_class.setdefault(f.label, []).append(f)
        for label, group in by_class.items():
            chosen: list[Found] = []
            for f in group[: t.objects]:
                if t.overlap >= 1 or all(iou(f.box, g.box) < t.overlap for g in chosen):
                    chosen.append(f)
            kept[label] = chosen
        return kept

    def parts(self, picture: Tensor, objects: Mapping[str, list[Found]], rules: Rule) -> list[float]:
        """Return the fulfilment of each part of each rule, 1 where it holds."""
        parts: list[float] = []
        groups: list[list[Found] | None] = []
        for rule in rules["include"]:
            name, count = rule["class"], int(rule["count"])
            every = objects.get(name, [])
            enough = len(every) >= count if self.mode == "strict" else len(every) == count
            mine = [1.0 if enough else max(0.0, 1 - abs(count - len(every)) / count)]
            chosen = every[:count]
            if "color" in rule:
                mine.append(self._coloured(picture, chosen, name, rule["color"]) / count if enough else 0.0)
            if "position" in rule:
                relation, index = rule["position"]
                targets = groups[index]
                holds = (
                    min(mine) >= 1
                    and targets is not None
                    and all(relation in relations(a, b, self.thresholds.position) for a in chosen for b in targets)
                )
                mine.append(float(holds))
            groups.append(chosen if min(mine) >= 1 else None)
            parts += mine
        parts += [float(len(objects.get(r["class"], [])) < int(r["count"])) for r in rules.get("exclude", [])]
        return parts

    def _coloured(self, picture: Tensor, objects: Sequence[Found], name: str, colour: str) -> int:
        if self.colour is None:
            self.colour = ClipColour()
        return self.colour(picture, objects, name).count(colour)

    def _check(self, rules: Rule, i: int) -> None:
        """Refuse rules that could never hold: an unknown class would otherwise be a silent 0."""
        includes = rules["include"]
        for k, rule in enumerate([*includes, *rules.get("exclude", [])]):
            name = rule.get("class")
            if name not in self.detector.labels:
                near = difflib.get_close_matches(str(name), self.detector.labels, n=3)
                raise ValueError(
                    f"sample {i}: the detector knows no class {name!r}; nearest: {', '.join(near) or 'none'}."
                )
            if int(rule.get("count", 0)) < 1:
                raise ValueError(f"sample {i}: rule {rule} wants a count of at least 1.")
            if "color" in rule and rule["color"] not in COLOURS:
                raise ValueError(f"sample {i}: colour must be one of {', '.join(COLOURS)}; got {rule['color']!r}.")
            relation, index = rule.get("position", ("above", -1)) if k < len(includes) else ("above", -1)
            if relation not in ("left of", "right of", "above", "below") or ("position" in rule and not 0 <= index < k):
                raise ValueError(f"sample {i}: position must be [relation, index of an earlier rule]; got {rule}.")
        if not includes and not rules.get("exclude"):
            raise ValueError(f"sample {i}: no rules, so there is nothing to judge.")
