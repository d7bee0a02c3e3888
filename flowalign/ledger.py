"""One ledger for every method, so that comparisons are at equal budget.

Counted per sample: network evaluations (guided or not, an evaluation of the field is one), gradient evaluations
(vector-Jacobian products through the network), decodes, reward calls; and seconds by phase.

A ledger may carry a limit (``with ledger.within(Budget.parse("500nfe"))``). Work is booked before it is done, so what
would go over the limit is not begun: :class:`BudgetSpent` is raised in its place, and no count ever exceeds its budget.
Seconds are looked at whenever something is booked, so a search ends within one network call of its time.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["UNITS", "Budget", "BudgetSpent", "Ledger"]

UNITS = ("evaluations", "gradients", "decodes", "rewards", "seconds")
COUNTED = UNITS[:-1]
WORDS = {
    "": ("evaluations", 1.0),
    "nfe": ("evaluations", 1.0),
    "evaluation": ("evaluations", 1.0),
    "nge": ("gradients", 1.0),
    "gradient": ("gradients", 1.0),
    "decode": ("decodes", 1.0),
    "reward": ("rewards", 1.0),
    "s": ("seconds", 1.0),
    "second": ("seconds", 1.0),
    "min": ("seconds", 60.0),
    "h": ("seconds", 3600.0),
} | {u: (u, 1.0) for u in UNITS}
WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([a-z]*)\s*")


class BudgetSpent(Exception):
    """The next piece of work would go over the limit: no error, but the way a search is told to stop."""


@dataclass(frozen=True)
class Budget:
    """So much of one unit.

    Attributes:
        amount: greater than 0.
        unit: one of ``UNITS``.

    Raises:
        ValueError: for an unknown unit, or nothing to spend.
    """

    amount: float
    unit: str = "evaluations"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unknown budget unit {self.unit!r}; choose one of {', '.join(UNITS)}.")
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise ValueError(f"a budget must be a positive number of {self.unit}; got {self.amount}.")

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """Read ``500nfe``, ``30s``, ``5min``, ``64rewards``, ``9gradients``; a bare number is evaluations.

        Raises:
            ValueError: for anything else, with the units that there are.
        """
        found = WRITTEN.fullmatch(str(text).lower())
        if found is None or found[2] not in WORDS:
            raise ValueError(
                f"{text!r} is no budget: write a number and a unit, like 500nfe (network evaluations), 30s, 5min, 1h, "
                "64rewards, 64decodes or 40gradients."
            )
        unit, scale = WORDS[found[2]]
        return cls(float(found[1]) * scale, unit)

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"{self.amount:g} {self.unit}"


class Ledger:
    """What was spent.

    Args:
        clock: tells the seconds; the wall's when None, or ``time.process_time`` for the processor's own, in which other
            work on a shared machine does not count.

    Attributes:
        phases: seconds by name.
        limit: what may be spent; None for no limit.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock if clock is not None else time.perf_counter
        self._counts = dict.fromkeys(COUNTED, 0)
        self._open: list[float] = []
        self.phases: dict[str, float] = {}
        self.limit: Budget | None = None

    def __eq__(self, other: object) -> bool:
        """Compare counts and phases."""
        return isinstance(other, Ledger) and self.state_dict() == other.state_dict()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def book(self, unit: str, n: int) -> None:
        """Add work that is about to be done.

        Raises:
            BudgetSpent: it would go over the limit; nothing was booked.
        """
        if self.limit is not None and n > 0:
            over = self._counts[unit] + n > self.limit.amount if self.limit.unit == unit else False
            if over or (self.limit.unit == "seconds" and self.seconds >= self.limit.amount):
                raise BudgetSpent(f"{self.spent(self.limit.unit):g} of {self.limit} are spent")
        self._counts[unit] += n

    @property
    def evaluations(self) -> int:
        """Network evaluations."""
        return self._counts["evaluations"]

    @evaluations.setter
    def evaluations(self, value: int) -> None:
        self.book("evaluations", value - self.evaluations)

    @property
    def gradients(self) -> int:
        """Vector-Jacobian products through the network."""
        return self._counts["gradients"]

    @gradients.setter
    def gradients(self, value: int) -> None:
        self.book("gradients", value - self.gradients)

    @property
    def decodes(self) -> int:
        """Decoded samples."""
        return self._counts["decodes"]

    @decodes.setter
    def decodes(self, value: int) -> None:
        self.book("decodes", value - self.decodes)

    @property
    def rewards(self) -> int:
        """Samples judged, once for each reward."""
        return self._counts["rewards"]

    @rewards.setter
    def rewards(self, value: int) -> None:
        self.book("rewards", value - self.rewards)

    @property
    def seconds(self) -> float:
        """Seconds in all phases, the one that is open included."""
        now = self.clock()
        return sum(self.phases.values()) + sum(now - start for start in self._open)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to a phase."""
        start = self.clock()
        self._open.append(start)
        try:
            yield
        finally:
            self._open.remove(start)
            self.phases[name] = self.phases.get(name, 0.0) + self.clock() - start

    @contextmanager
    def within(self, limit: Budget | None) -> Iterator[None]:
        """Hold a limit over a block."""
        before, self.limit = self.limit, limit
        try:
            yield
        finally:
            self.limit = before

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
        counts = {u: float(n) for u, n in self._counts.items()}
        return counts | {f"seconds/{k}": v for k, v in self.phases.items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the counts."""
        self._counts = {u: int(state[u]) for u in COUNTED}
        self.phases = {k.removeprefix("seconds/"): v for k, v in state.items() if k.startswith("seconds/")}
