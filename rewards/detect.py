"""Object detectors behind one small interface: pictures in, labelled boxes (and masks) out.

A detector is any callable ``(B, 3, H, W) in [0, 1] → list of B lists of Found`` with an attribute ``labels``. Two are
here: torchvision's (Mask R-CNN and its kin, COCO's 80 classes) and transformers' (DETR, RT-DETR, YOLOS, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowalign.rewards.loading import fill, find, folder_or_id, read
from flowalign.rewards.preprocess import to_bytes

__all__ = ["Detector", "Found", "TorchvisionDetector", "TransformersDetector", "iou"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Found:
    """One object.

    Attributes:
        label: its class.
        score: the detector's confidence in [0, 1].
        box: left, top, right, bottom in pixels.
        mask: ``(H, W)`` bool, or None from a detector of boxes.
    """

    label: str
    score: float
    box: Box
    mask: Tensor | None = None

    @property
    def centre(self) -> tuple[float, float]:
        """Return ``(x, y)`` of the box's centre."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def size(self) -> tuple[float, float]:
        """Return ``(width, height)`` of the box."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]


class Detector(Protocol):
    """What judges of objects need."""

    @property
    def labels(self) -> Sequence[str]:
        """The classes it knows."""
        ...

    def __call__(self, media: Tensor) -> list[list[Found]]:
        """Return each picture's objects, the most confident first."""
        ...


def iou(a: Box, b: Box) -> float:
    """Return intersection over union of two boxes; 0 where both are empty."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


class TorchvisionDetector(nn.Module):
    """A detection or instance segmentation model of torchvision.

    Args:
        name: torchvision's name of the model.
        weights: a state dict (file or hub id), or None for torchvision's own default weights (BSD-3, trained on COCO).
        labels: class names by index, 0 being background; None for those of the default weights.
    """

    def __init__(
        self,
        name: str = "maskrcnn_resnet50_fpn_v2",
        weights: str | Path | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        from torchvision.models import get_model, get_model_weights

        default = list(get_model_weights(name))[-1]
        self.labels = tuple(labels or default.meta["categories"])
        self.model = get_model(name, weights=None, weights_backbone=None, num_classes=len(self.labels))
        if weights is None:
            self.model.load_state_dict(_download(name, default))
        else:
            path = find(weights, f"{name}.safetensors", f"{name}.pth")
            fill(self.model, read(path), path)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TorchvisionDetector:
        """Stay in eval mode: in training mode torchvision's detectors want targets and return losses."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, media: Tensor) -> list[list[Found]]:
        """Detect; masks where the model has them."""
        device = next(self.parameters()).device
        found = []
        for out in self.model(list(media.float().clamp(0, 1).to(device))):
            masks = out["masks"][:, 0] > 0.5 if "masks" in out else [None] * len(out["boxes"])
            rows = zip(out["labels"].tolist(), out["scores"].tolist(), out["boxes"].tolist(), masks, strict=True)
            objects = [Found(self.labels[i], s, (b[0], b[1], b[2], b[3]), m) for i, s, b, m in rows]
            found.append(sorted(objects, key=lambda f: -f.score))
        return found


def _download(name: str, weights: Any) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:  # urllib's errors are OSErrors
        raise ValueError(
            f"torchvision's weights of {name} are not in its cache and cannot be fetched ({error}). Download "
            f"{weights.url} where there is a network and pass its path: TorchvisionDetector(weights=...)."
        ) from error


class TransformersDetector(nn.Module):
    """A detector of boxes of transformers (``AutoModelForObjectDetection``).

    Args:
        weights: hub id or folder.
        floor: objects of less confidence are not returned at all.
    """

    def __init__(self, weights: str | Path = "facebook/detr-resnet-50", floor: float = 0.05) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        source = folder_or_id(weights)
        self.model = AutoModelForObjectDetection.from_pretrained(source, trust_remote_code=False)
        self.processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        names = self.model.config.id2label
        self.labels = tuple(names[i] for i in sorted(names))
        self.floor = floor
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, media: Tensor) -> list[list[Found]]:
        """Detect boxes."""
        device = next(self.parameters()).device
        inputs = self.processor(images=list(to_bytes(media).cpu()), return_tensors="pt").to(device)
        sizes = [tuple(media.shape[-2:])] * len(media)
        results = self.processor.post_process_object_detection(
            self.model(**inputs), threshold=self.floor, target_sizes=sizes
        )
        found = []
        for out in results:
            rows = zip(out["labels"].tolist(), out["scores"].tolist(), out["boxes"].tolist(), strict=True)
            objects = [Found(self.model.config.id2label[i], s, (b[0], b[1], b[2], b[3])) for i, s, b in rows]
            found.append(sorted(objects, key=lambda f: -f.score))
        return found
