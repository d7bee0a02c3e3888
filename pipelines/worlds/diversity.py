"""How many different pictures a model makes of one prompt: layouts and features.

Alignment can raise accuracy by making one good picture over and over. Two measures see it:

    layouts   exp(-Σ_l p_l log p_l),  l the set of occupied cells of the 3×3 grid, among *correct* pictures
    Vendi     exp(-Σ_i λ_i log λ_i),  λ the eigenvalues of K / n, K_ij = <f_i, f_j> / (|f_i| |f_j|)
              (Friedman & Dieng 2210.02410)

Both are effective numbers: n equally frequent layouts count n. Pixel spread is known to miss the collapse. The plug-in
entropy is biased low by about (layouts - 1) / 2n, so compare only figures from equal numbers of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.pipelines.worlds.scenes import GRID, SIZE

__all__ = ["cells", "effective", "layouts", "vendi"]


def cells(centre: Tensor, row: Tensor, count: int) -> Tensor:
    """Return which cells are occupied.

    Args:
        centre: ``(M, 2)`` pixels of all objects, x to the right and y down.
        row: ``(M,)`` picture of each object.
        count: number of pictures B.

    Returns:
        ``(B,)`` integers whose bit k says that cell k, row by row, holds an object's centre.
    """
    cell = (centre / (SIZE / GRID)).long().clamp(0, GRID - 1)
    taken = torch.zeros(count, GRID * GRID, dtype=torch.long, device=centre.device)
    taken[row, cell[:, 1] * GRID + cell[:, 0]] = 1
    return (taken << torch.arange(GRID * GRID, device=centre.device)).sum(1)


def effective(labels: Tensor) -> float:
    """Return the exponential of the entropy of ``(n,)`` labels; 0 for none."""
    if len(labels) == 0:
        return 0.0
    p = labels.unique(return_counts=True)[1].double() / len(labels)
    return float(torch.exp(-(p * p.log()).sum()))


def layouts(codes: Tensor, correct: Tensor, groups: Sequence[str]) -> dict[str, float]:
    """Return the effective number of layouts among correct pictures, by group.

    Args:
        codes: ``(B,)`` of :func:`cells`.
        correct: ``(B,)`` booleans, the strict verdict.
        groups: the category (or number of objects, or prompt) of each picture.
    """
    return {
        name: effective(codes[torch.tensor([g == name for g in groups], device=codes.device) & correct])
        for name in dict.fromkeys(groups)
    }


def vendi(features: Tensor) -> float:
    """Return the Vendi score of ``(n, d)`` features, between 1 and n."""
    f = torch.nn.functional.normalize(features.double(), dim=-1)
    # the small one of K = F Fᵀ and FᵀF: both have the same eigenvalues that are not 0
    k = f.T @ f if f.shape[1] < f.shape[0] else f @ f.T
    values = torch.linalg.eigvalsh(k / len(f)).clamp_min(1e-12)
    return float(torch.exp(-(values * values.log()).sum()))
