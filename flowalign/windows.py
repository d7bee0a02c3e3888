"""Moving windows of stochastic, trained steps: a named state that follows the iterations.

MixGRPO (2507.21802) slides a window of 4 steps from noise to data, one step every 25 iterations, and starts again at
the end; Flow-GRPO-Fast draws its window anew each iteration from the early half; G²RPO steps through single levels;
B²-DiffuRL lets the trained tail grow; BranchGRPO leaves a window out; Dynamic-TreeRPO grows its tree in one that
slides. One window for a whole iteration: drawn per request it would collapse training.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.experience import Experience
from flowalign.noise import NoiseSource, mix
from flowalign.recipe import Learner
from flowalign.selection.base import Chosen, Selection

__all__ = ["BranchAt", "Cycle", "Growing", "LeftOut", "Random", "Sliding", "Window"]


class Window(Learner):
    """Levels ``[first, last)`` that draw noise and are trained; ``window(t, s)`` says whether a step is inside.

    Args:
        times: ``(K + 1,)`` of the sampler.
    """

    def __init__(self, times: Tensor) -> None:
        self.grid = torch.as_tensor(times, dtype=torch.float64).tolist()
        self.iteration = 0

    @property
    @abstractmethod
    def bounds(self) -> tuple[int, int]:
        """First level, and the one after the last."""

    def level(self, t: float) -> int:
        """Return the level at a time, which may have passed through float32."""
        return min(range(len(self.grid)), key=lambda k: abs(self.grid[k] - t))

    def __call__(self, t: float, s: float) -> bool:
        """Return whether the step from t starts inside."""
        first, last = self.bounds
        return first <= self.level(t) < last

    def trained(self, level: int, t: float, s: float) -> bool:
        """Return whether a level is inside, for ``Recipe.trained``."""
        first, last = self.bounds
        return first <= level < last

    def observe(self, experience: Experience) -> dict[str, float]:
        """Move on by one iteration."""
        first, last = self.bounds
        self.iteration += 1
        return {"window/first": float(first), "window/last": float(last)}

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration that the window is at."""
        return {"iteration": self.iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.iteration = int(state["iteration"])

    def check(self, width: int) -> None:
        """Refuse a window that does not fit the sampler.

        Raises:
            ValueError: for a width below 1 or above the number of steps.
        """
        steps = len(self.grid) - 1
        if not 1 <= width <= steps:
            raise ValueError(f"a window of {width} steps does not fit a sampler of {steps}; use 1 to {steps}.")


class Sliding(Window):
    """Moves by ``stride`` every ``period`` iterations from ``start``, the noisy end, to ``stop``, then starts again."""

    def __init__(
        self, times: Tensor, width: int = 4, stride: int = 1, period: int = 25, stop: int | None = None, start: int = 0
    ) -> None:
        super().__init__(times)
        self.check(width)
        if not 0 <= start <= len(self.grid) - 1 - width:
            raise ValueError(
                f"a window of {width} steps from step {start} on does not lie in a sampler of {len(self.grid) - 1}."
            )
        self.width, self.stride, self.period, self.start = width, stride, period, start
        self.places = max(1, ((len(self.grid) - 1 if stop is None else stop) - start - width) // stride + 1)

    @property
    def bounds(self) -> tuple[int, int]:
        """The window of this iteration."""
        first = self.start + (self.iteration // self.period) % self.places * self.stride
        return first, first + self.width


class Random(Window):
    """A contiguous window whose start is uniform in ``[0, stop - width]``, a function of (seed, iteration)."""

    def __init__(self, times: Tensor, width: int = 2, stop: int | None = None, seed: int = 0) -> None:
        super().__init__(times)
        self.check(width)
        self.width, self.seed = width, seed
        end = (len(self.grid) - 1) // 2 if stop is None else stop
        self.places = max(1, end - width + 1)

    @property
    def bounds(self) -> tuple[int, int]:
        """The window of this iteration."""
        first = mix(self.seed, self.iteration, 7) % self.places
        return first, first + self.width


class Cycle(Window):
    """One level at a time, in turn (G²RPO's ``eta_step_list``)."""

    def __init__(self, times: Tensor, levels: Sequence[int]) -> None:
        super().__init__(times)
        bad = [k for k in levels if not 0 <= k < len(self.grid) - 1]
        if bad or not levels:
            raise ValueError(f"levels must lie in 0 to {len(self.grid) - 2}; got {list(levels)}.")
        self.levels = tuple(levels)

    @property
    def bounds(self) -> tuple[int, int]:
        """The level of this iteration."""
        k = self.levels[self.iteration % len(self.levels)]
        return k, k + 1


class Growing(Window):
    """The last steps of the sampler, ever more: from ``low`` to ``high`` over ``stages`` of ``period`` iterations.

    Stage i has ``low + ⌊i (high - low + 1) / stages⌋`` steps, so that each width lasts equally long (B²-DiffuRL).
    """

    def __init__(self, times: Tensor, low: int, high: int, stages: int = 100, period: int = 1) -> None:
        super().__init__(times)
        self.check(low)
        self.check(high)
        self.low, self.high, self.stages, self.period = low, high, stages, period

    @property
    def bounds(self) -> tuple[int, int]:
        """The tail of this iteration."""
        grown = self.iteration // self.period * (self.high - self.low + 1) // self.stages
        width = self.low + min(grown, self.high - self.low)
        return len(self.grid) - 1 - width, len(self.grid) - 1


class LeftOut(Window):
    """Levels that are sampled but not trained, moving one level towards the noise every ``period`` iterations.

    BranchGRPO's depth pruning: 15 to 18 of 20 at first, moving every 30 iterations until the first of them is ``stop``.
    """

    def __init__(self, times: Tensor, first: int, last: int, period: int = 30, stop: int = 0) -> None:
        super().__init__(times)
        if not 0 <= first < last < len(self.grid) or period < 1:
            raise ValueError(
                f"depths to prune must lie in 0 to {len(self.grid) - 2} of this sampler, with a period of at least 1; "
                f"got {first} to {last - 1} and {period}."
            )
        self.first, self.last, self.period = first, last, period
        self.most = max(0, first - stop)

    @property
    def bounds(self) -> tuple[int, int]:
        """The levels left out in this iteration."""
        moved = min(self.iteration // self.period, self.most)
        return self.first - moved, self.last - moved

    def trained(self, level: int, t: float, s: float) -> bool:
        """Return whether a level is outside."""
        return not super().trained(level, t, s)


class BranchAt(Selection):
    """Every node has ``width`` children at certain levels of a moving window.

    Args:
        window: moves.
        width: children, at least 2.
        offsets: of the levels from the window's first.
    """

    def __init__(self, window: Window, width: int, offsets: Sequence[int] = (0,)) -> None:
        if width < 2:
            raise ValueError(f"a branch needs at least 2 children; got {width}.")
        self.window, self.width, self.offsets = window, width, frozenset(offsets)

    def __call__(self, level: int, log_w: Tensor, row: Tensor, n_rows: int, noise: NoiseSource) -> Chosen | None:
        """Repeat each node where the window says."""
        if level - self.window.bounds[0] not in self.offsets:
            return None
        parents = torch.arange(len(row)).repeat_interleave(self.width)
        return Chosen(parents, log_w.repeat_interleave(self.width), log_w.new_zeros(n_rows))
