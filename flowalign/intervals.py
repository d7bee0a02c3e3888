"""Confidence intervals of means whose samples come in clusters: the images of one prompt are not independent.

    mean ± t_{G-1, .975} · s,    s² = G/(G-1) · Σ_g (Σ_{i∈g} (x_i − mean))² / N²        over G clusters, N samples

With one sample per cluster this is the classic interval. Of one cluster alone nothing is known: the half-width is NaN.
The quantile is the Cornish-Fisher expansion of Student's t, right to 1 % from 3 degrees of freedom on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["interval", "student"]

EXACT = {1: 12.706, 2: 4.303}
Z = 1.959964


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t; infinite for no degree of freedom."""
    if freedom < 1:
        return math.inf
    if freedom in EXACT:
        return EXACT[freedom]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


def interval(values: Tensor, cluster: Sequence[int] | Tensor | None = None) -> tuple[float, float]:
    """Return the mean of ``values (N,)`` and the half-width of its 95 % confidence interval.

    Args:
        values: one per sample; those that are NaN are left out.
        cluster: of each sample; every sample is its own when None.
    """
    which = torch.arange(len(values)) if cluster is None else torch.as_tensor(cluster)
    known = ~torch.isnan(values)
    x, g = values[known].double(), which[known].unique(return_inverse=True)[1]
    if not len(x):
        return math.nan, math.nan
    groups = int(g.max()) + 1
    mean = x.mean()
    if groups < 2:
        return float(mean), math.nan
    sums = torch.zeros(groups, dtype=torch.float64).index_add(0, g, x - mean)
    error = math.sqrt(groups / (groups - 1) * float((sums**2).sum())) / len(x)
    return float(mean), student(groups - 1) * error
