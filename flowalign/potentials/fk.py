"""The four potentials of Feynman-Kac steering (Singhal et al. 2501.06848), with r_k the value at level k.

Difference   log G = λ (r_k - r_{k-1}), r before the first = 0     telescopes: favours lineages that improve
Maximum      log G = λ max_{j≤k} r_j                               favours lineages that were once promising
Sum          log G = λ Σ_{j≤k} r_j                                 favours lineages that are always promising
Immediate    log G = λ r_k
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.potentials.base import Potential

__all__ = ["Difference", "Immediate", "Maximum", "Sum"]


@dataclass(frozen=True)
class Difference(Potential):
    """``λ (r_k - r_{k-1})``: what the weights say at any level is the value there."""

    def gain(
        self, t: float, value: Tensor, own: Any, total: Tensor, log_w: Tensor, row: Tensor, n_rows: int
    ) -> tuple[Tensor, Any]:
        """Return what is missing between the product so far and ``exp(λ r_k)``."""
        return self.scale * value - total, None


@dataclass(frozen=True)
class Maximum(Potential):
    """``λ max_{j≤k} r_j``."""

    def gain(
        self, t: float, value: Tensor, own: Any, total: Tensor, log_w: Tensor, row: Tensor, n_rows: int
    ) -> tuple[Tensor, Any]:
        """Return λ times the running maximum."""
        best = value if own is None else torch.maximum(own, value)
        return self.scale * best, best


@dataclass(frozen=True)
class Sum(Potential):
    """``λ Σ_{j≤k} r_j``."""

    def gain(
        self, t: float, value: Tensor, own: Any, total: Tensor, log_w: Tensor, row: Tensor, n_rows: int
    ) -> tuple[Tensor, Any]:
        """Return λ times the running sum."""
        running = value if own is None else own + value
        return self.scale * running, running


@dataclass(frozen=True)
class Immediate(Potential):
    """``λ r_k``."""

    def gain(
        self, t: float, value: Tensor, own: Any, total: Tensor, log_w: Tensor, row: Tensor, n_rows: int
    ) -> tuple[Tensor, Any]:
        """Return λ times the value."""
        return self.scale * value, None
