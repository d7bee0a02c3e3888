"""Frozen backbones for trained rewards: pictures (and prompts) to tokens of a few layers.

``VitBackbone`` taps layers of a vision transformer of transformers (DINOv2, CLIP's vision tower, SigLIP, ...);
``TowerBackbone`` gives CLIP's picture and text features and their product as three tokens, so a head can weigh how
well they fit. Both are differentiable to the picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.rewards.loading import folder_or_id
from flowalign.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from flowalign.rewards.towers import HFTower

__all__ = ["Backbone", "TowerBackbone", "VitBackbone", "make_backbone"]


class Backbone(nn.Module, ABC):
    """Pictures and prompts to ``layers`` tensors ``(B, N, width)``, float32.

    Attributes:
        width: D of the tokens.
        layers: how many tensors come.
    """

    width: int
    layers: int

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    @abstractmethod
    def forward(self, media: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> list[Tensor]:
        """Return the tokens."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return what :func:`make_backbone` builds it from."""


class TowerBackbone(Backbone):
    """CLIP's unit features: picture, text, and their product scaled to unit variance.

    Args:
        weights: hub id or folder of a transformers CLIP.
    """

    def __init__(self, weights: str | Path = "openai/clip-vit-large-patch14") -> None:
        super().__init__()
        self.weights = str(weights)
        self.tower = HFTower.load(weights).requires_grad_(False)
        self.width, self.layers = int(self.tower.model.config.projection_dim), 1

    def forward(self, media: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        """Return ``(B, 3, D)``, components of order one."""
        image, text = self.tower.image(media), self.tower.text(prompts)
        root = self.width**0.5
        return [torch.stack([image * root, text * root, image * text * self.width], 1)]

    def config(self) -> dict[str, Any]:
        """Return the kind and the weights' place."""
        return {"kind": "tower", "weights": self.weights}


class VitBackbone(Backbone):
    """A vision transformer, tapped after some of its layers.

    Args:
        weights: hub id or folder.
        taps: layers after which tokens are taken, 1 being the first; None for four evenly spaced.
        size: side that pictures are squashed to; None for the model's own.
        mean: per-channel mean of its preprocessing.
        std: per-channel scale.
    """

    def __init__(
        self,
        weights: str | Path = "facebook/dinov2-base",
        taps: Sequence[int] | None = None,
        size: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        from transformers import AutoModel

        model: Any = AutoModel.from_pretrained(folder_or_id(weights), trust_remote_code=False)
        self.model = model.requires_grad_(False).eval()
        depth = int(model.config.num_hidden_layers)
        chosen = tuple(taps) if taps is not None else tuple(sorted({max(1, depth * i // 4) for i in (1, 2, 3, 4)}))
        if not chosen or min(chosen) < 1 or max(chosen) > depth:
            raise ValueError(f"taps must be layers 1 to {depth}; got {chosen}.")
        self.weights, self.taps, self.width, self.layers = (
            str(weights),
            chosen,
            int(model.config.hidden_size),
            len(chosen),
        )
        self.preprocess = Preprocess(size or int(model.config.image_size), "squash", mean, std)

    def forward(self, media: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        """Return the tokens after each tapped layer; the prompt is not read."""
        out = self.model(self.preprocess(media.to(self.device)), output_hidden_states=True)
        return [out.hidden_states[i] for i in self.taps]

    def config(self) -> dict[str, Any]:
        """Return the kind, the weights' place, taps and preprocessing."""
        p = self.preprocess
        return {
            "kind": "vit",
            "weights": self.weights,
            "taps": list(self.taps),
            "size": p.size,
            "mean": list(p.mean),
            "std": list(p.std),
        }


def make_backbone(config: dict[str, Any]) -> Backbone:
    """Build a backbone from its saved configuration.

    Raises:
        ValueError: an unknown kind.
    """
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "kind"}
    if config.get("kind") == "tower":
        return TowerBackbone(**options)
    if config.get("kind") == "vit":
        return VitBackbone(**options)
    raise ValueError(f"backbone kind must be tower or vit; got {config.get('kind')!r}.")
