"""DINO: likeness to reference pictures, and the adversarial reward of Adv-GRPO.

    DinoSimilarity      max or mean over references of cos(f(image), f(reference)),  f = DINOv2's class token
    Discriminator       .7 · h(class token) + .3 · mean_j h(patch_j),  h a small head, trained against the generator by
                        ½ [relu(1 − h(real)) + relu(1 + h(fake))] on class tokens, plus .3 times the same on patches

Tokens are normalised in training and in scoring alike (the published code does so only when scoring). The head is
the only part that learns: :meth:`Discriminator.loss` is its objective, and scores carry no gradient to it.

References: Oquab et al., DINOv2 (2304.07193), Apache-2.0; Adv-GRPO (2511.20256).
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

__all__ = ["DinoSimilarity", "Discriminator"]


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


class Discriminator(Judge):
    """Adv-GRPO's discriminator: a reward that is retrained against the generator's own samples.

    Args:
        weights: hub id or folder of the frozen backbone.
        hidden: width of the head.
        class_weight: share of the class token in the score; the patches have the rest.
        patch_weight: weight of the patches' hinge loss.
        patches: how many patches per picture the loss looks at, drawn anew each time; None for all.
        size: see :class:`Dino`.
        dtype: of the backbone; the head is float32.
    """

    card = Card(
        "dino-adversarial",
        "how real a picture looks to a head trained against the generator",
        differentiable=True,
        range=(-3.0, 3.0),
        licence="Apache-2.0",
        weights="facebook/dinov2-base",
        reference="arXiv:2511.20256",
    )

    def __init__(
        self,
        weights: str | Path = "facebook/dinov2-base",
        *,
        hidden: int = 512,
        class_weight: float = 0.7,
        patch_weight: float = 0.3,
        patches: int | None = 64,
        size: int = 518,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dino = Dino(weights, size, dtype)
        self.freeze()
        width = int(self.dino.model.config.hidden_size)
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.class_weight, self.patch_weight, self.patches = class_weight, patch_weight, patches

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the mixed logit; gradients reach the media, never the head."""
        frozen = {k: v.detach() for k, v in self.head.named_parameters()}
        logits = torch.func.functional_call(self.head, frozen, (self.dino(media),)).squeeze(-1)
        mixed = self.class_weight * logits[:, 0] + (1 - self.class_weight) * logits[:, 1:].mean(1)
        return mixed.to(media.device)

    def loss(self, real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the hinge loss of the head on real ``(N, 3, H, W)`` and generated ``(M, 3, H, W)`` pictures."""
        total: Tensor = torch.zeros((), device=real.device)
        for media, sign in ((real, 1.0), (fake, -1.0)):
            with torch.no_grad():
                tokens = self.dino(media.detach())
            keep = tokens[:, 1:]
            if self.patches is not None and self.patches < keep.shape[1]:
                index = torch.rand(keep.shape[:2], generator=generator).argsort(1)[:, : self.patches].to(keep.device)
                keep = keep.gather(1, index.unsqueeze(-1).expand(-1, -1, keep.shape[-1]))
            hinge = F.relu(1 - sign * self.head(tokens[:, 0])).mean()
            total = total + 0.5 * (hinge + self.patch_weight * F.relu(1 - sign * self.head(keep)).mean()).to(total)
        return total
