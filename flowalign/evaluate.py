"""Paired evaluation: the same prompts, noises, sampler and guidance before and after, so that luck cancels.

    accuracy     mean of the judge per category, with the standard error over images
    gain         mean of (after - before) per image; its standard error is that of the paired differences
    layouts      exp of the entropy of layouts among correct images, over the category and as a mean over prompts: how
                 many arrangements the model still makes; the spread of pixels does not see a collapse, this does
    drift        mean (v - v_base)² at fixed noised samples of the base: how far the field has moved ("KL" in papers)

The entropy of n draws is biased low by about (support - 1)/2n, and alignment changes n. Before and after are therefore
cut to the same number of correct images for each prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d

from flowalign.collect import enter
from flowalign.kernels import EulerMaruyama, Kernel
from flowalign.noise import Noise, mix
from flowalign.policy import Policy
from flowalign.protocols import Pipeline
from flowalign.rollout import rollout
from flowalign.scorer import Scorer
from flowalign.source import Prompt, text_key
from flowalign.trajectory import ranks

__all__ = ["Comparison", "Exam", "Outcome", "compare", "drift", "effective_layouts", "examine"]

Layouts = Callable[[Tensor, Sequence[str]], Tensor]
DRIFT_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Exam:
    """What is asked: fixed prompts and noises.

    Attributes:
        prompts: held-out.
        images: per category.
        steps: sampling steps.
        batch: images at a time.
        seed: of the noises.
        keep: pictures kept, per category.
    """

    prompts: Sequence[Prompt]
    images: int
    steps: int
    batch: int = 100
    seed: int = 0
    keep: int = 24

    @property
    def categories(self) -> list[str]:
        """The categories in order of appearance; ``all`` where prompts name none."""
        return list(dict.fromkeys(category(p) for p in self.prompts))

    @property
    def mark(self) -> dict[str, Any]:
        """What must agree for two outcomes to be comparable."""
        texts = [p.text for p in self.prompts]
        return {"prompts": mix(*map(text_key, texts)), "images": self.images, "steps": self.steps, "seed": self.seed}

    def rows(self) -> Tensor:
        """Return the prompt of every image, category by category, a prompt's images together, ``(N,)``."""
        out: list[int] = []
        for name in self.categories:
            mine = [i for i, p in enumerate(self.prompts) if category(p) == name]
            for j, i in enumerate(mine):
                out += [i] * (self.images // len(mine) + (j < self.images % len(mine)))
        return torch.tensor(out)


@dataclass(frozen=True)
class Outcome:
    """What came of it, one entry per image.

    Attributes:
        row: prompt, ``(N,)``.
        category: of the prompt.
        scores: by reward name, ``(N,)``; the first is the judge.
        layout: an integer per image that names its arrangement, ``(N,)``; None where it is not measured.
        thumbs: a few numbers per image, ``(N, d)``, of which the spread is taken; None in older files.
        pictures: of some images, ``(K, ...)``.
        shown: which images those are.
        x0: clean states of those.
    """

    row: Tensor
    category: list[str]
    scores: dict[str, Tensor]
    layout: Tensor | None
    pictures: Tensor
    shown: list[int]
    x0: Tensor
    thumbs: Tensor | None = None

    @property
    def judged(self) -> Tensor:
        """The judge's scores."""
        return next(iter(self.scores.values()))

    def of(self, name: str) -> Tensor:
        """Return the indices of the images of a category."""
        return torch.tensor([i for i, c in enumerate(self.category) if c == name])

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return dict(vars(self))

    @classmethod
    def recall(cls, state: Mapping[str, Any]) -> Outcome:
        """Return the outcome of :meth:`state_dict`; further keys are left out."""
        return cls(**{f.name: state[f.name] for f in fields(cls) if f.name in state or f.default is MISSING})


def category(prompt: Prompt) -> str:
    """Return the category of a prompt."""
    return str(prompt.meta.get("category", "all"))


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
    show = {i for c in exam.categories for i in _first(names, c, exam.keep, row)}
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


def _first(names: list[str], name: str, keep: int, row: Tensor, prompts: int = 8) -> list[int]:
    """Choose ``keep`` images of a category: the first ones of a few prompts that lie evenly among its prompts."""
    by_prompt: dict[int, list[int]] = {}
    for i, c in enumerate(names):
        if c == name:
            by_prompt.setdefault(int(row[i]), []).append(i)
    every = list(by_prompt.values())
    few = [every[k * len(every) // min(prompts, len(every))] for k in range(min(prompts, len(every)))]
    order = [i for depth in range(max(map(len, few))) for p in few for i in p[depth : depth + 1]]
    return order[:keep]


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


# -- what is made of it ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Comparison:
    """One category, before and after.

    Attributes:
        images: how many.
        before: mean score, and its standard error.
        after: likewise.
        gain: paired difference, and its standard error.
        layouts: effective layouts of the category before and after; None where they are not measured.
        per_prompt: likewise, of one prompt: exp of the mean entropy over prompts.
    """

    images: int
    before: tuple[float, float]
    after: tuple[float, float]
    gain: tuple[float, float]
    layouts: tuple[float, float] | None
    per_prompt: tuple[float, float] | None

    @property
    def kept(self) -> float | None:
        """The share of the base's layouts that is left: the smaller of the two measures' shares."""
        shares = [after / before for before, after in (p for p in (self.layouts, self.per_prompt) if p is not None)]
        return min(shares) if shares else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "layouts_kept": self.kept}


def mean_se(values: Tensor) -> tuple[float, float]:
    """Return the mean and its standard error."""
    n = len(values)
    return float(values.mean()), float(values.std() / math.sqrt(n)) if n > 1 else math.nan


def compare(before: Outcome, after: Outcome, score: str | None = None) -> dict[str, Comparison]:
    """Compare two outcomes of one exam, by category.

    Args:
        before: of the base.
        after: of the aligned model.
        score: which reward; the judge when None.

    Raises:
        ValueError: if they are of different exams.
    """
    if not torch.equal(before.row, after.row):
        raise ValueError("before and after were asked different things: the comparison would not be paired.")
    out = {}
    for name in dict.fromkeys(before.category):
        i = before.of(name)
        a = (before.judged if score is None else before.scores[score])[i]
        b = (after.judged if score is None else after.scores[score])[i]
        out[name] = Comparison(len(i), mean_se(a), mean_se(b), mean_se(b - a), *effective_layouts(before, after, name))
    return out


Pair = tuple[float, float]


def effective_layouts(before: Outcome, after: Outcome, name: str) -> tuple[Pair | None, Pair | None]:
    """Return the effective numbers of layouts of a category before and after, over it and per prompt.

    Correct is a judge's score above one half. For each prompt both sides are cut to equally many correct images; a
    prompt of which either side has fewer than two says nothing per prompt.
    """
    if before.layout is None or after.layout is None:
        return None, None
    pools: tuple[list[Tensor], list[Tensor]] = ([], [])
    entropies: list[Pair] = []
    where = before.of(name)
    for prompt in before.row[where].unique().tolist():
        i = where[before.row[where] == prompt]
        a, b = (o.layout[i][o.judged[i] > 0.5] for o in (before, after) if o.layout is not None)
        n = min(len(a), len(b))
        pools[0].append(a[:n])
        pools[1].append(b[:n])
        if n >= 2:
            entropies.append((_entropy(a[:n]), _entropy(b[:n])))
    one, two = (torch.cat(p) for p in pools)
    whole = (math.exp(_entropy(one)), math.exp(_entropy(two))) if len(one) else None
    if not entropies:
        return whole, None
    first, second = torch.tensor(entropies, dtype=torch.float64).mean(0).exp().tolist()
    return whole, (first, second)


def _entropy(codes: Tensor) -> float:
    p = codes.unique(return_counts=True)[1].double() / len(codes)
    return float(-(p * p.log()).sum())


@torch.no_grad()
def drift(
    pipeline: Pipeline, policy: Policy, prompts: Sequence[str], meta: Sequence[Any], x0: Tensor, role: str, seed: int
) -> float:
    """Return the mean squared difference of a role's velocities from the base's, at fixed noised samples of the base.

    Args:
        pipeline: the generator.
        policy: with the role ``reference``.
        prompts: of each sample.
        meta: of each sample.
        x0: the base's clean samples ``(B, *)``.
        role: whose drift.
        seed: of the noises.
    """
    cond = pipeline.encode(list(prompts), list(meta))
    g = torch.Generator().manual_seed(seed)
    device = next(pipeline.denoiser.parameters()).device
    gaps = []
    for t in DRIFT_TIMES:
        noise = torch.randn(x0.shape, generator=g)
        x = policy.process.diffuse(x0, t, noise).to(device)
        base = policy.posterior(x, t, cond, "reference").velocity
        with policy.playing(role):
            gaps.append(((policy.posterior(x, t, cond).velocity - base) ** 2).mean())
    return float(torch.stack(gaps).mean())
