"""Does the picture show what the caption of the shapes world says? The programmatic judge, in the manner of GenEval.

The caption is read back from its words (:func:`parse`), the objects from the pixels (:mod:`flowalign.rewards.objects`).
With n(c, s) the objects of colour c and shape s that are seen, n*(c, s) those asked for, N and N* their totals:

    count     1 / (1 + |N - N*|)
    colour    Σ_c min(n_c, n*_c) / max(N, N*)          shape likewise; an object of no known shape counts in N only
    kind      Σ_cs min(n_cs, n*_cs) / max(N, N*)       colour and shape on the same object
    relation  clamp((d + 4) / 8, 0, 1),  d the pixels by which the first object is above (below, ...) the second

``graded`` is the mean of those that the caption has: it tells a picture that is nearly right from one that is not.
``strict`` is 1 where all of them are 1, else 0: the right number of objects, each of the right colour *and shape*, and
d ≥ 4. GenEval (Ghosh et al. 2310.11513) judges the same with a detector on photographs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, final

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, unique
from flowalign.rewards.objects import HUES, SHAPES, find_objects

__all__ = ["ASPECTS", "ShapesJudge", "Target", "parse", "verdicts"]

Aspect = Literal["strict", "graded", "count", "colour", "shape", "kind", "relation"]
ASPECTS: tuple[Aspect, ...] = ("strict", "graded", "count", "colour", "shape", "kind", "relation")
NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = ("above", "below", "left of", "right of")
MARGIN = 4.0  # pixels; the cells of the grid are 10.7 apart
GROUP = re.compile(rf"(a|one|two|three|four) ({'|'.join(HUES)}) ({'|'.join(SHAPES)})(s?)")
JOIN = re.compile(r"(.+?) (above|below|left of|right of|and) (.+)")


@dataclass(frozen=True)
class Target:
    """What a caption asks for.

    Attributes:
        kinds: ``(number, colour, shape)`` by group, indices into ``HUES`` and ``SHAPES`` of :mod:`.objects`.
        relation: index into :data:`RELATIONS` of the first object to the second, or -1.
    """

    kinds: tuple[tuple[int, int, int], ...]
    relation: int = -1


@lru_cache(maxsize=8192)
def parse(prompt: str) -> Target:
    """Read a caption.

    Raises:
        ValueError: for words outside the grammar of the shapes world.
    """
    words = " ".join(prompt.lower().strip(" .").split())
    joined = JOIN.fullmatch(words)
    parts = [joined[1], joined[3]] if joined else [words]
    found = [GROUP.fullmatch(p) for p in parts]
    kinds = tuple((NUMBERS[m[1]], list(HUES).index(m[2]), SHAPES.index(m[3])) for m in found if m)
    plural = all((m[4] == "s") == (NUMBERS[m[1]] > 1) for m in found if m)
    relation = RELATIONS.index(joined[2]) if joined and joined[2] != "and" else -1
    if len(kinds) < len(parts) or not plural or (relation >= 0 and any(k[0] > 1 for k in kinds)):
        raise ValueError(
            f"{prompt!r} is not a caption of the shapes world: write 'a red circle', 'three cyan squares', 'a red "
            f"circle above a blue square' or 'two red circles and one blue square', with the colours "
            f"{', '.join(HUES)}, the shapes {', '.join(SHAPES)} and the relations {', '.join(RELATIONS)}."
        )
    return Target(kinds, relation)


def verdicts(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return every aspect's ``(B,)`` scores of pictures ``(B, 3, H, W)``; relation is NaN where none is asked for."""
    device = images.device
    texts, index = unique(prompts)
    want, pair, relation = (x.to(device)[index] for x in _targets([parse(t) for t in texts]))
    seen, place = _tables(images)
    total, asked = seen.sum((1, 2)), want.sum((1, 2))
    most = torch.maximum(total, asked)
    known = seen[:, :, :-1]  # objects of a known shape
    out = {
        "count": 1 / (1 + (total - asked).abs()),
        "colour": torch.minimum(seen.sum(2), want.sum(2)).sum(1) / most,
        "shape": torch.minimum(known.sum(1), want.sum(1)).sum(1) / most,
        "kind": torch.minimum(known, want).sum((1, 2)) / most,
    }
    rows = torch.arange(len(images), device=device)[:, None]
    both = (known.flatten(1)[rows, pair] > 0).all(1)
    x, y = (place[rows, pair][:, 0] - place[rows, pair][:, 1]).unbind(-1)
    gap = torch.stack([-y, y, -x, x], 1).gather(1, relation.clamp_min(0)[:, None])[:, 0]
    held = torch.where(both, ((gap + MARGIN) / (2 * MARGIN)).clamp(0, 1), 0.0)
    asks = relation >= 0
    parts = torch.stack([*out.values(), held.where(asks, 1.0)], 1)
    out["strict"] = (parts == 1).all(1).float()
    out["graded"] = torch.where(asks, parts.mean(1), parts[:, :4].mean(1))
    out["relation"] = held.where(asks, torch.nan)
    return out


def _targets(targets: list[Target]) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers ``(P, 6, 3)``, the first and last kind ``(P, 2)`` as flat indices, and the relation ``(P,)``."""
    want = torch.zeros(len(targets), len(HUES), len(SHAPES))
    for i, target in enumerate(targets):
        for number, colour, shape in target.kinds:
            want[i, colour, shape] += number
    flat = [[c * len(SHAPES) + s for _, c, s in (t.kinds[0], t.kinds[-1])] for t in targets]
    return want, torch.tensor(flat), torch.tensor([t.relation for t in targets])


def _tables(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the objects seen ``(B, 6, 4)``, no shape last, and the mean centre of each kind ``(B, 18, 2)``."""
    objects = find_objects(images)
    shape = torch.where(objects.shape < 0, len(SHAPES), objects.shape)
    seen = images.new_zeros(len(images), len(HUES), len(SHAPES) + 1, dtype=torch.float32)
    at = (objects.row, objects.colour, shape)
    seen.index_put_(at, torch.ones_like(objects.area), accumulate=True)
    place = images.new_zeros(*seen.shape, 2, dtype=torch.float32)
    place.index_put_(at, objects.centre, accumulate=True)
    place = place / seen.clamp_min(1)[..., None]
    return seen, place[:, :, :-1].flatten(1, 2)


@final
class ShapesJudge(Judge):
    """The judge of the shapes world as a reward.

    Args:
        aspect: ``strict`` (0 or 1), ``graded`` (in [0, 1]) or one part: count, colour, shape, kind, relation. Captions
            without a relation cannot be judged on it.
    """

    card = Card(
        name="shapes",
        summary="whether a picture of the shapes world shows what its caption says: strict (0 or 1) or graded",
        reference="this project; after GenEval, Ghosh et al. 2023, arXiv:2310.11513",
    )

    def __init__(self, aspect: Aspect = "strict") -> None:
        super().__init__()
        if aspect not in ASPECTS:
            raise ValueError(f"the shapes judge looks at one of {', '.join(ASPECTS)}; got {aspect!r}.")
        self.aspect = aspect
        self.card = Card(
            name=f"shapes-{aspect}",
            summary={
                "strict": "1 where number, colours, shapes and relation are all as the caption says, else 0",
                "graded": "mean of count, colour, shape, kind and relation: how nearly the picture is right",
            }.get(aspect, f"how far the picture's {aspect} is as the caption says"),
            reference="this project; after GenEval, Ghosh et al. 2023, arXiv:2310.11513",
        )

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return the aspect's scores."""
        with torch.no_grad():
            scores = verdicts(media, prompts)[self.aspect]
        missing = scores.isnan().nonzero().flatten().tolist()
        self.unjudged(scores, {i: f"caption {prompts[i]!r} asks for no relation" for i in missing})
        return scores
