"""How a reward that learns gets to hear of what it judges: of an iteration's samples, and of nothing else.

A reward is asked about much more than the samples that are trained on: intermediate states of a search, completions,
evaluations. Only while somebody listens does :func:`tell` note anything, and who listens decides what becomes of it:

    with hearing() as heard:            # the training loop, around the judging of an iteration's samples
        reward(media, prompts)          # inside: tell(learner, what it wants to remember)

What was told while the reward failed is dropped with the list. Each thread has its own listener.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["Heard", "hearing", "tell"]

Heard = list[tuple[Any, Any]]  # (learner, what it wants to remember)
_listener: ContextVar[Heard | None] = ContextVar("listener", default=None)


def tell(learner: Any, what: Any) -> None:
    """Note something for a learner, if anybody listens."""
    heard = _listener.get()
    if heard is not None:
        heard.append((learner, what))


@contextmanager
def hearing() -> Iterator[Heard]:
    """Listen, and yield the list that fills; a listener further out hears nothing meanwhile."""
    heard: Heard = []
    token = _listener.set(heard)
    try:
        yield heard
    finally:
        _listener.reset(token)
