"""Spend less on a reward: in pieces that fit the memory, and never twice on the same content.

``MicroBatch`` scores at most ``size`` samples at a time. ``Cached`` remembers scores by content (the sample's bytes,
its prompt and its meta), so that a picture that comes back, as in searches, resumed runs and repeated evaluation, costs
a hash. Neither applies to rewards of a set, which have no score of one sample alone.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.protocols import Meta, Reward
from flowalign.rewards.composite import Composite, Memo, once

__all__ = ["Cached", "MicroBatch", "content_key"]


def _single(member: Reward, what: str) -> None:
    if not member.card.batch:
        raise ValueError(f"{member.card.name!r} is a reward of a set of samples: {what} would change its value.")


class MicroBatch(Composite):
    """``member`` on at most ``size`` samples at a time; gradients flow as before."""

    def __init__(self, member: Reward, size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1; got {size}.")
        _single(member, "splitting the batch")
        super().__init__([member], member.card.name, member.card.range)
        self.size = size

    def evaluate(self, media: Tensor, prompts: Sequence[str], meta: Meta | None, memo: Memo) -> Tensor:
        """Score piece by piece."""
        pieces = []
        for i in range(0, len(media), self.size):
            part = slice(i, i + self.size)
            pieces.append(once(self.members[0], media[part], prompts[part], None if meta is None else meta[part], {}))
        return self.combine([torch.cat(pieces)])

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the member's scores."""
        return scores[0]


def content_key(sample: Tensor, prompt: str, meta: Mapping[str, Any] | None) -> bytes:
    """Return a digest of one sample, its prompt and its meta.

    Raises:
        TypeError: meta holds something whose content cannot be read (only tensors, numbers, strings, None, and lists
            and mappings of these can).
    """
    digest = hashlib.blake2b(digest_size=20)
    _feed(digest, sample)
    _feed(digest, prompt)
    _feed(digest, meta)
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    """Hash a value with its type and length before it, so that no two values run into one another."""
    if isinstance(value, Tensor):
        digest.update(f"t{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, str | bytes):
        raw = value if isinstance(value, bytes) else value.encode()
        digest.update(f"{type(value).__name__}{len(raw)}:".encode() + raw)
    elif value is None or isinstance(value, bool | int | float):
        digest.update(f"n{type(value).__name__}{value!r};".encode())
    elif isinstance(value, Mapping):
        digest.update(f"m{len(value)}".encode())
        for key in sorted(value, key=str):
            _feed(digest, str(key))
            _feed(digest, value[key])
    elif isinstance(value, Sequence):
        digest.update(f"s{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        raise TypeError(f"cannot cache by content: meta holds a {type(value).__name__}, whose content is unknown.")


class Cached(Composite):
    """``member`` with a memory of ``size`` scores, the least recently used forgotten first.

    Media that require gradients go to the member directly: a remembered number has no gradient.

    Attributes:
        hits: samples answered from memory.
        misses: samples computed.
    """

    def __init__(self, member: Reward, size: int = 100_000) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1; got {size}.")
        _single(member, "caching")
        super().__init__([member], member.card.name, member.card.range)
        if self.learners():
            raise ValueError(
                f"{member.card.name!r} changes while it is trained against: remembered scores would be those of an "
                "earlier reward. Cache its members instead."
            )
        self.size, self.hits, self.misses = size, 0, 0
        self.memory: OrderedDict[bytes, float] = OrderedDict()

    def evaluate(self, media: Tensor, prompts: Sequence[str], meta: Meta | None, memo: Memo) -> Tensor:
        """Look up every sample; score the rest in one batch, equal ones once."""
        if media.requires_grad and torch.is_grad_enabled():
            return super().evaluate(media, prompts, meta, memo)
        keys = [
            content_key(x, p, meta[i] if meta is not None else None)
            for i, (x, p) in enumerate(zip(media, prompts, strict=True))
        ]
        found = {k: self.memory[k] for k in keys if k in self.memory}
        fresh = {k: i for i, k in reversed(list(enumerate(keys))) if k not in found}
        rows = list(fresh.values())
        if rows:
            part = media[torch.tensor(rows, device=media.device)]
            scores = once(
                self.members[0], part, [prompts[i] for i in rows], None if meta is None else [meta[i] for i in rows], {}
            )
            found.update(zip(fresh, scores.tolist(), strict=True))
        self.misses, self.hits = self.misses + len(rows), self.hits + len(keys) - len(rows)
        for key in keys:
            self.memory[key] = found[key]
            self.memory.move_to_end(key)
        while len(self.memory) > self.size:
            self.memory.popitem(last=False)
        return self.combine([torch.tensor([found[k] for k in keys], device=media.device)])

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the member's scores."""
        return scores[0]
