"""One ledger for every method, so that comparisons are at equal budget.

Counted per sample: network evaluations (guided or not, an evaluation of the field is one), gradient evaluations
(vector-Jacobian products through the network), decodes, reward calls; and seconds by phase.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Ledger"]

UNITS = ("evaluations", "gradients", "decodes", "rewards", "seconds")


@dataclass
class Ledger:
    """What was spent."""

    evaluations: int = 0
    gradients: int = 0
    decodes: int = 0
    rewards: int = 0
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds in all phases."""
        return sum(self.phases.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall-clock seconds of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def spent(self, unit: str) -> float:
        """Return what was spent in one of the units.

        Raises:
            ValueError: for an unknown unit.
        """
        if unit not in UNITS:
            raise ValueError(f"unknown budget unit {unit!r}; choose one of {', '.join(UNITS)}.")
        return float(getattr(self, unit))

    def state_dict(self) -> dict[str, float]:
        """Return the counts, phases as ``seconds/NAME``."""
        counts = {u: float(getattr(self, u)) for u in UNITS[:-1]}
        return counts | {f"seconds/{k}": v for k, v in self.phases.items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the counts."""
        for u in UNITS[:-1]:
            setattr(self, u, int(state[u]))
        self.phases = {k.removeprefix("seconds/"): v for k, v in state.items() if k.startswith("seconds/")}
