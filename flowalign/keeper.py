"""When the training loop saves: every so many iterations, at the end, and when a judge that is away pauses the run.

A pause falls in the middle of an iteration. What is saved then is the state with which the iteration began: the weights
have not moved since, as all samples are judged before the first update, and the rest, which a rollout does change (the
ledger, windows, the random state), is kept aside. Resuming does the iteration anew and ends up at the same bits.

A gradient that is not finite stops the run in the same way. Where the iteration has taken steps already, its beginning
is gone (a copy of weights and optimiser at every iteration would be the price of having it), so the last good weights
go into a file of their own, and a resumed run goes on from the checkpoint before: exactly, or not at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowalign import checkpoint
from flowalign.scorer import Scorer
from flowalign.trainer import Trainer

__all__ = ["Keeper"]


class Keeper:
    """Saves a run.

    Args:
        folder: of the checkpoints; None saves nothing.
        trainer: the state.
        every: iterations between checkpoints; 0 for none but the last.
    """

    def __init__(self, folder: Path | None, trainer: Trainer, every: int) -> None:
        self.folder, self.trainer, self.every = folder, trainer, every
        self.metrics: dict[str, float] = {}

    def keep(self, metrics: Mapping[str, float], last: bool) -> None:
        """Save after an iteration, if it is the last or one is due."""
        self.metrics = {"iteration": float(self.trainer.iteration), **metrics}
        if last or (self.every and self.trainer.iteration % self.every == 0):
            self._save({})

    @contextmanager
    def pausing(self, scorer: Scorer, stop: Callable[[], bool]) -> Iterator[None]:
        """Save if a judge pauses the iteration inside, or a number in it is not finite; end the pause on ``stop``."""
        steps, pause = self.trainer.steps, scorer.pause
        around = copy.deepcopy(self.trainer.around()) if self.folder is not None else {}
        scorer.pause = replace(pause, save=lambda: self._paused(steps, around), stop=stop)
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} {self._stopped(steps, around)}".rstrip()) from error
        finally:
            scorer.pause = pause

    def _state(self, around: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.trainer.state_dict(), **around, "metrics": self.metrics}

    def _save(self, around: Mapping[str, Any]) -> None:
        if self.folder is not None:
            checkpoint.save(self.folder, self.trainer.iteration, self._state(around))

    def _stopped(self, steps: int, around: Mapping[str, Any]) -> str:
        """Save the last good weights; say where they are, and from where a resumed run goes on."""
        if self.folder is None:
            return ""
        if steps == self.trainer.steps:
            path = self._saved(around)
            return "" if path is None else f"The last good weights are in {path}, and a resumed run goes on from there."
        kept = checkpoint.write(self.folder / checkpoint.LAST_GOOD, self._state({}))
        path = checkpoint.latest(self.folder)
        start = "begins anew" if path is None else f"goes on from {path}, the last whole iteration that was saved"
        return f"The last good weights are in {kept}; a resumed run {start}."

    def _saved(self, around: Mapping[str, Any]) -> Path | None:
        """Save what there is under this iteration's name unless it is there; return the newest checkpoint."""
        if self.folder is None:
            return None
        path = checkpoint.latest(self.folder)
        if self.trainer.iteration and (path is None or path.name != checkpoint.name(self.trainer.iteration)):
            self._save(around)
            path = checkpoint.latest(self.folder)
        return path

    def _paused(self, steps: int, around: Mapping[str, Any]) -> str:
        """Save the beginning of this iteration if it can be and is not there; say from where a resumed run goes on."""
        if self.folder is None:
            return "No folder was given, so nothing can be resumed once it ends."
        path = self._saved(around) if steps == self.trainer.steps else checkpoint.latest(self.folder)
        return (
            f"Resuming would go on from {path}." if path is not None else "Resuming would begin anew: nothing is done."
        )
