"""Rewards that can be hacked on the toy, and what they stand for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowalign.protocols import Card


class Bright:
    """The proxy: ever brighter is ever better. Not clamped, so there is always more to be had."""

    card = Card("proxy", "mean brightness")

    def __call__(self, media: Tensor, prompts: Any, meta: Any = None) -> Tensor:
        return media.mean((1, 2, 3))


class Pleasant:
    """The truth: bright, but not too bright: best at .62, where the base is at .5."""

    card = Card("pleasant", "brightness near .62", range=(-1.0, 0.0))

    def __call__(self, media: Tensor, prompts: Any, meta: Any = None) -> Tensor:
        return -((media.mean((1, 2, 3)) - 0.62) ** 2)


class Honest:
    """A truth that the proxy serves: it never falls while brightness rises."""

    card = Card("honest", "the square root of brightness")

    def __call__(self, media: Tensor, prompts: Any, meta: Any = None) -> Tensor:
        return media.mean((1, 2, 3)).clamp_min(0).sqrt()
