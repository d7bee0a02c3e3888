"""Steadier targets: what a noised picture's caption could have shown besides, and its mean.

A denoiser regresses on the picture x0 that was drawn and learns E[x0 | x, caption]. Where noise is nearly all, that is
the caption's mean picture, and one drawn picture is a poor estimate of it. With x = a x0 + s ε, and x0 and more
pictures of its caption as candidates x_i,

    E[x0 | x] ≈ Σ_i w_i x_i,    w_i ∝ exp(-|x - a x_i|² / 2 s²)             (Xu, Tong & Jaakkola 2302.00670, eq. 5)

At the noisiest time this is their plain mean, at the cleanest the drawn picture itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.pipelines.worlds.scenes import Caption

__all__ = ["first_wordings", "posterior_mean"]

FIRST = {"below": "above", "right of": "left of"}


def posterior_mean(x: Tensor, a: Tensor, s: Tensor, candidates: Tensor) -> Tensor:
    """Return E[x0 | x] under a uniform prior on the candidates.

    Args:
        x: ``(B, D)``, a x0 + s ε.
        a: ``(B,)``, at least 0.
        s: ``(B,)``, above 0.
        candidates: ``(B, M, D)``.

    Returns:
        ``(B, D)``.
    """
    with torch.autocast(x.device.type, enabled=False):  # a velocity divides what bfloat16 rounds off by s
        squared = (x[:, None] - a[:, None, None] * candidates).square().sum(-1)
        weights = (-squared / (2 * s.square())[:, None]).softmax(-1)
        return torch.einsum("bm,bmd->bd", weights, candidates)


def first_wordings(known: tuple[Caption, ...]) -> Tensor:
    """Return for each caption the index of its wording by "above" or "left of", ``(C,)``; its own if there is none.

    Which object comes first and which word stands between them decide a picture *together*: neither tells anything by
    itself, and a network stays at chance for a long time. With two of the four words the first object's place alone
    tells, and the other two are learnt from there.
    """
    index = {str(c): i for i, c in enumerate(known)}

    def wording(c: Caption) -> str:
        return str(Caption(c.groups[::-1], FIRST[c.relation])) if c.relation in FIRST else str(c)

    return torch.tensor([index.get(wording(c), i) for i, c in enumerate(known)])
