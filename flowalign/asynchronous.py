"""Score while the next rollout runs.

    judge = Asynchronous(reward, pending=2)
    futures = [judge.submit(media, prompts) for media, prompts in rollouts]     # each returns at once ...
    scores = [f.result() for f in futures]                                      # ... or waits while two are under way

``submit`` blocks once ``pending`` batches wait (back-pressure: decoded media would otherwise pile up in memory). Works
for remote rewards, where only the network waits, and for local ones, whose kernels run outside Python's lock. Errors
come out of ``result()``, on the batch that caused them. Scores are without gradients. The training loop uses it where
``FitOptions.overlap`` says so (:mod:`flowalign.overlap`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

from flowalign.protocols import Meta

__all__ = ["Asynchronous"]

T = TypeVar("T")


class Asynchronous(Generic[T]):
    """A judge that answers later.

    Args:
        judge: ``(media, prompts, meta)`` → scores: a reward, or a scorer's ``judge``; called from one thread at a time
            unless ``workers`` is raised.
        pending: batches under way or waiting, at most.
        workers: threads; more than one only for rewards that bear it, such as remote ones.
    """

    def __init__(
        self, judge: Callable[[Tensor, Sequence[str], Meta | None], T], pending: int = 2, workers: int = 1
    ) -> None:
        if pending < 1 or workers < 1:
            raise ValueError(f"pending and workers must be at least 1; got {pending}, {workers}.")
        self.judge = judge
        self.room = threading.BoundedSemaphore(pending)
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="reward")

    def submit(self, media: Tensor, prompts: Sequence[str], meta: Meta | None = None) -> Future[T]:
        """Start scoring; wait first if ``pending`` batches are under way."""
        self.room.acquire()
        try:
            future = self.pool.submit(self._score, media.detach(), list(prompts), meta)
        except RuntimeError:
            self.room.release()
            raise
        future.add_done_callback(lambda _: self.room.release())
        return future

    @torch.no_grad()
    def _score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> T:
        return self.judge(media, prompts, meta)

    def close(self) -> None:
        """Wait for what is under way and stop; what has not begun is dropped."""
        self.pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Asynchronous[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
