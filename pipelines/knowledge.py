"""What one adapter has learnt of its pipeline by asking it: how each kind of call is driven, and its time grids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from flowalign.pipelines.grid import Grid
from flowalign.pipelines.plan import Plan, learn
from flowalign.pipelines.session import Session

if TYPE_CHECKING:
    from flowalign.pipelines.adapter import Adapter
    from flowalign.pipelines.condition import Inputs

__all__ = ["Knowledge"]


class Knowledge:
    """Plans by kind of call, grids by kind and number of steps, the affine start by kind, steps and guidance."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.plans: dict[Any, Plan] = {}
        self.grids: dict[Any, Grid] = {}
        self.starts: dict[Any, tuple[Tensor, Tensor]] = {}

    def plan(self, cond: Inputs) -> Plan:
        """Return how calls of this kind are driven; tried once."""
        key = (cond.rows[0].kind, cond.guided)
        if key not in self.plans:
            steps = self.two(cond)
            self.plans[key] = learn(self.adapter.tap, self.adapter.arguments(cond.rows[:1], cond.guided, steps))
        return self.plans[key]

    def two(self, cond: Inputs) -> int:
        """Return a number of steps whose grid has at least two entries (image-to-image starts inside its grid)."""
        steps = max(self.adapter.steps, 2)
        while len(self.grid(cond, steps)) < 2 and steps < 64:
            steps *= 2
        return steps

    def grid(self, cond: Inputs, steps: int) -> Grid:
        """Return the grid of the pipeline's own loop for this many steps.

        Raises:
            ValueError: if the loop does not iterate the grid of ``set_timesteps``.
        """
        key = (cond.rows[0].kind, steps)
        if key not in self.grids:
            session = Session(stop_at_entry=True)
            self.adapter.run(cond.rows[:1], cond.guided, session, steps)
            if session.track is None:
                raise ValueError(
                    f"{type(self.adapter.pipe).__name__} ended without iterating the grid that "
                    "scheduler.set_timesteps made; its loop cannot be tapped."
                )
            self.grids[key] = Grid.of(session.track, session.offset, session.scheduler, self.adapter.convention)
        return self.grids[key]

    def locate(self, cond: Inputs, t: float) -> tuple[Grid, int]:
        """Return the grid on which ``t`` lies, the current one first, and its number of steps."""
        current = self.grid(cond, self.adapter.steps)
        if current.find(t) is None:
            for (kind, steps), grid in self.grids.items():
                if kind == cond.rows[0].kind and grid.find(t) is not None:
                    return grid, steps
        return current, self.adapter.steps

    def known_grids(self) -> list[Grid]:
        """Return the grids asked for so far, those of the current number of steps first."""
        return [g for _, g in sorted(self.grids.items(), key=lambda item: item[0][1] != self.adapter.steps)]

    def any_plan(self) -> Plan:
        """Return the plan of the last kind of call (solver arguments do not differ between kinds)."""
        return next(reversed(self.plans.values())) if self.plans else self.plan(self.adapter.sample())

    @property
    def settles(self) -> bool:
        """Whether the pipeline changes its latents between two steps (blending, pinned frames)."""
        return any(plan.settle for plan in self.plans.values())
