"""Paired evaluation: the same prompts, noises, sampler and guidance before and after, so that luck cancels.

    examine      (pipeline, policy, judge, exam)  →  outcome: scores, layouts, thumbnails and some pictures

What is asked and what came of it: :mod:`flowalign.exam`; what two outcomes say together: :mod:`flowalign.comparison`;
how far the field has moved: :mod:`flowalign.distance`. Their names can be had from here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d

from flowalign.collect import enter
from flowalign.comparison import Comparison, compare, effective_layouts, mean_se
from flowalign.distance import DRIFT_TIMES, drift
from flowalign.exam import Exam, Outcome, category
from flowalign.kernels import EulerMaruyama, Kernel
from flowalign.noise import Noise, mix
from flowalign.policy import Policy
from flowalign.protocols import Pipeline
from flowalign.rollout import rollout
from flowalign.scorer import Scorer
from flowalign.source import text_key
from flowalign.trajectory import ranks

__all__ = [
    "DRIFT_TIMES", "Comparison", "Exam", "Layouts", "Outcome", "category", "compare", "drift", "effective_layouts",
    "examine", "mean_se", "thumbnails",
]  # fmt: skip

Layouts = Callable[[Tensor, Sequence[str]], Tensor]


@torch.no_grad()
def examine(
    pipeline: Pipeline,
    policy: Policy,
    scorer: Scorer,
    exam: Exam,
    *,
    role: str = "current",
    kernel: Kernel | None = None,
    layouts: Layouts | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Sample and judge all images of an exam in one role.

    Args:
        pipeline: the generator, with the guidance that is to be judged.
        policy: evaluates it.
        scorer: rewards; the first is the judge.
        exam: what is asked.
        role: whose weights.
        kernel: the sampler; the ODE by Euler steps when None.
        layouts: ``(media, prompts) → (B,)`` integers that name arrangements.
        progress: called with the number of images done at a time.
    """
    row = exam.rows()
    names = [category(exam.prompts[r]) for r in row.tolist()]
    show = {i for c in exam.categories for i in _first(exam, row, c)}
    scores: dict[str, list[Tensor]] = {}
    codes, pictures, states, shown, small = [], [], [], [], []
    with policy.playing(role):
        for index, x, media, judged in _chunks(pipeline, policy, scorer, exam, row, kernel or EulerMaruyama()):
            for name, value in judged.items():
                scores.setdefault(name, []).append(value.float().cpu())
            if layouts is not None:
                codes.append(layouts(media, [exam.prompts[r].text for r in row[index].tolist()]).cpu())
            kept = [k for k, i in enumerate(index.tolist()) if i in show]
            shown += [int(index[k]) for k in kept]
            pictures.append(media[kept].float().cpu())
            small.append(thumbnails(media))
            states.append(x[kept].float().cpu())
            if progress is not None:
                progress(len(index))
    joined = {k: torch.cat(v) for k, v in scores.items()}
    return Outcome(
        row, names, joined, torch.cat(codes) if codes else None, torch.cat(pictures), shown, torch.cat(states),
        torch.cat(small),
    )  # fmt: skip


def thumbnails(media: Tensor, side: int = 8) -> Tensor:
    """Return a few numbers of each sample, ``(B, d)``: pixels of 8×8 (and 4 frames), or 64 loudnesses of audio."""
    media = media.detach().float()
    if media.ndim == 3:
        small = adaptive_avg_pool1d(media.square(), side * side).clamp_min(0).sqrt()
    elif media.ndim == 4:
        small = adaptive_avg_pool2d(media, side)
    else:
        small = adaptive_avg_pool3d(media.transpose(1, 2), (4, side, side))
    return small.flatten(1).cpu()


def _first(exam: Exam, row: Tensor, name: str, prompts: int = 8) -> list[int]:
    """Choose the images of a category that are kept: the first ones of a few prompts that lie evenly among all.

    The same prompts whatever the number of images, so that a short exam can be shown beside a long one; in place of
    those that have no image the first others.
    """
    by_prompt: dict[int, list[int]] = {i: [] for i, p in enumerate(exam.prompts) if category(p) == name}
    for i, r in enumerate(row.tolist()):
        if r in by_prompt:
            by_prompt[r].append(i)
    mine, n = list(by_prompt), min(prompts, len(by_prompt))
    even = [mine[k * len(mine) // n] for k in range(n)]
    few = [by_prompt[r] for r in dict.fromkeys([*even, *mine]) if by_prompt[r]][:n]
    order = [i for depth in range(max(map(len, few), default=0)) for p in few for i in p[depth : depth + 1]]
    return order[: exam.keep]


def _chunks(
    pipeline: Pipeline, policy: Policy, scorer: Scorer, exam: Exam, row: Tensor, kernel: Kernel
) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
    """Yield indices, clean states, media and scores of batches.

    An image's noise depends on its prompt and its number among that prompt's images, not on the batch or on how many
    images are asked for: a smaller exam sees the first of the same ones.
    """
    slot = ranks(row)
    for index in torch.arange(len(row)).split(exam.batch):
        chosen = row[index].unique().tolist()
        prompts = [exam.prompts[r] for r in chosen]
        texts, meta = [p.text for p in prompts], [p.meta for p in prompts]
        judge = scorer.bind(pipeline.encode(texts, meta), texts, meta)
        local = torch.tensor([chosen.index(r) for r in row[index].tolist()])
        keys = tuple(
            mix(text_key(exam.prompts[r].text), n)
            for r, n in zip(row[index].tolist(), slot[index].tolist(), strict=True)
        )
        times = pipeline.times(exam.steps)
        start = enter(pipeline, judge.cond, local, _PerImage(exam.seed, keys), float(times[0]))
        tree = rollout(policy, kernel, times, start, judge.cond, noise=_PerImage(exam.seed, keys), n_rows=len(chosen))
        x = tree.leaves.x
        media = judge.media(x, local)
        yield (
            index,
            x,
            media,
            scorer.judge(media, [texts[i] for i in local.tolist()], [meta[i] for i in local.tolist()]),
        )


@dataclass(frozen=True)
class _PerImage(Noise):
    """Noise keyed by the image, whatever the batch it is in: ``keys`` holds one entry per node, not per row."""

    def normal(self, level: int, row: Tensor, slot: Tensor, shape: Sequence[int]) -> Tensor:
        """Return float32 noise on the CPU."""
        assert self.keys is not None
        alone = torch.arange(len(row))
        return Noise(self.seed, self.keys).normal(level, alone, torch.zeros_like(alone), shape)
