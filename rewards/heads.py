"""Small trainable networks on a frozen backbone's tokens.

``Pooled`` averages the last layer's tokens; ``QueryAttention`` is SoliReward's hierarchical progressive query
attention: a query reads one tapped layer after another, each with its own attention, and what it has gathered so far
is its question to the next, from shallow detail to deep meaning:

    q_l = norm(q_{l−1} + e_l + attend_l(q_{l−1} + e_l, tokens_l)),   score = W₂ silu(W₁ q_L)

Both take an optional time, for judges of half-denoised pictures (:class:`~flowalign.rewards.training.Trained` with
``noise_aware``). Reference: SoliReward (2512.22170), whose code gives the queries, attention and head; that a layer's
answer is the next one's question is our reading of "progressive".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Head", "Pooled", "QueryAttention", "time_features"]


def time_features(t: Float[Tensor, "b"], width: int = 32) -> Float[Tensor, "b w"]:
    """Return sines and cosines of times in [0, 1], at half a cycle to 32 cycles."""
    frequency = 2.0 ** torch.linspace(0, 6, width // 2, device=t.device) * math.pi
    angle = t.float().unsqueeze(-1) * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


class Head(nn.Module, ABC):
    """Tokens of tapped layers, each ``(B, N, D)``, and perhaps times ``(B,)``, to scores ``(B,)``."""

    @abstractmethod
    def forward(self, layers: Sequence[Float[Tensor, "b n d"]], time: Tensor | None = None) -> Float[Tensor, "b"]:
        """Score."""


class Pooled(Head):
    """The mean token of the last layer through one hidden layer (``hidden=0``: an affine map)."""

    def __init__(self, width: int, hidden: int = 128, timed: bool = False) -> None:
        super().__init__()
        self.time = nn.Linear(32, width) if timed else None
        self.norm = nn.LayerNorm(width)
        self.out = (
            nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1)) if hidden else nn.Linear(width, 1)
        )

    def forward(self, layers: Sequence[Tensor], time: Tensor | None = None) -> Tensor:
        """Score the mean token."""
        x = self.norm(layers[-1].mean(1))
        if self.time is not None and time is not None:
            x = x + self.time(time_features(time))
        return self.out(x).squeeze(-1)


class QueryAttention(Head):
    """Hierarchical progressive query attention.

    Args:
        width: D of the tokens.
        layers: how many layers are tapped.
        heads: of the attention.
        hidden: of the final two-layer SiLU network.
        timed: whether a time is read.
    """

    def __init__(self, width: int, layers: int, heads: int = 4, hidden: int = 128, timed: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads ({heads}) must divide the width of the tokens ({width}).")
        self.queries = nn.Parameter(torch.randn(layers, width) * 0.02)
        self.inputs = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.time = nn.Linear(32, width) if timed else None
        self.out = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, layers: Sequence[Tensor], time: Tensor | None = None) -> Tensor:
        """Read the layers in turn and score what was gathered."""
        if len(layers) != len(self.queries):
            raise ValueError(f"this head reads {len(self.queries)} layers; got {len(layers)}.")
        q = layers[0].new_zeros(len(layers[0]), 1, layers[0].shape[-1])
        if self.time is not None and time is not None:
            q = q + self.time(time_features(time)).unsqueeze(1)
        parts = zip(self.queries, self.inputs, self.attention, self.norms, layers, strict=True)
        for query, before, attend, norm, tokens in parts:
            q = q + query
            keys = before(tokens)
            q = norm(q + attend(q, keys, keys, need_weights=False)[0])
        return self.out(q.squeeze(1)).squeeze(-1)
