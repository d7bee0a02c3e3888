"""The time grid of a pipeline for one number of steps, resolution and solver: float times and what they stand for."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.pipelines.convention import Convention

__all__ = ["Grid", "Spot"]


@dataclass(frozen=True)
class Spot:
    """Where a time lies: entry ``index`` of the grid, and the timestep and sigma there if it is off the grid."""

    index: int
    timestep: float | None = None
    sigma: float | None = None


@dataclass(frozen=True, eq=False)
class Grid:
    """One grid as the pipeline's loop iterates it.

    Attributes:
        times: ``(n + 1,)`` strictly falling float64; the last is data time 0. Entries that a solver visits twice
            (Heun, PNDM) are one unit of round-off apart.
        timesteps: ``(n,)`` exactly as the scheduler holds them.
        offset: how many entries of the scheduler's grid come before (image-to-image starts inside it).
        scheduler: the solver as it was when the loop began; copied before use, never stepped.
        convention: what its numbers mean.
    """

    times: Tensor
    timesteps: Tensor
    offset: int
    scheduler: Any
    convention: Convention
    listed: tuple[float, ...]

    @classmethod
    def of(cls, timesteps: Tensor, offset: int, scheduler: Any, convention: Convention) -> Grid:
        """Read the times of a grid; ``timesteps`` are those that the loop iterates.

        Raises:
            ValueError: if the times do not fall, which would mean that the convention is misread.
        """
        times = convention.times(scheduler)
        tail = len(times) - 1 - offset - len(timesteps)
        # a loop may leave out the last entries (SanaSprint ends before the angle 0)
        times = times[offset : offset + len(timesteps) + 1].clone() if tail >= 0 else times[offset:].clone()
        times[-1] = 0.0
        if len(times) != len(timesteps) + 1 or not (times.diff()[:-1] <= 0).all() or float(times[0]) > 1 + 1e-6:
            raise ValueError(
                f"the grid of {type(scheduler).__name__} does not fall from at most 1 to 0 as "
                f"{type(convention).__name__} times: {times.tolist()}. "
                "Its convention is not one that flowalign knows: report the scheduler."
            )
        times[0] = times[0].clamp_max(1.0)
        for i in range(1, len(times) - 1):  # what is visited twice must stay tellable by its time
            if times[i] >= times[i - 1]:
                times[i] = math.nextafter(float(times[i - 1]), 0.0)
        return cls(times, timesteps, offset, scheduler, convention, tuple(times.tolist()))

    def __len__(self) -> int:
        """Return the number of network evaluations."""
        return len(self.timesteps)

    def find(self, t: float) -> int | None:
        """Return the index whose time is exactly ``t``, or None."""
        i = bisect.bisect_left(self.listed, -t, key=lambda value: -value)
        return i if i < len(self.listed) - 1 and self.listed[i] == t else None

    def spot(self, t: float) -> Spot:
        """Return where ``t`` lies; between grid points the entry before it lends its place."""
        exact = self.find(t)
        if exact is not None:
            return Spot(exact)
        i = min(max(bisect.bisect_right(self.listed, -t, key=lambda value: -value) - 1, 0), len(self) - 1)
        return Spot(i, self._timestep(t), self.convention.sigma(t))

    def _timestep(self, t: float) -> float:
        """Return the convention's timestep, or interpolate where this pipeline's grid has a clock of its own."""
        theirs = torch.tensor([self.convention.timestep(v) for v in self.listed[:-1]], dtype=torch.float64)
        ours = self.timesteps.double().cpu()
        scale = max(float(ours.abs().max()), 1e-12)
        whole = 0.0 if self.timesteps.is_floating_point() else 1.0
        if float((theirs - ours).abs().max()) <= 2e-3 * scale + whole:
            return self.convention.timestep(t)
        xs, ys = list(reversed(self.listed[:-1])), list(reversed(ours.tolist()))
        if len(xs) == 1:
            return ys[0]
        j = min(max(bisect.bisect_left(xs, t), 1), len(xs) - 1)
        return ys[j - 1] + (t - xs[j - 1]) / (xs[j] - xs[j - 1]) * (ys[j] - ys[j - 1])
