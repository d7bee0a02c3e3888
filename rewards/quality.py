"""Image quality: against a reference (torchmetrics), or without one (CLIP-IQA, total variation, a plug-in).

    FullReference("psnr" | "ssim" | "ms-ssim" | "vif" | "uqi" | "lpips")     meta[i]["reference"]: (3, H, W) in [0, 1]
    ClipIqa       softmax(100 cos(f(image), [good, bad]))[good], e.g. "Good photo." against "Bad photo."
    Smoothness    minus the mean total variation
    Plugin        any function of images; pyiqa("musiq") makes one of pyiqa, which is never a dependency

All are turned so that higher is better: LPIPS is negated. torchmetrics' objects accumulate state, so its functions
(and, for LPIPS, its network alone) are used. Its CLIP-IQA runs under inference mode and breaks with transformers 5,
and its ARNIQA unpickles whole objects, so the first is written here on a tower and the second is left out.

pyiqa is PolyForm-Noncommercial with S-Lab parts and unpickles weights without ``weights_only``: your decision.
References: torchmetrics; Wang et al., CLIP-IQA (2207.12396); Zhang et al., LPIPS (1801.03924).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, field
from flowalign.rewards.clip import TwoTower
from flowalign.rewards.towers import HFTower, Tower

__all__ = ["LPIPS", "PSNR", "SSIM", "ClipIqa", "FullReference", "Plugin", "Smoothness", "pyiqa"]

RANGES = {
    "psnr": (5.0, 50.0),
    "ssim": (-1.0, 1.0),
    "ms-ssim": (0.0, 1.0),
    "vif": (0.0, 1.0),
    "uqi": (-1.0, 1.0),
    "lpips": (-1.0, 0.0),
}
SMALLEST = {"psnr": 1, "ssim": 11, "ms-ssim": 176, "vif": 41, "uqi": 11, "lpips": 32}


class FullReference(Judge):
    """Closeness to ``meta[i]["reference"]``.

    Args:
        metric: see the module.
        net: LPIPS's backbone, ``alex``, ``vgg`` or ``squeeze``.
    """

    card = Card(
        "full-reference",
        "closeness to a reference picture (psnr, ssim, ms-ssim, vif, uqi, lpips)",
        differentiable=True,
        range=(-1.0, 50.0),
        licence="BSD-3 (torchvision code), BSD-2 (LPIPS's weights, not verified)",
        weights="torchvision alexnet, for lpips",
        reference="torchmetrics",
    )

    def __init__(self, metric: str = "psnr", net: str = "alex") -> None:
        super().__init__()
        if metric not in RANGES:
            raise ValueError(f"metric must be one of {', '.join(RANGES)}; got {metric!r}.")
        self.metric = metric
        if metric == "lpips":
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.net = LearnedPerceptualImagePatchSimilarity(net_type=net).net  # type: ignore[arg-type]
        self.card = replace(type(self).card, name=metric, range=RANGES[metric])
        self.freeze()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return each sample's metric."""
        rows = field(meta, "reference", self.card.name, len(media))
        for i, row in enumerate(rows):
            if tuple(row.shape) != tuple(media.shape[1:]):
                raise ValueError(f"sample {i}: wanted a reference of {tuple(media.shape[1:])}; got {tuple(row.shape)}.")
        if min(media.shape[-2:]) < SMALLEST[self.metric]:
            raise ValueError(f"{self.metric} wants at least {SMALLEST[self.metric]} pixels; got {tuple(media.shape)}.")
        x = media.to(torch.promote_types(media.dtype, torch.float32))
        return self._compute(x, torch.stack([r.to(x) for r in rows]))

    def _compute(self, x: Tensor, y: Tensor) -> Tensor:
        import torchmetrics.functional.image as M

        if self.metric == "psnr":
            # an exact copy is infinitely good: cap the error at a 16-bit step so that the score stays finite
            error = ((x - y) ** 2).flatten(1).mean(1).clamp_min(65535.0**-2)
            return -10 * error.log10()
        if self.metric == "ssim":
            return _per_sample(M.structural_similarity_index_measure(x, y, reduction="none", data_range=1.0), x)
        if self.metric == "vif":
            return _per_sample(M.visual_information_fidelity(x, y, reduction="none"), x)
        if self.metric == "uqi":
            maps = M.universal_image_quality_index(x, y, reduction="none")
            return maps.flatten(1).mean(1)
        if self.metric == "lpips":
            return -self.net(x, y, normalize=True).flatten(1).mean(1)
        one = M.multiscale_structural_similarity_index_measure
        return torch.stack([one(a[None], b[None], data_range=1.0) for a, b in zip(x, y, strict=True)])


def _per_sample(values: Any, x: Tensor) -> Tensor:
    """Return ``(B,)``: torchmetrics drops the batch dimension of one sample."""
    value = values[0] if isinstance(values, tuple) else values
    return value.reshape(len(x))


class PSNR(FullReference):
    """Peak signal-to-noise ratio in dB, at most 96 (an exact copy)."""

    card = replace(FullReference.card, name="psnr", summary="PSNR to a reference picture, dB", weights="-", licence="-")

    def __init__(self) -> None:
        super().__init__("psnr")


class SSIM(FullReference):
    """Structural similarity, Gaussian window of 11."""

    card = replace(FullReference.card, name="ssim", summary="SSIM to a reference picture", weights="-", licence="-")

    def __init__(self) -> None:
        super().__init__("ssim")


class LPIPS(FullReference):
    """Minus the learned perceptual distance.

    Args:
        net: ``alex``, ``vgg`` or ``squeeze``.
    """

    card = replace(FullReference.card, name="lpips", summary="minus LPIPS to a reference picture")

    def __init__(self, net: str = "alex") -> None:
        super().__init__("lpips", net)


class ClipIqa(TwoTower):
    """Probability of the positive of two opposite texts.

    Args:
        weights: a transformers CLIP, hub id or folder, or a ready tower.
        texts: the positive and the negative text.
    """

    card = Card(
        "clip-iqa",
        "probability of 'Good photo.' against 'Bad photo.', no reference",
        differentiable=True,
        licence="MIT",
        weights="openai/clip-vit-large-patch14",
        reference="arXiv:2207.12396",
    )

    def __init__(
        self,
        weights: str | Path | Tower = "openai/clip-vit-large-patch14",
        texts: tuple[str, str] = ("Good photo.", "Bad photo."),
    ) -> None:
        super().__init__(weights if isinstance(weights, Tower) else HFTower.load(weights))
        self.texts = texts

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the probability of the positive text."""
        logits = 100 * self.tower.image(media) @ self.tower.text(self.texts).T
        return logits.softmax(-1)[:, 0].to(media.device)


class Smoothness(Judge):
    """Minus the mean absolute difference of neighbouring pixels: a check against high-frequency reward hacking."""

    card = Card("smoothness", "minus the mean total variation", differentiable=True, range=(-1.0, 0.0))

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return minus the total variation over the number of values."""
        from torchmetrics.functional.image import total_variation

        x = media.to(torch.promote_types(media.dtype, torch.float32))
        return -total_variation(x, reduction="none") / x[0].numel()


class Plugin(Judge):
    """Any metric as a reward.

    Args:
        metric: ``(B, 3, H, W)`` in [0, 1] to ``B`` values in any shape.
        card: what it is; a non-commercial licence belongs there.
        lower_is_better: negate.
    """

    card = Card("plugin", "a metric of your own")

    def __init__(self, metric: Callable[[Tensor], Tensor], card: Card, *, lower_is_better: bool = False) -> None:
        super().__init__()
        self.metric, self.card, self.lower_is_better = metric, card, lower_is_better
        self.networks = nn.ModuleList([metric] if isinstance(metric, nn.Module) else [])
        self.freeze()

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the metric, turned so that higher is better."""
        values = self.metric(media).reshape(len(media)).to(media.device)
        return -values if self.lower_is_better else values


def pyiqa(name: str) -> Plugin:
    """Return a no-reference metric of pyiqa as a reward; you install pyiqa and accept its licence yourself.

    Raises:
        ImportError: pyiqa is not installed.
    """
    try:
        import pyiqa as library  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(
            "pyiqa is not installed, and flowalign never installs it: it is PolyForm-Noncommercial and unpickles its "
            "weights. If that suits you: pip install pyiqa."
        ) from error
    metric = library.create_metric(name, as_loss=True)
    card = Card(
        name,
        f"pyiqa's {name}",
        differentiable=True,
        range=(0.0, 1.0),
        licence="PolyForm-Noncommercial / S-Lab: not for commercial use",
        weights="pyiqa",
        reference="github.com/chaofengc/IQA-PyTorch",
    )
    return Plugin(metric, card, lower_is_better=bool(metric.lower_better))
