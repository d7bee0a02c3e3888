"""Scores of sets of features: Vendi, Fréchet and maximum mean discrepancy, with finite gradients.

For n features ``z_i`` (and m features ``y_j`` of exemplars, with moments μ₀, Σ₀):

    Vendi    exp(-Σ λ_j log λ_j),  λ = eigenvalues of K/n,  K_ij = cos(z_i, z_j)         n for orthogonal, 1 for equal
    Fréchet  |μ-μ₀|² + tr(Σ + Σ₀ - 2 (Σ₀^½ Σ Σ₀^½)^½),  Σ ← (1-γ) Σ + γ tr(Σ)/d I
    MMD²     mean_{i≠j} k(z_i,z_j) + mean_{i≠j} k(y_i,y_j) - 2 mean_{ij} k(z_i,y_j)       unbiased; may be negative

Friedman & Dieng 2023 (arXiv 2210.02410); Heusel et al. 2017 (arXiv 1706.08500); Gretton et al. 2012 (JMLR 13);
Sejdinovic et al. 2013 (arXiv 1207.6076) for the kernel ``-|a-b|``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["frechet", "mmd2", "moments", "symmetric_root", "vendi"]


def vendi(z: Tensor, floor: float = 1e-12) -> Tensor:
    """Return the Vendi score of ``(n, d)`` features, a scalar in [1, n].

    Eigenvalues below ``floor`` count as zero: ``λ log λ`` has an infinite slope at 0, which duplicates would meet.
    """
    z = torch.nn.functional.normalize(z, dim=1)
    values = torch.linalg.eigvalsh(z @ z.T / len(z))
    values = values[values > floor]
    return torch.exp(-(values * values.log()).sum())


def moments(z: Tensor, shrinkage: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the mean ``(d,)`` and the covariance ``(d, d)`` of ``(n, d)`` features, shrunk towards a multiple of I.

    The covariance divides by n - 1. One sample has no covariance: it is zero there.
    """
    mean = z.mean(0)
    away = z - mean
    cov = away.T @ away / max(len(z) - 1, 1)
    d = z.shape[1]
    target = cov.diagonal().mean() * torch.eye(d, dtype=z.dtype, device=z.device)
    return mean, (1 - shrinkage) * cov + shrinkage * target


def symmetric_root(cov: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(mean: Tensor, cov: Tensor, mean0: Tensor, root0: Tensor) -> Tensor:
    """Return the squared Fréchet distance of two Gaussians; ``root0`` is the square root of the second covariance.

    ``tr (Σ₀^½ Σ Σ₀^½)^½`` comes from eigenvalues alone, whose gradient stays finite where some coincide.
    """
    product = torch.linalg.eigvalsh(root0 @ cov @ root0)
    positive = product > product.detach().amax().clamp(min=0) * 1e-12
    cross = torch.where(positive, torch.where(positive, product, 1.0).sqrt(), 0.0).sum()
    return (mean - mean0).square().sum() + cov.trace() + root0.square().sum() - 2 * cross


def mmd2(z: Tensor, y: Tensor, bandwidth: Tensor | float | None = None, *, unbiased: bool = True) -> Tensor:
    """Return the squared maximum mean discrepancy, a scalar.

    Args:
        z: ``(n, d)`` with n ≥ 2.
        y: ``(m, d)`` with m ≥ 2.
        bandwidth: h of the Gaussian kernel ``exp(-|a-b|²/(2 h²))``; None takes the kernel ``-|a-b|`` (the energy
            distance), which needs no bandwidth and still pulls on samples far from everything.
        unbiased: leave the pairs of a sample with itself out of the means (U-statistic); else keep them (V-statistic),
            which makes the estimate a squared distance between the two empirical laws, hence never negative.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        square = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)
        if bandwidth is not None:
            return torch.exp(-square / (2 * bandwidth**2))
        apart = square > 1e-14  # the slope of the root is infinite where two samples coincide
        return -torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        if not unbiased:
            return k.mean()
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return within(z) + within(y) - 2 * kernel(z, y).mean()
