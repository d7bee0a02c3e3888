"""Adjoint Matching: the tilt ``p_base exp(λ r)`` by regression on the lean adjoint (Domingo-Enrich et al. 2409.08861).

    memoryless sampling, a_K = -λ ∇r(x_K), a_k = J_kᵀ a_{k+1} under the base, then  ‖(m_θ - m_ref)/std + std a_{k+1}‖²

Every public implementation pairs step k with ``a_k``; the optimum pairs it with the adjoint *after* the step (see
``flowalign.adjoint``). Keeps diversity where reward backpropagation collapses. Guidance stays out of the adjoint: it
blows up there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.adjoint import LeanAdjoint
from flowalign.experience import Experience
from flowalign.kernels import EulerMaruyama
from flowalign.laws import Memoryless
from flowalign.methods.base import Preset, Training
from flowalign.noise import mix
from flowalign.objectives.matching import AdjointMatching as Loss
from flowalign.options import FitOptions
from flowalign.recipe import Recipe
from flowalign.thinning import Thin
from flowalign.trajectory import Transitions

__all__ = ["AdjointMatching", "late_and_random"]


def late_and_random(late: int, early: int, steps: int) -> Thin:
    """Keep the last ``late`` steps and ``early`` random others, one draw per iteration (published: 10 + 10 of 40)."""

    def thin(batch: Transitions, e: Experience) -> Transitions:
        g = torch.Generator().manual_seed(mix(e.seed, e.iteration, 410))
        rest = max(steps - late, 0)
        kept = set(range(rest, steps)) | set(torch.randperm(rest, generator=g)[:early].tolist() if rest else [])
        index = torch.tensor([i for i, k in enumerate(batch.level.tolist()) if k in kept], dtype=torch.long)
        return batch[index]

    return thin


@dataclass(frozen=True)
class AdjointMatching(Training):
    """Adjoint Matching.

    Attributes:
        scale: λ, the reward's multiplier: inverse temperature of the tilt.
        late: last steps that are always regressed on; 0 for all steps.
        early: random ones of the others.
        truncate: carry the adjoint back over so many last steps only; none for all.
        solver: exact (one vector-Jacobian product of the network a step) or linear (closed form for Gaussian data; no
            network call, right where the velocity is linear).
        spread: std of the data for the linear solver; that of the samples when none.
        noiseless: take the reward's gradient at the mean of the last step (published; here the last step hardly adds
            noise).
        clip: multiple of λ² above which a step's loss gives no gradient (published: 1.6); none for none.
    """

    name: ClassVar[str] = "adjoint-matching"
    summary: ClassVar[str] = "stochastic optimal control: regress onto the lean adjoint, sample the tilted distribution"
    reference: ClassVar[str] = """@inproceedings{domingoenrich2025adjoint,
  title={Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with Memoryless Stochastic Optimal Control},
  author={Domingo-Enrich, Carles and Drozdzal, Michal and Karrer, Brian and Chen, Ricky T. Q.},
  booktitle={International Conference on Learning Representations}, year={2025}, note={arXiv:2409.08861}}"""

    scale: float = 100.0
    late: int = 0
    early: int = 0
    truncate: int | None = None
    solver: Literal["exact", "linear"] = "exact"
    spread: float | None = None
    noiseless: bool = False
    clip: float | None = 1.6

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices."""
        steps = len(times) - 1
        kernel = EulerMaruyama(Memoryless())
        first = 0 if self.truncate is None else max(0, steps - self.truncate)
        return Recipe(
            kernel,
            Loss(kernel, None if self.clip is None else self.clip * self.scale**2),
            credit=LeanAdjoint(kernel, self.scale, self.truncate, self.solver, self.spread, self.noiseless),
            trained=lambda level, t, s: level >= first,
            thin=late_and_random(self.late, self.early, steps) if self.late else None,
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings, and the demo's."""
        return {
            "published": Preset(
                cls(scale=12_500.0, late=10, early=10, noiseless=True),
                FitOptions(iterations=1000, groups=40, size=1, steps=40, batch=20, accumulate=0, lr=2e-5,
                           betas=(0.95, 0.999), weight_decay=1e-2),
                None,
                guidance=False,
                note="ImageReward, 2 A100, bf16, K = 40. Not run here.",
            ),
            "demo": Preset(
                cls(scale=100.0, late=3, early=2),
                FitOptions(iterations=200, groups=16, size=1, steps=10, batch=80, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes with shapes-clip. Four iterations raised reward and judge; 5e-4 lost (docs/gradients.md).",
            ),
        }  # fmt: skip
