"""A small CLIP of the shapes world: a differentiable reward that can be hacked, as learned rewards can.

Pictures and captions are embedded on one sphere; the score is their cosine. It was trained on drawn scenes with their
captions by the symmetric contrastive loss (Radford et al. 2103.00020), where captions that say the same count as one:

    L = -½ mean_i [ log Σ_{j ∈ P(i)} e^{s_ij / τ} - log Σ_j e^{s_ij / τ} ] - ½ (the same over columns)

It has seen drawings only, so a generator pushed along its gradient finds pictures that score high and are wrong: train
on this one, report :class:`~flowalign.rewards.shapes.ShapesJudge`. The network is ``open_clip``'s ``CLIP`` with a
vocabulary of the captions' own words; weights and configuration are shipped in ``weights/shapes_clip``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, unique
from flowalign.rewards.objects import HUES, SHAPES

__all__ = ["WEIGHTS", "ShapesClip", "build", "fit_clip", "tokens"]

WEIGHTS = Path(__file__).parent / "weights" / "shapes_clip"
EDGE = 32
LENGTH = 10
WORDS = (
    "a", "one", "two", "three", "four", "above", "below", "left", "right", "of", "and", *HUES, *SHAPES,
    *(f"{s}s" for s in SHAPES),
)  # fmt: skip
CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": EDGE, "patch_size": 4, "width": 96, "layers": 3, "head_width": 32},
    "text_cfg": {"context_length": LENGTH, "vocab_size": len(WORDS) + 2, "width": 64, "heads": 2, "layers": 2},
}


def tokens(prompts: Sequence[str]) -> Tensor:
    """Return ``(P, LENGTH)`` ids: 0 pads, one id per word, the largest ends (open_clip reads the text there).

    Raises:
        ValueError: for a word that the model has never seen, or too many of them.
    """
    index = {w: i + 1 for i, w in enumerate(WORDS)}
    out = torch.zeros(len(prompts), LENGTH, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        words = prompt.lower().strip(" .").split()
        unknown = [w for w in words if w not in index]
        if unknown or len(words) >= LENGTH:
            what = f"the word {unknown[0]!r}" if unknown else f"{len(words)} words"
            raise ValueError(
                f"{prompt!r} has {what}; shapes-clip reads captions of at most {LENGTH - 1} of the words "
                f"{', '.join(WORDS)}."
            )
        ids = [index[w] for w in words] + [len(WORDS) + 1]
        out[i, : len(ids)] = torch.tensor(ids)
    return out


def build() -> nn.Module:
    """Return the untrained open_clip model."""
    from open_clip.model import CLIP

    model: nn.Module = CLIP(**CONFIG)
    return model


@final
class ShapesClip(Judge):
    """Cosine of picture and caption under the small CLIP.

    Args:
        folder: of ``model.safetensors``; the shipped one by default.
        device: where to run.
    """

    card = Card(
        name="shapes-clip",
        summary="cosine of picture and caption under a small CLIP of the shapes world: differentiable, hackable",
        differentiable=True,
        range=(-0.2, 1.0),
        licence="Apache-2.0",
        weights="rewards/weights/shapes_clip",
        text=LENGTH,
        reference="this project; after CLIP, Radford et al. 2021, arXiv:2103.00020",
    )

    def __init__(self, folder: Path = WEIGHTS, device: torch.device | str | None = None) -> None:
        super().__init__()
        from safetensors.torch import load_file

        self.model: Any = build()
        self.model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        self.freeze(device)

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return cosines; gradients reach ``media``."""
        texts, index = unique(prompts)
        device = self.model.logit_scale.device
        words = self.model.encode_text(tokens(texts).to(device), normalize=True)[index]
        images = media.to(device).float()
        if images.shape[-2:] != (EDGE, EDGE):
            images = F.interpolate(images, (EDGE, EDGE), mode="bilinear", antialias=True, align_corners=False)
        seen = self.model.encode_image(2 * images - 1, normalize=True)
        return (seen * words).sum(-1).to(media.device)


def fit_clip(
    batches: Callable[[torch.Generator], tuple[Tensor, list[str]]],
    steps: int = 2000,
    *,
    lr: float = 1e-3,
    seed: int = 0,
) -> Iterator[tuple[int, float, nn.Module]]:
    """Train the model, yielding ``(step, loss, model)`` every 50 steps and at the end.

    Args:
        batches: from a generator, pictures ``(B, 3, 32, 32)`` and their captions.
        steps: optimiser steps.
        lr: peak learning rate, cosine decay after 100 steps of warm-up.
        seed: of weights, batches and noise.
    """
    torch.manual_seed(seed)
    model: Any = build().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(steps):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        images, captions = batches(g)
        # a little noise, so that the decoder's texture does not decide
        images = images + 0.05 * torch.rand(len(images), 1, 1, 1, generator=g) * torch.randn(images.shape, generator=g)
        ids = tokens(captions)
        same = (ids[:, None] == ids[None]).all(-1)
        scores = model.logit_scale.exp() * (
            model.encode_image(2 * images - 1, normalize=True) @ model.encode_text(ids, normalize=True).T
        )
        hits = scores.masked_fill(~same, -torch.inf)
        loss = (scores.logsumexp(1) - hits.logsumexp(1) + scores.logsumexp(0) - hits.logsumexp(0)).mean() / 2
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if (step + 1) % 50 == 0 or step + 1 == steps:
            yield step + 1, float(loss.detach()), model


def save_clip(model: nn.Module, folder: Path, record: dict[str, Any]) -> None:
    """Write weights in half precision, the configuration and a record of the training."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": CONFIG, "words": WORDS, **record}, indent=1) + "\n")
