"""A gradient checkpoint that notices when the second run is not the first one again.

torch recomputes a function in the backward pass and trusts that it does the same. One that remembers something (a
decoder that counts its frames, a reward that draws other frames each time) raises in the middle of a backward pass, or,
worse, gives the gradient of something else without a word. Here the second result is held against the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

__all__ = ["checkpointed"]

T = TypeVar("T", bound=Tensor | tuple[Tensor, ...])
KEPT = 64  # numbers of each sample that are compared


def _mark(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Return a few numbers of each sample of a result."""
    parts = [out] if isinstance(out, Tensor) else list(out)
    rows = [p.detach().reshape(len(p), -1) for p in parts]
    return [r[:, :: max(1, -(-r.shape[1] // KEPT))].clone() for r in rows]


def checkpointed(function: Callable[[Tensor], T], x: Tensor, what: str) -> T:
    """Return ``function(x)``; its activations are recomputed in the backward pass, and so is its result.

    Args:
        function: of one tensor, without randomness of its own that torch does not keep.
        x: what it is applied to.
        what: how an error calls it.

    Raises:
        RuntimeError: in the backward pass, if the second run fails where the first did not, or ends up elsewhere.
    """
    first: list[Tensor] = []

    def forward(x: Tensor) -> T:
        try:
            out = function(x)
        except Exception as problem:
            if not first:
                raise
            why = f"the second run raised {type(problem).__name__}: {problem}"
            raise RuntimeError(_refusal(what, why)) from problem
        mark = _mark(out)
        if not first:
            first.extend(mark)
            return out
        slack = 0.0 if x.device.type == "cpu" else 1e-3  # elsewhere the same kernels may add in another order
        if not all(torch.allclose(a, b, rtol=slack, atol=slack) for a, b in zip(first, mark, strict=True)):
            worst = max(float((a.float() - b.float()).abs().max()) for a, b in zip(first, mark, strict=True))
            raise RuntimeError(_refusal(what, f"the second run ended up {worst:.3g} away from the first"))
        return out

    with set_checkpoint_early_stop(False):  # torch would stop before the result is there to be compared
        out: T = checkpoint(forward, x, use_reentrant=False)
    return out


def _refusal(what: str, why: str) -> str:
    return (
        f"{what} cannot be checkpointed: {why}, so it remembers something from one run to the next and its gradient "
        "would be wrong. Switch its recomputation off, and decode and judge fewer samples at a time if memory is short."
    )
