"""LAION aesthetic predictor v2: an affine map of the unit CLIP feature, about 1 to 10.

    score = W5(W4(W3(W2(W1 f + b1) + b2) + b3) + b4) + b5,     f = E_image / |E_image|,  CLIP ViT-L/14 of OpenAI

The published network has no activation between its layers, so it *is* one affine map (a test holds this), and
dropout, which it does have, must be off. No prompt is read.

Reference: improved-aesthetic-predictor (Schuhmann, 2022); weights Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge
from flowalign.rewards.loading import fill, find, read
from flowalign.rewards.towers import HFTower

__all__ = ["Aesthetic", "affine_mlp"]


def affine_mlp(dim: int) -> nn.Sequential:
    """Return the published head, ``dim → 1024 → 128 → 64 → 16 → 1``; also ImageReward's."""
    return nn.Sequential(
        nn.Linear(dim, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


class Aesthetic(Judge):
    """LAION aesthetic score.

    Args:
        weights: the head: a file, or hub id ``owner/name:file``. Keys ``layers.{0,2,4,6,7}.{weight,bias}``.
        clip: CLIP ViT-L/14 of transformers, hub id or folder.
        dtype: of CLIP; the head is float32 in any case.
    """

    card = Card(
        "aesthetic",
        "how pleasing a picture is, no prompt",
        differentiable=True,
        range=(1.0, 10.0),
        licence="Apache-2.0 (the head's origin; the mirror names none)",
        weights="trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
        reference="github.com/christophschuhmann/improved-aesthetic-predictor",
    )

    def __init__(
        self,
        weights: str | Path = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
        clip: str | Path = "openai/clip-vit-large-patch14",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.tower = HFTower.load(clip, dtype=dtype)
        path = find(weights, "aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth")
        self.layers = affine_mlp(int(self.tower.model.config.projection_dim))
        fill(self.layers, {k.removeprefix("layers."): v.float() for k, v in read(path).items()}, path)
        self.freeze()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the affine map of the unit feature."""
        features = self.tower.image(media)
        return self.layers(features).squeeze(-1).to(media.device)
