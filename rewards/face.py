"""Face identity: is it still the same person, in a picture or over a video.

    score = mean over frames with a face of pool_k cos(f(align(frame)), identity_k),      pool = max or mean

The identity is a *pool* of features at several angles (IPRO), so that a turned head is compared with a turned head.
Frames without a face are left out of the mean, not counted as 0; a sample without any face cannot be judged. IPRO's
users standardise with mean .54 and std .16: ``algebra.Standardise(FaceIdentity(...), .54, .16)``.

Landmarks come from ``meta[i]["landmarks"]`` (``(5, 2)`` or ``(F, 5, 2)`` pixels x, y; NaN for no face) or from a
callable, since no face detector has weights that may be shipped. Alignment holds them fixed: gradients reach pixels.

Reference: IPRO (2510.14255); Deng et al., ArcFace (1801.07698).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flowalign.protocols import Card, Meta
from flowalign.rewards.arcface import IResNet, align
from flowalign.rewards.base import Judge, field
from flowalign.rewards.preprocess import resize

__all__ = ["FaceIdentity"]

Landmarks = Callable[[Tensor], Tensor]


class FaceIdentity(Judge):
    """Cosine to a pool of a person's face features.

    Args:
        weights: an ArcFace checkpoint (see :class:`IResNet`), or a network ``(N, 3, 112, 112) → (N, D)`` of unit
            features.
        pool: ``(K, D)`` unit features of the person (:meth:`enrol`), or None for each sample's ``meta[i]["identity"]``.
        how: ``max`` or ``mean`` over the pool.
        landmarks: ``(N, 3, H, W) → (N, 5, 2)``, NaN for no face; None to read them from meta.
        aligned: media already are aligned faces and only scaled to 112 pixels.
    """

    card = Card(
        "face",
        "same person as in the pool of faces",
        modality=("image", "video"),
        differentiable=True,
        range=(-1.0, 1.0),
        licence="of the weights you bring (insightface's: non-commercial)",
        weights="yours: iresnet backbone.pth",
        reference="arXiv:2510.14255",
    )

    def __init__(
        self,
        weights: str | Path | nn.Module | None = None,
        pool: Float[Tensor, "k d"] | None = None,
        how: Literal["max", "mean"] = "max",
        *,
        landmarks: Landmarks | None = None,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        if how not in ("max", "mean"):
            raise ValueError(f"how must be max or mean; got {how!r}.")
        if weights is None:
            raise ValueError(
                "the face reward needs an ArcFace checkpoint of yours (published ones: non-commercial research), "
                "face@/path/backbone.pth, or FaceIdentity(weights)."
            )
        self.network = weights if isinstance(weights, nn.Module) else IResNet(weights)
        self.pool, self.how, self.landmarks, self.aligned = pool, how, landmarks, aligned
        self.freeze()

    def features(
        self, frames: Float[Tensor, "n 3 h w"], points: Float[Tensor, "n 5 2"] | None = None
    ) -> tuple[Float[Tensor, "n d"], Tensor]:
        """Return unit features, zero where there is no face, and the mask ``(N,)`` of frames with one."""
        if self.aligned:
            return self.network(resize(frames, (112, 112))), torch.ones(len(frames), dtype=torch.bool)
        if points is None:
            if self.landmarks is None:
                raise ValueError("pass landmarks, give FaceIdentity a landmarks callable, or say aligned=True.")
            with torch.no_grad():
                points = self.landmarks(frames)
        seen = torch.isfinite(points).flatten(1).all(1)
        found = self.network(align(frames[seen], points[seen].to(frames.device))) if seen.any() else None
        width = 1 if found is None else found.shape[1]
        out = frames.new_zeros(len(frames), width, dtype=torch.promote_types(frames.dtype, torch.float32))
        return (out if found is None else out.index_put((seen.nonzero().flatten().to(out.device),), found)), seen

    @torch.no_grad()
    def enrol(self, pictures: Float[Tensor, "k 3 h w"], points: Float[Tensor, "k 5 2"] | None = None) -> Tensor:
        """Return the pool ``(K', D)`` of the pictures in which a face is seen."""
        features, seen = self.features(pictures, points)
        if not seen.any():
            raise ValueError(f"no face in any of the {len(pictures)} pictures of the person.")
        return features[seen.to(features.device)]

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the mean over frames with a face.

        Raises:
            Unjudged: samples without a face in any frame.
        """
        video = media.unsqueeze(1) if media.ndim == 4 else media
        count, frames = video.shape[:2]
        points = None
        if not self.aligned and self.landmarks is None:
            rows = field(meta, "landmarks", self.card.name, count)
            points = torch.stack([torch.as_tensor(r, dtype=torch.float64).reshape(-1, 5, 2) for r in rows]).flatten(
                0, 1
            )
            if len(points) != count * frames:
                raise ValueError(f"wanted landmarks of {frames} frames per sample; got {len(points) // count}.")
        features, seen = self.features(video.flatten(0, 1), points)
        pools = [self.pool] * count if self.pool is not None else field(meta, "identity", self.card.name, count)
        scores, reasons = [], {}
        for i, pool in enumerate(pools):
            rows_seen = seen.view(count, frames)[i].to(features.device)
            if not rows_seen.any():
                reasons[i] = "no face is seen in any frame"
                scores.append(features.new_full((), torch.nan))
                continue
            cosines = features.unflatten(0, (count, frames))[i][rows_seen] @ pool.to(features).T
            scores.append((cosines.amax(1) if self.how == "max" else cosines.mean(1)).mean())
        result = torch.stack(scores)
        self.unjudged(result.detach(), reasons)
        return result
