"""The nodes of one level of a genealogy: states, whose children they are, what they weigh, what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowalign.gaussian import Gaussian
from flowalign.process import Posterior, Time

__all__ = ["Nodes", "pick", "ranks", "row_lse"]


def pick(tree: Any, index: Tensor) -> Any:
    """Index every tensor in a nested tuple along its first dimension; anything else passes through."""
    if isinstance(tree, Tensor):
        return tree[index.to(tree.device)]
    if isinstance(tree, tuple | list):
        return type(tree)(pick(t, index) for t in tree)
    return tree


def ranks(row: Tensor) -> Tensor:
    """Return for each node its number among the nodes of its row, ``(N,)``."""
    order = torch.argsort(row, stable=True)
    counts = torch.bincount(row)
    first = torch.cumsum(counts, 0) - counts
    out = torch.empty_like(row)
    out[order] = torch.arange(len(row)) - first[row[order]]
    return out


def row_lse(log_w: Tensor, row: Tensor, n_rows: int) -> Tensor:
    """Return ``log Σ exp`` of the log-weights of each row, ``(n_rows,)``; -inf for a row without weight."""
    row = row.to(log_w.device)
    top = log_w.new_full((n_rows,), -torch.inf).scatter_reduce(0, row, log_w.detach(), "amax")
    base = torch.where(torch.isfinite(top), top, 0.0)
    total = log_w.new_zeros(n_rows).index_add(0, row, (log_w - base[row]).exp())
    return total.log() + base


@dataclass(frozen=True)
class Nodes:
    """The nodes of one level. Bookkeeping (``row, parent, origin``) lives on the CPU, so that no step synchronises.

    Attributes:
        x: states ``(N, *)``.
        row: which row of the condition each node belongs to, ``(N,)``.
        parent: index into the level before in the same trajectory; -1 where the node entered here.
        origin: for a node that entered: index into the level before of the trajectory it grew from; -1 for none.
        log_prob: log-density of the step that led here under the unguided kernel, ``(N,)``; 0 at entries.
        log_w: log importance weight carried since the last resampling, ``(N,)``.
        posterior: what the network says here; None until evaluated.
        value: what a ``Value`` says here, ``(N,)``.
        gradient: what a ``Guide`` says here, ``(N, *)``.
        step: the unguided law of the next step; kept, so that expanding a node again is free.
        carry: memory of the kernel.
        trace: memory of the potential along the lineage.
    """

    x: Tensor
    row: Tensor
    parent: Tensor
    origin: Tensor
    log_prob: Tensor
    log_w: Tensor
    posterior: Posterior | None = None
    value: Tensor | None = None
    gradient: Tensor | None = None
    step: Gaussian | None = None
    carry: Any = None
    trace: Any = None

    @classmethod
    def enter(cls, x: Tensor, row: Tensor | None = None, origin: Tensor | None = None) -> Nodes:
        """Make fresh nodes of states ``(N, *)``; row i for state i by default."""
        n = len(x)
        none = torch.full((n,), -1)
        zero = x.new_zeros(n, dtype=torch.promote_types(x.dtype, torch.float32)).detach()
        rows = torch.arange(n) if row is None else row.cpu()
        return cls(x, rows, none, none if origin is None else origin.cpu(), zero, zero)

    def __len__(self) -> int:
        """Return the number of nodes."""
        return len(self.row)

    def __getitem__(self, index: Tensor) -> Nodes:
        """Select nodes with everything that is known of them (posterior, step, memory)."""

        def take(v: Any) -> Any:
            return v[index] if isinstance(v, Posterior | Gaussian) else pick(v, index)

        return Nodes(**{k: take(v) for k, v in vars(self).items()})

    def join(self, other: Nodes) -> Nodes:
        """Return both sets of nodes as one, ``self`` first; what only one side knows is dropped.

        The kernel's memory is not: it is what the other nodes' next step depends on. Nodes without one get NaN, which
        a kernel takes for "no memory".
        """

        def cat(a: Any, b: Any) -> Any:
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                return torch.cat([a, b])
            if isinstance(a, tuple) and isinstance(b, tuple):
                return tuple(cat(p, q) for p, q in zip(a, b, strict=True))
            if isinstance(a, Gaussian) and isinstance(b, Gaussian):
                return Gaussian(cat(a.mean, b.mean), cat(_full_std(a), _full_std(b)))
            if isinstance(a, Posterior) and isinstance(b, Posterior):
                return Posterior(
                    cat(a.x0, b.x0), cat(a.eps, b.eps), a.process, _join_times(a, b), cat(a.v, b.v),
                    cat(a.output, b.output),
                )  # fmt: skip
            return None

        fields = {k: cat(v, getattr(other, k)) for k, v in vars(self).items()}
        if (self.carry is None) != (other.carry is None):
            mine = _forgotten(other.carry, len(self)) if self.carry is None else self.carry
            fields["carry"] = cat(mine, _forgotten(self.carry, len(other)) if other.carry is None else other.carry)
        return Nodes(**fields)

    def bare(self) -> Nodes:
        """Return the nodes without what the network said: for storage."""
        return replace(self, posterior=None, gradient=None, step=None, carry=None)


def _join_times(a: Posterior, b: Posterior) -> Time:
    if not (isinstance(a.t, Tensor) and a.t.ndim) and not (isinstance(b.t, Tensor) and b.t.ndim) and a.t == b.t:
        return a.t
    return torch.cat([torch.as_tensor(p.t, dtype=torch.float64).expand(len(p.x0)) for p in (a, b)])


def _forgotten(carry: Any, n: int) -> Any:
    """Return a memory of n nodes that have none, in the shape of another's."""
    if isinstance(carry, Tensor):
        return carry.new_full((n, *carry.shape[1:]), torch.nan)
    return tuple(_forgotten(c, n) for c in carry)


def _full_std(g: Gaussian) -> Tensor:
    return g.std.expand(len(g.mean), *[1] * (g.mean.ndim - 1)) if g.std.ndim < g.mean.ndim else g.std
