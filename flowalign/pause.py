"""A judge that is away pauses the run: one clear message, what is needed to resume is saved, and another try by and by.

A reward that lives elsewhere and does not answer raises :class:`Away`. Nothing was scored wrongly, and asking again
may help, so the scorer asks again, with growing waits, until the judge is back or patience ends. The run then goes on
with the very same samples, bit for bit as if nothing had happened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Away", "Pause"]

T = TypeVar("T")
log = logging.getLogger(__name__)
SLICE = 0.2  # seconds between two looks at whether the run is to stop


class Away(RuntimeError):
    """A judge does not answer for now; nothing was scored, and asking again later may help."""


def no() -> bool:
    """Nobody asks to stop."""
    return False


def nothing() -> str:
    """Nothing is to be saved: a search or an evaluation is simply run again."""
    return ""


@dataclass(frozen=True)
class Pause:
    """What a run does while a judge is away.

    Attributes:
        patience: seconds of one pause before the run ends with an error; ``inf`` never ends it.
        first: seconds before the first new try, doubled each time up to ...
        longest: ... this many.
        say: where the messages go; a warning of the logger ``flowalign.pause``, i.e. the terminal, by default.
        save: makes the run resumable and returns the sentence that says how; called once per pause.
        stop: whether the run is asked to end (Ctrl-C, a wall-clock budget): the pause then ends at once.
    """

    patience: float = 3600.0
    first: float = 1.0
    longest: float = 30.0
    say: Callable[[str], None] = log.warning
    save: Callable[[], str] = nothing
    stop: Callable[[], bool] = no

    def __post_init__(self) -> None:
        if not (self.patience >= 0 and 0 < self.first <= self.longest):
            raise ValueError(
                f"a pause wants patience >= 0 and 0 < first <= longest seconds; got {self.patience}, {self.first}, "
                f"{self.longest}."
            )

    def outlast(self, ask: Callable[[], T]) -> T:
        """Return what ``ask`` returns, asking again for as long as it raises :class:`Away`.

        Raises:
            Away: patience has ended, or the run was asked to stop; the message says how to resume.
        """
        try:
            return ask()
        except Away as error:
            began, wait, saved, trouble = time.monotonic(), self.first, self.save(), error
        self.say(
            f"{trouble} The run is paused and nothing is lost: it goes on by itself when the judge is back, and gives "
            f"up after {self.patience:.0f} s; Ctrl-C ends it. {saved}".rstrip()
        )
        while not self._wait(wait) and time.monotonic() - began <= self.patience:
            try:
                answer = ask()
            except Away as error:
                wait, trouble = min(2 * wait, self.longest), error
            else:
                self.say(f"the judge is back after {time.monotonic() - began:.0f} s: going on.")
                return answer
        raise Away(f"{trouble} The run waited {time.monotonic() - began:.0f} s for it. {saved}".rstrip()) from trouble

    def _wait(self, seconds: float) -> bool:
        """Sleep, and return early and true if the run is to stop."""
        end = time.monotonic() + seconds
        while not self.stop() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, SLICE))
        return self.stop()
