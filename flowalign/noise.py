"""Noise as a pure function of (seed, prompt key, level, slot).

It is made on the CPU in float32, so trees, resampling, chunks of a batch, device counts and resumed runs all see the
same numbers without carrying generator state. ``level`` counts steps of a rollout (``START`` for the initial noise),
``slot`` numbers the nodes of one row at one level.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["START", "Given", "Noise", "NoiseSource", "Stream", "mix", "text_key"]

START = -1  # the level of the noise that a rollout starts from
MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """Hash integers to a 63-bit seed (splitmix64 over the sequence; Steele, Lea & Flood 2014)."""
    h = 0x9E3779B97F4A7C15
    for v in values:
        h = (h ^ (v & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & MASK
        h ^= h >> 31
    return h >> 1


def text_key(text: str) -> int:
    """Return a stable 63-bit integer for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class NoiseSource(ABC):
    """Where a rollout takes its randomness from."""

    @abstractmethod
    def normal(self, level: int, row: Tensor, slot: Tensor, shape: Sequence[int]) -> Tensor:
        """Return standard normal ``(N, *shape)`` for nodes ``(row, slot)`` ``(N,)`` at a level."""

    @abstractmethod
    def uniform(self, level: int, n_rows: int, count: int) -> Tensor:
        """Return float64 uniforms in [0, 1), ``(n_rows, count)``, for the selection at a level."""


@dataclass(frozen=True)
class Noise(NoiseSource):
    """Keyed noise.

    Attributes:
        seed: of the run, or of the iteration.
        keys: one integer per row that names the prompt for good; the row number when None. Chunks of one batch carry
            their own slice of keys and reproduce the whole batch.
    """

    seed: int
    keys: tuple[int, ...] | None = None

    def normal(self, level: int, row: Tensor, slot: Tensor, shape: Sequence[int]) -> Tensor:
        """Return float32 noise on the CPU."""
        out = torch.empty(len(row), *shape)
        g = torch.Generator()
        for i, (r, j) in enumerate(zip(row.tolist(), slot.tolist(), strict=True)):
            g.manual_seed(mix(self.seed, self._key(r), level, j))
            out[i] = torch.randn(*shape, generator=g)
        return out

    def uniform(self, level: int, n_rows: int, count: int) -> Tensor:
        """Return one stream of uniforms per row."""
        out = torch.empty(n_rows, count, dtype=torch.float64)
        g = torch.Generator()
        for r in range(n_rows):
            g.manual_seed(mix(self.seed, self._key(r), level, 0, 1))
            out[r] = torch.rand(count, generator=g, dtype=torch.float64)
        return out

    def _key(self, row: int) -> int:
        return row if self.keys is None else self.keys[row]


@dataclass(frozen=True)
class Stream(NoiseSource):
    """Noise in the order of asking, from one generator: for closed-form worlds with very many tiny particles."""

    generator: torch.Generator

    def normal(self, level: int, row: Tensor, slot: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the next float32 numbers."""
        return torch.randn(len(row), *shape, generator=self.generator)

    def uniform(self, level: int, n_rows: int, count: int) -> Tensor:
        """Return the next float64 numbers."""
        return torch.rand(n_rows, count, generator=self.generator, dtype=torch.float64)


@dataclass(frozen=True)
class Given(NoiseSource):
    """Explicit noises per level, possibly requiring gradients (noise optimisation, finite differences).

    Attributes:
        levels: level → ``(N, *shape)``.
        rest: what serves the levels not given, and the uniforms.
    """

    levels: Mapping[int, Tensor]
    rest: NoiseSource

    def normal(self, level: int, row: Tensor, slot: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the given tensor of this level.

        Raises:
            ValueError: if its shape is not ``(N, *shape)``.
        """
        z = self.levels.get(level)
        if z is None:
            return self.rest.normal(level, row, slot, shape)
        if tuple(z.shape) != (len(row), *shape):
            raise ValueError(
                f"noise given for level {level} has shape {tuple(z.shape)}; {(len(row), *shape)} is needed."
            )
        return z

    def uniform(self, level: int, n_rows: int, count: int) -> Tensor:
        """Return the uniforms of ``rest``."""
        return self.rest.uniform(level, n_rows, count)
