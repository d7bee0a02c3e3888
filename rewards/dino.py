"""DINO: likeness to reference pictures.

    score = max or mean over references of cos(f(image), f(reference)),     f = DINOv2's class token

:mod:`flowalign.rewards.discriminator` puts a head on the same tokens.

Reference: Oquab et al., DINOv2 (2304.07193), Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, field
from flowalign.rewards.loading import folder_or_id
from flowalign.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

__all__ = ["Dino", "DinoSimilarity"]


class Dino(nn.Module):
    """DINOv2 (or any ViT of transformers whose first token is the class token), frozen.

    Args:
        weights: hub id or folder.
        size: side that pictures are squashed to; a multiple of the patch. 518 as published.
        dtype: of the network; tokens come back in float32 at least.
    """

    def __init__(self, weights: str | Path, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import AutoModel

        model: Any = AutoModel.from_pretrained(folder_or_id(weights), dtype=dtype, trust_remote_code=False)
        self.model = model.requires_grad_(False).eval()
        patch = int(model.config.patch_size)
        if size % patch:
            raise ValueError(f"size must be a multiple of the model's patch of {patch} pixels; got {size}.")
        self.preprocess = Preprocess(size, "squash", IMAGENET_MEAN, IMAGENET_STD)

    def forward(self, media: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        """Return unit tokens, the class token first."""
        weight = next(self.model.parameters())
        tokens = self.model(self.preprocess(media.to(weight.device)).to(weight.dtype)).last_hidden_state
        return F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)


class DinoSimilarity(Judge):
    """Cosine to references.

    Args:
        weights: hub id or folder.
        references: ``(R, 3, H, W)`` for all samples, or None for each sample's own ``meta[i]["reference"]``,
            ``(3, H, W)`` or ``(R, 3, H, W)`` in [0, 1], of any size.
        how: ``max`` or ``mean`` over references.
        size: see :class:`Dino`.
        dtype: of the network.
    """

    card = Card(
        "dino",
        "likeness to reference pictures",
        differentiable=True,
        range=(-1.0, 1.0),
        licence="Apache-2.0",
        weights="facebook/dinov2-base",
        reference="arXiv:2304.07193",
    )

    def __init__(
        self,
        weights: str | Path = "facebook/dinov2-base",
        references: Tensor | None = None,
        how: Literal["max", "mean"] = "max",
        *,
        size: int = 518,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if how not in ("max", "mean"):
            raise ValueError(f"how must be max or mean; got {how!r}.")
        self.dino, self.how = Dino(weights, size, dtype), how
        self.freeze()
        with torch.no_grad():
            self.references = None if references is None else self.dino(references)[:, 0]

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the largest or mean cosine."""
        mine = self.dino(media)[:, 0]
        if self.references is not None:
            return self._reduce(mine @ self.references.to(mine).T).to(media.device)
        scores = []
        for x, reference in zip(mine, field(meta, "reference", self.card.name, len(media)), strict=True):
            pictures = reference if reference.ndim == 4 else reference.unsqueeze(0)
            with torch.no_grad():
                theirs = self.dino(pictures.to(media))[:, 0]
            scores.append(self._reduce(theirs @ x))
        return torch.stack(scores).to(media.device)

    def _reduce(self, cosines: Tensor) -> Tensor:
        return cosines.amax(-1) if self.how == "max" else cosines.mean(-1)
