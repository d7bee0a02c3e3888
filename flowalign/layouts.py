"""Names of arrangements: what the entropy of layouts is taken over. Judges and worlds meet here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["shapes"]


def shapes(media: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return which cells of the 3×3 grid hold an object, ``(B,)`` integers of nine bits.

    Args:
        media: pictures of the shapes worlds ``(B, 3, H, W)``.
        prompts: not looked at.
    """
    from flowalign.pipelines.worlds.diversity import cells
    from flowalign.rewards.objects import find_objects

    found = find_objects(media)
    return cells(found.centre, found.row, len(media))
