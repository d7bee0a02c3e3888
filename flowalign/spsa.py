"""The gradient of a reward that has none: simultaneous perturbation (Spall 1992), for guides.

    ĝ(x0) = 1/n Σ_i (r(x0 + σ u_i) - r(x0 - σ u_i)) / 2σ · u_i,    u_i ~ N(0, I)

Unbiased for the gradient of the reward smoothed by σ; exact in the mean for a linear one. Its variance grows with the
dimension and falls as 1/n.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign.guidance import Along
from flowalign.noise import Noise, NoiseSource, mix, text_key
from flowalign.trajectory import ranks
from flowalign.values import Score

__all__ = ["Judged", "Spsa", "unit"]


def unit(g: Tensor) -> Tensor:
    """Return ``(B, *)`` divided by the norm of each sample; zero stays zero."""
    norm = g.flatten(1).norm(dim=1)
    return g / (norm + 1e-8).reshape(-1, *[1] * (g.ndim - 1))


class Spsa:
    """Estimates the gradient of the judge of the rollout at hand (:meth:`enter`).

    Args:
        probes: directions n.
        size: σ.
    """

    def __init__(self, probes: int, size: float) -> None:
        self.probes, self.size = probes, size
        self.score: Score | None = None
        self.noise: NoiseSource = Noise(0)

    def enter(self, score: Score, seed: int, keys: tuple[int, ...] | None) -> None:
        """Hear who judges the coming rollout; directions are a function of its seed, row, time and slot."""
        self.score, self.noise = score, Noise(mix(seed, 47), keys)

    @torch.no_grad()
    def __call__(self, x0: Tensor, t: float, row: Tensor) -> Tensor:
        """Return ``ĝ (B, *)`` at clean states seen at time t.

        Raises:
            ValueError: before a judge was heard of.
        """
        if self.score is None:
            raise ValueError("this guide asks the judge of the prompts, and no rollout has told it yet: call enter().")
        n, at = self.probes, text_key(f"{t:.9f}")
        slot = ranks(row)
        u = torch.cat([self.noise.normal(at + i, row, slot, x0.shape[1:]) for i in range(n)]).to(x0)
        many = torch.cat([x0] * n)
        r = self.score(torch.cat([many + self.size * u, many - self.size * u]), torch.cat([row] * (2 * n)))
        up, down = r.to(x0).chunk(2)
        slope = ((up - down) / (2 * self.size)).reshape(-1, *[1] * (x0.ndim - 1))
        return (slope * u).reshape(n, *x0.shape).mean(0)


@dataclass(frozen=True)
class Judged(Along):
    """A field that asks the judge of the coming rollout.

    Attributes:
        probing: what is told of it.
    """

    probing: Spsa = field(default_factory=lambda: Spsa(1, 0.01))

    def enter(self, score: Score, seed: int, keys: tuple[int, ...] | None) -> None:
        """Tell the field."""
        self.probing.enter(score, seed, keys)
