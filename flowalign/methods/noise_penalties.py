"""What keeps an optimised noise a normal noise.

norm          |z|²/2 - (d - 1) log|z|, the negative log-density of the radius of a d-dimensional normal (ReNO)
probability   how likely the sample mean and covariance of a normal noise are at least as far off as those of z, cut
into m pieces of k coordinates in random orders, by concentration bounds (DNO, Tang et al. 2405.18881):

log p_1 = log 2 - m M_1² / 2k,   log p_2 = log 2 - m max(√(1 + M_2) - 1 - √(k/m), 0)² / 2
M_1 = |mean|,   M_2 = |second moment - I| (spectral),   penalty = -min(log p_1, 0) - min(log p_2, 0)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowalign.gaussian import work_dtype

__all__ = ["norm_penalty", "probability_penalty"]


def norm_penalty(z: Tensor) -> Tensor:
    """Return ``|z|²/2 - (d - 1) log|z|`` of each sample of ``z (B, *)``, in float32 or better."""
    flat = z.flatten(1).to(work_dtype(z))
    radius = flat.norm(dim=1)
    return radius**2 / 2 - (flat.shape[1] - 1) * radius.log()


def probability_penalty(z: Tensor, k: int, orders: Tensor) -> Tensor:
    """Return how much less likely than certain the moments of each sample are, mean over orders, ``(B,)``.

    Args:
        z: ``(B, *)``; coordinates beyond a multiple of k are left out.
        k: coordinates per piece.
        orders: permutations of the coordinates, ``(S, d)``.
    """
    flat = z.flatten(1).to(work_dtype(z))
    m = flat.shape[1] // k
    pieces = flat[:, orders[:, : m * k]].unflatten(2, (m, k))  # (B, S, m, k)
    gap = pieces.mean(2).norm(dim=2)
    moment = pieces.transpose(2, 3) @ pieces / m - torch.eye(k, dtype=flat.dtype, device=flat.device)
    spread = torch.linalg.eigvalsh(moment).abs().amax(2)
    first = math.log(2) - m * gap**2 / (2 * k)
    second = math.log(2) - m * ((1 + spread).sqrt() - 1 - math.sqrt(k / m)).clamp_min(0) ** 2 / 2
    return -(first.clamp_max(0) + second.clamp_max(0)).mean(1)
