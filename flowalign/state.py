"""Named state: whatever changes while a run goes on, saved and restored by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Stateful"]


class Stateful:
    """Something with a ``state_dict``; by default it has nothing to remember."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it.

        Raises:
            ValueError: if there is state for something that keeps none.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but was given {sorted(state)}.")
