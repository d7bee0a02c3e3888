"""Resampling of weighted particles, every row its own system (Chopin & Papaspiliopoulos 2020, ch. 9).

Every scheme draws ``M`` ancestors with ``E[offspring of i] = M W_i``. Weights live in the log domain and in float64 on
the CPU; they are carried on, not thrown away, where the effective sample size

    ESS = (Σ w)² / Σ w²

is still above the threshold (the reference FK code drops them there and hardly steers), so that Ẑ is unbiased for any
threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.noise import NoiseSource
from flowalign.selection.base import Chosen, Selection, by_row

__all__ = ["SCHEMES", "Resample", "ess"]

BELOW_ONE = 1.0 - 2.0**-53


def ess(log_w: Tensor) -> Tensor:
    """Return the effective sample size of log-weights ``(..., N)``."""
    return (2 * log_w.logsumexp(-1) - (2 * log_w).logsumexp(-1)).exp()


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """Return the ancestors of sorted or unsorted uniforms ``(R, M)``; an item of weight 0 is never drawn."""
    cdf = weights.cumsum(1)
    cdf = cdf / cdf[:, -1:]  # the last positive item then ends at exactly 1, and u < 1
    # (M - 1 + u) / M rounds up to 1 for the largest u < 1, and would point behind the last positive item
    return torch.searchsorted(cdf, u.clamp_max(BELOW_ONE).contiguous(), right=True)


def multinomial(weights: Tensor, u: Tensor) -> Tensor:
    """Draw independent ancestors."""
    return _invert(weights, u)


def stratified(weights: Tensor, u: Tensor) -> Tensor:
    """Draw one ancestor in each of M equal strata."""
    m = u.shape[1]
    return _invert(weights, (torch.arange(m, dtype=u.dtype) + u) / m)


def systematic(weights: Tensor, u: Tensor) -> Tensor:
    """Draw one ancestor in each stratum with one shared uniform."""
    m = u.shape[1]
    return _invert(weights, (torch.arange(m, dtype=u.dtype) + u[:, :1]) / m)


def residual(weights: Tensor, u: Tensor) -> Tensor:
    """Copy each item ``⌊M W⌋`` times and draw the rest from what is left over."""
    m = u.shape[1]
    expected = m * weights
    sure = (expected + 1e-12).floor()  # M W = 2 must not become 1 through round-off
    ends = sure.cumsum(1)
    slots = torch.arange(m, dtype=u.dtype).expand(len(u), m).contiguous()
    copies = torch.searchsorted(ends, slots, right=True)
    left = (expected - sure).clamp_min(0)
    # a row without remainder draws nothing from it: give it something to divide by
    left = torch.where(left.sum(1, keepdim=True) > 0, left, weights)
    return torch.where(slots < ends[:, -1:], copies, _invert(left, u)).clamp_max(weights.shape[1] - 1)


def ssp(weights: Tensor, u: Tensor) -> Tensor:
    """Srinivasan sampling process: residual counts rounded pairwise (Gerber, Chopin & Whiteley 2019, Alg. 2)."""
    rows, n = weights.shape
    m = u.shape[1]
    expected = m * weights
    counts = (expected + 1e-12).floor()
    frac = (expected - counts).clamp(0, 1)
    counts, frac = counts.clone(), frac.clone()
    i = torch.zeros(rows, dtype=torch.long)  # the item whose fraction is still open in each row
    r = torch.arange(rows)
    for j in range(1, n):
        a, b = frac[r, i], frac[:, j]
        up, down = torch.minimum(b, 1 - a), torch.minimum(a, 1 - b)
        total = up + down
        # with probability down/(up+down) item i gains `up` (and j loses it), otherwise it loses `down`
        gain = u[:, j - 1] * torch.where(total > 0, total, 1.0) < down
        a2, b2 = torch.where(gain, a + up, a - down), torch.where(gain, b - up, b + down)
        frac[r, i], frac[:, j] = a2, b2
        full_i, full_j = a2 > 1 - 1e-9, b2 > 1 - 1e-9
        counts[r, i] += full_i.to(counts)
        frac[r, i] = torch.where(full_i, 0.0, frac[r, i])
        counts[:, j] += full_j.to(counts)
        frac[:, j] = torch.where(full_j, 0.0, frac[:, j])
        i = torch.where(frac[:, j] > 1e-9, j, i)
    short = (m - counts.sum(1)).long()
    counts[r, i] += short.clamp_min(0).to(counts)  # round-off may leave one unit open, and it belongs to the open item
    slots = torch.arange(m, dtype=u.dtype).expand(rows, m).contiguous()
    return torch.searchsorted(counts.cumsum(1), slots, right=True)


SCHEMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
    "ssp": ssp,
}


@dataclass(frozen=True)
class Resample(Selection):
    """Resample a row where its ESS falls below ``threshold * N``; elsewhere every particle goes on with its weight.

    Attributes:
        scheme: one of ``SCHEMES``.
        threshold: 0 never resamples, 1 at every level with unequal weights, .5 is usual; above 1 always.
        every: resample at levels divisible by this only.

    Raises:
        ValueError: for an unknown scheme or a negative threshold.
        FloatingPointError: where all particles of a row have weight zero.
    """

    scheme: str = "systematic"
    threshold: float = 0.5
    every: int = 1

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"unknown resampling scheme {self.scheme!r}; choose one of {', '.join(SCHEMES)}.")
        if self.threshold < 0 or self.every < 1:
            raise ValueError(f"need threshold >= 0 and every >= 1; got {self.threshold} and {self.every}.")

    def __call__(self, level: int, log_w: Tensor, row: Tensor, n_rows: int, noise: NoiseSource) -> Chosen | None:
        """Resample the rows that need it."""
        if level % self.every:
            return None
        nodes = by_row(row, n_rows)
        n = nodes.shape[1]
        lw = log_w.detach().double().cpu()[nodes]
        total = lw.logsumexp(1)
        dead = (~torch.isfinite(total)).nonzero().flatten().tolist()
        if dead:
            raise FloatingPointError(
                f"all {n} particles of prompt row {dead[0]} have weight zero at level {level} (or a weight is NaN or "
                "infinite): lower the reward scale, add particles, or start the potential later."
            )
        poor = ess(lw) < self.threshold * n
        if not poor.any():
            return None
        drawn = SCHEMES[self.scheme]((lw - total[:, None]).exp(), noise.uniform(level, n_rows, n))
        drawn = torch.where(poor[:, None], drawn, torch.arange(n))
        kept = torch.where(poor[:, None], 0.0, lw)
        gain = torch.where(poor, total - torch.tensor(float(n), dtype=torch.float64).log(), 0.0)
        # back from row-major order to the nodes' own order
        parents, weights = torch.empty_like(row), torch.empty(len(row), dtype=torch.float64)
        parents[nodes], weights[nodes] = nodes.gather(1, drawn), kept
        return Chosen(parents, weights.to(log_w), gain.to(log_w))
