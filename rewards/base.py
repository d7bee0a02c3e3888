"""What every judge of this folder shares: checked inputs, float32 whatever autocast says, and operators.

A subclass sets ``card`` and writes :meth:`Judge.score`. A user's reward needs none of this: any object with ``card``
and ``__call__(media, prompts, meta)`` is a reward, and a plain function becomes one with
:func:`flowalign.rewards.function.reward`.

Bad input is refused before the network runs: prompts that are not one string per sample, ``meta`` of another length,
media outside its conventions. Scores that are NaN stop the run. A sample that cannot be judged (no quoted text, no
face, an answer that does not parse) raises :class:`Unjudged`, which names the samples and carries the others' scores;
it is never scored 0. Who wants a number for such samples says so: ``algebra.Substitute(reward, value)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowalign.protocols import Card, Meta, Modality, Reward, check_media, check_scores

if TYPE_CHECKING:
    from flowalign.rewards.algebra import Product, Weighted

__all__ = ["Judge", "Unjudged", "check_prompts", "field", "modality_of", "unique"]


class Unjudged(ValueError):
    """Some samples cannot be judged.

    Attributes:
        scores: ``(B,)`` scores, NaN where unjudged.
        reasons: index of each unjudged sample to the reason.
    """

    def __init__(self, name: str, scores: Tensor, reasons: dict[int, str]) -> None:
        self.scores, self.reasons = scores, reasons
        first = next(iter(reasons))
        super().__init__(
            f"reward {name!r} cannot judge {len(reasons)} of {len(scores)} samples; sample {first}: {reasons[first]}. "
            "Mend or drop such samples, leave them out of the lesson (algebra.Masked(reward) in Python, "
            f"{name}?unjudged=mask in a specification), or give them a value of your own (algebra.Substitute(reward, "
            f"value), {name}?unjudged=VALUE)."
        )


def check_prompts(prompts: Sequence[str], meta: Meta | None, count: int) -> None:
    """Refuse prompts or meta that do not pair one to one with ``count`` samples. Empty prompts are allowed.

    Raises:
        ValueError: naming the counts, or the first entry that is not a string.
    """
    if isinstance(prompts, str) or len(prompts) != count:
        got = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"wanted one prompt per sample ({count}); got {got}: pass a list with one string per sample.")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {i} must be a string; got {type(prompt).__name__} {prompt!r:.60}.")
    if meta is not None and len(meta) != count:
        raise ValueError(f"wanted one meta mapping per sample ({count}) or None; got {len(meta)}.")


def modality_of(media: Tensor, allowed: Sequence[Modality]) -> Modality:
    """Return which of the allowed modalities ``media`` is, by its number of dimensions; check it."""
    by_ndim: dict[int, Modality] = {4: "image", 5: "video", 3: "audio"}
    kind = by_ndim.get(media.ndim, allowed[0]) if isinstance(media, Tensor) else allowed[0]
    kind = kind if kind in allowed else allowed[0]
    check_media(media, kind)
    return kind


def unique(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct prompts in order of appearance and each prompt's index among them.

    Groups repeat one prompt many times; its text is then encoded once.
    """
    index = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    return list(index), [index[p] for p in prompts]


class Judge(nn.Module, ABC):
    """A reward with a network or without: frozen, in eval mode for good, computing outside any autocast.

    ``0.5 * a + b``, ``a - b``, ``a * b`` and ``-a`` are rewards again: :mod:`flowalign.rewards.algebra`.
    """

    card: Card

    def __init__(self) -> None:
        super().__init__()

    def train(self, mode: bool = True) -> Judge:
        """Stay in eval mode: a trainer that calls ``train()`` on everything must not switch dropout on in a judge."""
        return super().train(False)

    def freeze(self, device: torch.device | str | None = None) -> Judge:
        """Move to ``device``, take the weights out of the graph and switch to eval mode; subclasses end with it."""
        if device is not None:
            self.to(device)
        return self.requires_grad_(False).eval()

    def forward(self, media: Tensor, prompts: Sequence[str], meta: Meta | None = None) -> Tensor:
        """Return ``(B,)`` float32 scores, higher is better, on the device of ``media``.

        Raises:
            ValueError: inputs that do not pair or break the conventions; non-finite scores.
            Unjudged: samples that cannot be judged.
        """
        modality_of(media, self.card.modality)
        check_prompts(prompts, meta, len(media))
        with torch.autocast(media.device.type, enabled=False):
            scores = self.score(media, prompts, meta)
        return check_scores(scores, len(media), self.card.name)

    @abstractmethod
    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Score checked inputs; autocast is off."""

    def unjudged(self, scores: Tensor, reasons: dict[int, str]) -> None:
        """Raise :class:`Unjudged` if there is any reason to."""
        if reasons:
            raise Unjudged(self.card.name, scores, reasons)

    def __add__(self, other: Reward) -> Weighted:
        from flowalign.rewards.algebra import add

        return add(self, other) if isinstance(other, Reward) else NotImplemented

    def __radd__(self, other: Reward | int) -> Reward:
        from flowalign.rewards.algebra import add

        if isinstance(other, int | float) and other == 0:  # the start of sum([...])
            return self
        return add(other, self) if isinstance(other, Reward) else NotImplemented

    def __sub__(self, other: Reward) -> Weighted:
        from flowalign.rewards.algebra import add, scale

        return add(self, scale(other, -1.0)) if isinstance(other, Reward) else NotImplemented

    def __mul__(self, other: float | Reward) -> Weighted | Product:
        from flowalign.rewards.algebra import multiply, scale

        if isinstance(other, int | float):
            return scale(self, float(other))
        return multiply(self, other) if isinstance(other, Reward) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, other: float) -> Weighted:
        from flowalign.rewards.algebra import scale

        return scale(self, 1 / other) if isinstance(other, int | float) else NotImplemented

    def __neg__(self) -> Weighted:
        from flowalign.rewards.algebra import scale

        return scale(self, -1.0)


def field(meta: Meta | None, key: str, name: str, count: int) -> list[Any]:
    """Return ``meta[i][key]`` of every sample.

    Raises:
        ValueError: naming the reward, the key and the first sample that lacks it.
    """
    for i in range(count):
        if meta is None or key not in meta[i]:
            raise ValueError(f"reward {name!r} needs meta[i][{key!r}] for every sample; sample {i} has none.")
    assert meta is not None
    return [m[key] for m in meta]
