"""The one worker behind a reward server: scores what waits, merging requests that fit together.

A merged batch that fails is scored request by request, so that nobody fails by another's fault.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowalign.protocols import Reward, check_media, check_scores
from flowalign.rewards.base import Unjudged, check_prompts, modality_of
from flowalign.rewards.wire import Batch, Limits

__all__ = ["Job", "Worker"]


@dataclass(eq=False)
class Job:
    """A request in the queue."""

    batch: Batch
    answer: asyncio.Future[dict[str, Any]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Worker:
    """Scores what waits, merging what fits together.

    Args:
        reward: the judge.
        limits: of the queue and of a merged batch.
        device: where media are sent; None leaves them.
    """

    def __init__(self, reward: Reward, limits: Limits, device: torch.device | str | None) -> None:
        self.reward, self.limits, self.device = reward, limits, device
        self.queue: asyncio.Queue[Job] = asyncio.Queue(limits.waiting)

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        while True:
            jobs = [await self.queue.get()]
            while not self.queue.empty():
                jobs.append(self.queue.get_nowait())
            for group in self._groups(jobs):
                await self._serve(group)

    def _groups(self, jobs: list[Job]) -> list[list[Job]]:
        """Group jobs of one shape, up to the limit of a batch; a reward of a set is never merged."""
        groups: list[list[Job]] = []
        for job in jobs:
            last = next((g for g in reversed(groups) if self._merge(g, job)), None)
            if last is None:
                groups.append([job])
            else:
                last.append(job)
        return groups

    def _merge(self, group: list[Job], job: Job) -> bool:
        a, b = group[0].batch, job.batch
        fits = a.media.shape[1:] == b.media.shape[1:] and a.media.dtype == b.media.dtype
        total = sum(len(j.batch.prompts) for j in group) + len(b.prompts)
        return self.reward.card.batch and fits and (a.meta is None) == (b.meta is None) and total <= self.limits.samples

    async def _serve(self, group: list[Job]) -> None:
        for jobs in [group] if len(group) == 1 else [group, *([j] for j in group)]:
            jobs = [j for j in jobs if not j.answer.done()]  # those whose client has gone, or who are answered
            if not jobs:
                continue
            try:
                answers = await asyncio.to_thread(self._score, [j.batch for j in jobs])
            except Exception as error:
                if len(jobs) == 1:
                    jobs[0].answer.set_exception(error)
                continue
            for job, answer in zip(jobs, answers, strict=True):
                if not job.answer.done():
                    job.answer.set_result(answer)

    @torch.no_grad()
    def _score(self, batches: list[Batch]) -> list[dict[str, Any]]:
        media = torch.cat([b.media for b in batches])
        check_media(media, modality_of(media, self.reward.card.modality))  # on the CPU, where the range is checked
        prompts = [p for b in batches for p in b.prompts]
        meta = None if batches[0].meta is None else [m for b in batches for m in b.meta or []]
        check_prompts(prompts, meta, len(media))
        scores, reasons = self._judge(media if self.device is None else media.to(self.device), prompts, meta)
        answers, start = [], 0
        for b in batches:
            part = scores[start : start + len(b.prompts)].tolist()
            why = {str(i - start): r for i, r in reasons.items() if start <= i < start + len(b.prompts)}
            answers.append({"scores": [s if math.isfinite(s) else None for s in part], "unjudged": why})
            start += len(b.prompts)
        return answers

    def _judge(self, media: Tensor, prompts: list[str], meta: Any) -> tuple[Tensor, dict[int, str]]:
        try:
            return check_scores(self.reward(media, prompts, meta), len(media), self.reward.card.name).cpu(), {}
        except Unjudged as error:
            return error.scores.detach().cpu(), error.reasons
