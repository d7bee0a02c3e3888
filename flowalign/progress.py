"""What is seen of a run while it goes, and how it is asked to end: bars, trackers, Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flowalign.config import flatten, to_dict

if TYPE_CHECKING:
    from flowalign.run import Run

__all__ = ["Bars", "patience", "trackers"]


@contextmanager
def trackers(run: Run) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yield what sends metrics to the chosen trackers."""
    config = run.job.config
    if not config.trackers:
        yield lambda metrics: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=config.device == "cpu", log_with=list(config.trackers), project_dir=str(run.folder.path / "trackers")
    )
    plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in flatten(to_dict(config)).items()}
    accelerator.init_trackers("flowalign", config=plain)
    try:
        yield lambda m: accelerator.log(m, step=int(m["iteration"]))
    finally:
        accelerator.end_training()


@contextmanager
def patience() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a wish to stop after this iteration; the second one stops at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: a notebook's or a test's own handler stays
        yield lambda: asked
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


class Bars:
    """Progress bars, or none."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    @contextmanager
    def bar(self, total: int, what: str, done: int = 0) -> Iterator[Callable[..., None]]:
        """Yield a function that advances the bar."""
        from tqdm.auto import tqdm

        with tqdm(total=total, initial=done, desc=what, disable=not self.shown, dynamic_ncols=True) as line:

            def tick(n: int, also: dict[str, float] | None = None) -> None:
                if also:
                    line.set_postfix({k: f"{v:.3f}" for k, v in also.items()}, refresh=False)
                line.update(n)

            yield tick
