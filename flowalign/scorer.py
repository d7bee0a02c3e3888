"""Decode once, judge by every reward: the only place where media are made for rewards.

A judge that is away pauses the run here (:mod:`flowalign.pause`), and rewards that learn are heard here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.hearing import Heard, hearing
from flowalign.learner import learners_of
from flowalign.ledger import Ledger
from flowalign.pause import Away, Pause
from flowalign.protocols import Condition, Framed, Meta, Pipeline, Reward, check_media, check_scores
from flowalign.replay import checkpointed

__all__ = ["Bound", "Scorer"]


class Scorer:
    """A pipeline's decoder and named, weighted rewards.

    Args:
        pipeline: decodes.
        rewards: by name.
        weights: of each reward; 1 where missing.
        ledger: what decodes and reward calls are booked on.
        chunk: samples decoded and judged at a time.
        pause: what happens while a judge is away.
        checkpoint: decode and judge a chunk again in the backward pass instead of keeping its activations.
        by_frame: decode every frame of a video by itself, and again in the backward pass, where that is possible.

    Attributes:
        learners: what learns in the rewards.
        heard: what they were told of the samples judged with ``learn``, since the list was last cleared.

    Raises:
        ValueError: for no reward, a weight without reward, or a reward that cannot look at the pipeline's media.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float] | None = None,
        ledger: Ledger | None = None,
        chunk: int = 256,
        pause: Pause | None = None,
        checkpoint: bool = False,
        by_frame: bool = False,
    ) -> None:
        if not rewards:
            raise ValueError("no reward given: name at least one.")
        stray = set(weights or {}) - set(rewards)
        if stray:
            raise ValueError(f"weights given for {sorted(stray)}, but the rewards are {sorted(rewards)}.")
        for name, reward in rewards.items():
            if pipeline.modality not in reward.card.modality:
                looks = " or ".join(reward.card.modality)
                raise ValueError(f"reward {name!r} judges {looks}, and this pipeline makes {pipeline.modality}.")
        self.pipeline, self.rewards, self.chunk, self.checkpoint = pipeline, dict(rewards), chunk, checkpoint
        self.by_frame = by_frame
        self.weights = {n: float((weights or {}).get(n, 1.0)) for n in rewards}
        self.ledger = ledger if ledger is not None else Ledger()
        self.pause = pause if pause is not None else Pause()
        self.learners, self.heard = learners_of(self.rewards.values()), Heard()
        self.lock = threading.Lock()  # a search may ask for values while samples are scored in another thread

    @property
    def differentiable(self) -> bool:
        """Whether every reward gives gradients."""
        return all(r.card.differentiable for r in self.rewards.values())

    def frames_apart(self, cond: Condition) -> int:
        """Return how many frames the pipeline can decode by themselves; 1 where there is nothing to take apart."""
        return self.pipeline.frames_apart(cond) if isinstance(self.pipeline, Framed) else 1

    def bind(self, cond: Condition, prompts: Sequence[str], meta: Meta | None = None) -> Bound:
        """Return the judge of states that belong to rows of a condition."""
        return Bound(self, cond, list(prompts), None if meta is None else list(meta))

    def judge(
        self,
        media: Tensor,
        prompts: Sequence[str],
        meta: Meta | None = None,
        *,
        learn: bool = False,
    ) -> dict[str, Tensor]:
        """Score media by every reward, ``{name: (B,)}`` float32, checked for shape and NaN.

        Args:
            media: what is judged.
            prompts: one per sample.
            meta: one per sample.
            learn: these are the samples that are trained on: rewards that learn are to hear of them.

        Raises:
            flowalign.pause.Away: a judge is away, and patience has ended.
        """
        out, heard = self.ask(media, prompts, meta)
        if learn:
            self.heard += heard
        return out

    def ask(
        self, media: Tensor, prompts: Sequence[str], meta: Meta | None = None, *, patient: bool = True
    ) -> tuple[dict[str, Tensor], Heard]:
        """Return the scores of :meth:`judge`, and what the rewards told of the samples.

        All calls are booked before the first one is made. One that raises was paid for, unless its judge was away;
        those after it are given back.

        Args:
            media: what is judged.
            prompts: one per sample.
            meta: one per sample.
            patient: pause while a judge is away; else raise at once.
        """
        check_media(media, self.pipeline.modality)
        out: dict[str, Tensor] = {}
        heard = Heard()
        with self.lock:
            self.ledger.rewards += len(media) * len(self.rewards)
            try:
                for name, reward in self.rewards.items():

                    def once(name: str = name, reward: Reward = reward) -> tuple[Tensor, Heard]:
                        with hearing() as told:
                            return check_scores(reward(media, prompts, meta), len(media), name), told

                    out[name], told = self.pause.outlast(once) if patient else once()
                    heard += told
            except BaseException as error:
                paid = len(out) + (not isinstance(error, Away))
                self.ledger.rewards -= len(media) * (len(self.rewards) - paid)
                raise
        return out, heard


@dataclass(frozen=True)
class Bound:
    """Judges clean states of known rows: ``(x0, row) → {name: (B,)}``.

    Attributes:
        scorer: decoder and rewards.
        cond: conditions by row.
        prompts: by row.
        meta: by row.
    """

    scorer: Scorer
    cond: Condition
    prompts: list[str]
    meta: list | None

    def __call__(self, x0: Tensor, row: Tensor, *, learn: bool = False) -> dict[str, Tensor]:
        """Decode and score in chunks; gradients flow where the mode allows. For ``learn`` see :meth:`Scorer.judge`."""
        if self.scorer.checkpoint and torch.is_grad_enabled() and x0.requires_grad:
            index = torch.arange(len(x0)).split(self.scorer.chunk)
            parts = [self._again(x0[i.to(x0.device)], row[i], learn) for i in index]
        else:
            parts = [self.scorer.judge(*p, learn=learn) for p in self.pieces(x0, row)]
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    def _again(self, x0: Tensor, row: Tensor, learn: bool) -> dict[str, Tensor]:
        """Judge one chunk under a gradient checkpoint; the second time books nothing and tells no learner."""
        names, ledger, runs = list(self.scorer.rewards), self.scorer.ledger, 0

        def forward(x: Tensor) -> tuple[Tensor, ...]:
            nonlocal runs
            booked, runs = (ledger.decodes, ledger.rewards), runs + 1
            try:  # the recomputation may be left early, by an exception
                ((media, prompts, meta),) = self.pieces(x, row)
                scores = self.scorer.judge(media, prompts, meta, learn=learn and runs == 1)
            finally:
                if runs > 1:
                    ledger.decodes, ledger.rewards = booked
            return tuple(scores[n] for n in names)

        return dict(zip(names, checkpointed(forward, x0, "the decoder or a reward"), strict=True))

    def pieces(self, x0: Tensor, row: Tensor) -> Iterator[tuple[Tensor, list[str], list | None]]:
        """Yield media, prompts and meta of one chunk after the other."""
        for index in torch.arange(len(x0)).split(self.scorer.chunk):
            media = self.media(x0[index.to(x0.device)], row[index])
            rows = row[index].tolist()
            yield media, [self.prompts[r] for r in rows], None if self.meta is None else [self.meta[r] for r in rows]

    def total(self, x0: Tensor, row: Tensor) -> Tensor:
        """Return the weighted sum of the rewards, ``(B,)``."""
        scores = self(x0, row)
        return torch.stack([self.scorer.weights[k] * r for k, r in scores.items()]).sum(0)

    def media(self, x0: Tensor, row: Tensor) -> Tensor:
        """Decode clean states."""
        self.scorer.ledger.decodes += len(x0)
        pipeline, cond = self.scorer.pipeline, self.cond[row]
        count = self.scorer.frames_apart(cond) if self.scorer.by_frame else 1
        if count == 1 or not isinstance(pipeline, Framed):
            return pipeline.decode(x0, cond)
        return torch.cat([pipeline.decode(x0, cond, frames=[f], checkpoint=True) for f in range(count)], 1)
