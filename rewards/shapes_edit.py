"""Did the edit do what the words say, and nothing else? The programmatic judge of `shapes-edit`.

Compared are the blobs (:mod:`~flowalign.rewards.blobs`) of the source picture, ``meta[i]["image"]``, and of the edited
one. With Δ the displacement of the named object's centroid, ρ the ratio of its areas and θ its clockwise turn,

    move     Δ along the word's direction ≥ 4 pixels, across it ≤ 1.5;  ρ in [.75, 1.33];  |θ| ≤ 14°
    turn     θ in the word's sense between 14° and 46°;  |Δ| ≤ 1.5;  ρ in [.75, 1.33]
    resize   ρ ≥ 1.4 (bigger), ρ ≤ 1 / 1.4 (smaller);  |Δ| ≤ 1.5;  |θ| ≤ 14°
    others   every other object: |Δ| ≤ 1.5, ρ in [.75, 1.33], |θ| ≤ 14°, same shape; no new colour, no stray colour

``strict`` is 1 where all of it holds and the named object keeps its shape, else 0. ``graded`` in [0, 1] is the mean of
how far the edit got (Δ, θ or log ρ over what is asked, between 0 and 1) and how much was kept
(``exp(-(excess over half the tolerance))``, the worst object). On 10,000 drawn edits
the strict verdict passes .9988, with noise .05 .9965, blurred (σ = .6) .993, with gains .85 to 1.15 a channel .9987;
of as many pictures left untouched it passes none. The idea of rewarding the measured displacement, turn or
scale is Talk2Move's (Tan et al. 2026, arXiv 2601.02356); the formulas are this project's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from flowalign.protocols import Card, Meta
from flowalign.rewards.base import Judge, field
from flowalign.rewards.blobs import COLOURS, SHAPES, measure, shape_of, turned

__all__ = ["EditFindings", "ShapesEdit", "parse"]

OPERATIONS = ("left", "right", "up", "down", "clockwise", "counterclockwise", "bigger", "smaller")
CATEGORIES = ("move", "turn", "resize")
PATTERN = re.compile(r"(move|turn|make) the (\w+) (\w+) (\w+)")
VERBS = {"move": OPERATIONS[:4], "turn": OPERATIONS[4:6], "make": OPERATIONS[6:]}
SHIFT, TURN, RATIO = 1.5, 14.0, 4 / 3  # what counts as untouched: pixels, degrees, ratio of areas
MOVE_LEAST, TURN_MOST, GROW_LEAST, MASS_LEAST = 4.0, 46.0, 1.4, 6.0


def parse(prompt: str) -> tuple[int, int, int]:
    """Return indices of operation, colour and shape of an instruction.

    Raises:
        ValueError: for words outside the grammar.
    """
    found = PATTERN.fullmatch(" ".join(prompt.lower().strip(" .").split()))
    if found is not None:
        verb, colour, shape, operation = found.groups()
        if operation in VERBS[verb] and colour in COLOURS and shape in SHAPES:
            return OPERATIONS.index(operation), list(COLOURS).index(colour), SHAPES.index(shape)
    raise ValueError(
        f"{prompt!r} is not an instruction of the edit world: write 'move the red circle left' (right, up, down), "
        "'turn the blue bar clockwise' (counterclockwise) or 'make the cyan square bigger' (smaller), with the colours "
        f"{', '.join(COLOURS)} and the shapes {', '.join(SHAPES)}."
    )


@dataclass(frozen=True)
class EditFindings:
    """What the judge saw, ``(B,)`` each.

    Attributes:
        operation: index into :data:`OPERATIONS`.
        done: how far the edit got, 1 = what was asked, unclamped above.
        achieved: whether the operation was carried out within its limits (bool).
        kept: whether the named object stayed what the words leave alone (bool).
        others: whether nothing else changed (bool).
        care: in [0, 1], how much was left untouched.
    """

    operation: Tensor
    done: Tensor
    achieved: Tensor
    kept: Tensor
    others: Tensor
    care: Tensor


@final
class ShapesEdit(Judge):
    """Judge of the edit world. ``meta[i]["image"]``: the source picture ``(3, H, W)`` in [0, 1].

    Args:
        measure: "strict" (0 or 1) or "graded" (in [0, 1]).
    """

    card = Card(
        name="shapes-edit",
        summary="1 if the named object was moved, turned or resized as told and all else stayed",
        reference="after Talk2Move, arXiv 2601.02356",
        text=16,
    )

    def __init__(self, measure: Literal["strict", "graded"] = "strict") -> None:
        super().__init__()
        if measure not in ("strict", "graded"):
            raise ValueError(f"measure must be 'strict' or 'graded'; got {measure!r}.")
        self.measure = measure

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Return ``(B,)`` scores of edited pictures ``(B, 3, H, W)``.

        Raises:
            ValueError: for a prompt outside the grammar, or a source of another size.
        """
        rows = [torch.as_tensor(x) for x in field(meta, "image", self.card.name, len(media))]
        wrong = [i for i, x in enumerate(rows) if tuple(x.shape) != tuple(media.shape[1:])]
        if wrong:
            raise ValueError(
                f"meta[{wrong[0]}]['image'] must be the source picture, {tuple(media.shape[1:])} in [0, 1]; got "
                f"{tuple(rows[wrong[0]].shape)}."
            )
        seen = self.findings(torch.stack(rows).to(media), media, prompts)
        if self.measure == "strict":
            return (seen.achieved & seen.kept & seen.others).float()
        return (seen.done.clamp(0, 1) + seen.care) / 2

    def findings(self, source: Tensor, edited: Tensor, prompts: Sequence[str]) -> EditFindings:
        """Return what was done and what was kept, from source and edited pictures ``(B, 3, H, W)``."""
        operation, colour, _ = torch.tensor([parse(p) for p in prompts], device=edited.device).unbind(1)
        before, after = measure(source), measure(edited)
        shape = shape_of(before)
        same = shape_of(after) == shape
        turn = turned(before, after, torch.where(same, shape, -1))
        dx, dy = after.x - before.x, after.y - before.y
        growth = (after.area.clamp_min(1e-3) / before.area.clamp_min(1e-3)).log()

        named = colour[:, None]
        there = before.area > MASS_LEAST
        others = there.scatter(1, named, value=False)
        change = _excess(dx, dy, growth, turn)
        calm = (change <= 1) & same
        appeared = (~there) & (after.area > MASS_LEAST)
        clean = ~appeared.any(1) & (after.stray <= MASS_LEAST)

        mine = {k: v.gather(1, named)[:, 0] for k, v in (("dx", dx), ("dy", dy), ("g", growth), ("t", turn))}
        done, achieved, rest = _operation(operation, **mine)
        here = there.gather(1, named)[:, 0] & (after.area.gather(1, named)[:, 0] > MASS_LEAST)
        kept = here & same.gather(1, named)[:, 0] & (rest <= 1)
        worst = torch.maximum(torch.where(others, change, 0.0).amax(1), rest)
        care = torch.exp(-(worst - 0.5).clamp_min(0)) * clean
        return EditFindings(operation, done * here, achieved, kept, (calm | ~others).all(1) & clean, care)


def _excess(dx: Tensor, dy: Tensor, growth: Tensor, turn: Tensor) -> Tensor:
    """Return the largest change in units of its tolerance; at most 1 counts as untouched."""
    parts = ((dx**2 + dy**2).sqrt() / SHIFT, growth.abs() / torch.tensor(RATIO).log(), turn.abs() / TURN)
    return torch.stack(parts).amax(0)


def _operation(operation: Tensor, dx: Tensor, dy: Tensor, g: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return progress, whether it is achieved, and the excess of what it should have left alone, ``(B,)`` each."""
    zero = torch.zeros_like(dx)
    along = torch.stack((-dx, dx, -dy, dy), 1)
    across = torch.stack((dy, dy, dx, dx), 1)
    pick = operation.clamp_max(3)[:, None]
    move, side = along.gather(1, pick)[:, 0], across.gather(1, pick)[:, 0]
    turn = torch.where(operation == 4, t, -t)
    grow = torch.where(operation == 6, g, -g)
    least = torch.tensor(GROW_LEAST, device=dx.device).log()
    kind = (operation > 3).long() + (operation > 5)
    options = {
        0: (move / MOVE_LEAST, move >= MOVE_LEAST, _excess(side, zero, g, t)),
        1: (turn / TURN, (turn >= TURN) & (turn <= TURN_MOST), _excess(dx, dy, g, zero)),
        2: (grow / least, grow >= least, _excess(dx, dy, zero, t)),
    }
    done, achieved, rest = (torch.stack([options[k][j] for k in range(3)], 1) for j in range(3))
    row = kind[:, None]
    return done.gather(1, row)[:, 0], achieved.gather(1, row)[:, 0], rest.gather(1, row)[:, 0]


def categories(prompts: Sequence[str]) -> list[str]:
    """Return "move", "turn" or "resize" for each instruction."""
    return [CATEGORIES[0 if (o := parse(p)[0]) < 4 else 1 if o < 6 else 2] for p in prompts]
