"""A reward of one's own in five lines: a plain function with a name.

    @reward("red", differentiable=True)
    def red(media, prompts, meta):
        # the first line of a docstring would become the card's summary
        return media[:, 0].mean((-1, -2)) - media[:, 1:].mean((-1, -2, -3))

It is then a reward like any other: inputs and scores are checked, operators work, and the command line takes it as
``my_module:red``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from flowalign.protocols import Card, Meta, Modality
from flowalign.rewards.base import Judge

__all__ = ["Function", "reward"]


class Function(Judge):
    """A plain function as a reward; see :func:`reward`."""

    def __init__(self, function: Callable[[Tensor, Sequence[str], Meta | None], Tensor], card: Card) -> None:
        super().__init__()
        self.function, self.card = function, card

    def score(self, media: Tensor, prompts: Sequence[str], meta: Meta | None) -> Tensor:
        """Call the function."""
        return self.function(media, prompts, meta)


def reward(
    name: str,
    *,
    modality: tuple[Modality, ...] = ("image",),
    differentiable: bool = False,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Callable[[Tensor, Sequence[str], Meta | None], Tensor]], Function]:
    """Make a reward of a function ``(media, prompts, meta) -> (B,)``.

    Example:
        >>> @reward("red", differentiable=True)
        ... def red(media, prompts, meta):
        ...     return media[:, 0].mean((-1, -2)) - media[:, 1:].mean((-1, -2, -3))
    """

    def wrap(function: Callable[[Tensor, Sequence[str], Meta | None], Tensor]) -> Function:
        summary = (function.__doc__ or name).strip().splitlines()[0]
        return Function(function, Card(name, summary, modality, differentiable, bounds))

    return wrap
