"""A policy is a generator in one of several roles: ``current``, ``reference``, ``old``, ``ema``.

The roles share one network. A role that differs by a few weights (LoRA, or the whole transformer when that is trained)
swaps them in for the length of a call and back again before any backward pass; the reference of a LoRA run is the
adapter switched off. Networks are evaluated here and nowhere else, so the ledger counts here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from flowalign.gaussian import work_dtype
from flowalign.ledger import Ledger
from flowalign.process import Posterior, Process, Time

__all__ = ["Context", "Denoiser", "Policy", "Role", "Switch", "Weights"]

Context = Callable[[], AbstractContextManager[Any]]


@runtime_checkable
class Denoiser(Protocol):
    """The part of a pipeline that a policy needs; closed-form worlds implement just this."""

    @property
    def process(self) -> Process:
        """The noising process."""
        ...

    def posterior(self, x: Tensor, t: Time, cond: Any) -> Posterior:
        """Return what is known at ``x``."""
        ...


class Role(ABC):
    """Another set of weights under the same network."""

    @abstractmethod
    def use(self) -> AbstractContextManager[None]:
        """Return a context in which the network plays this role."""


class Switch(Role):
    """A role that is the network inside some context, e.g. with its adapter disabled."""

    def __init__(self, context: Context) -> None:
        self.context = context

    @contextmanager
    def use(self) -> Iterator[None]:
        """Enter the context."""
        with self.context():
            yield


class Weights(Role):
    """A copy of the trained weights, frozen or following them: ``w ← w + (1 - decay)(current - w)``.

    Args:
        parameters: the trained parameters, which the copy is taken from and swapped into.
        decay: update number (from 1) → decay; None for a frozen copy. Decay 0 copies, 1 keeps.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: Callable[[int], float] | None = None) -> None:
        self.parameters = list(parameters)
        self.copies = [p.detach().clone() for p in self.parameters]
        self.decay = decay
        self.updates = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """Swap the copy in, and the current weights back whatever happens."""
        current = [p.data for p in self.parameters]
        try:
            for p, c in zip(self.parameters, self.copies, strict=True):
                p.data = c
            torch.clear_autocast_cache()  # autocast remembers the bf16 copies of the weights that were just swapped
            yield
        finally:
            for p, c in zip(self.parameters, current, strict=True):
                p.data = c
            torch.clear_autocast_cache()

    @torch.no_grad()
    def update(self) -> None:
        """Follow the current weights by one step (a frozen copy stays)."""
        if self.decay is None:
            return
        self.updates += 1
        for c, p in zip(self.copies, self.parameters, strict=True):
            c.lerp_(p.detach().to(c), 1.0 - self.decay(self.updates))

    def state_dict(self) -> dict[str, Any]:
        """Return the copies and the number of updates."""
        return {"copies": [c.clone() for c in self.copies], "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the copies and the number of updates."""
        for c, saved in zip(self.copies, state["copies"], strict=True):
            c.copy_(saved)
        self.updates = int(state["updates"])


class Policy:
    """A denoiser with roles and a ledger.

    Args:
        denoiser: what is evaluated.
        roles: role name → how to play it; ``current`` is always there.
        ledger: what the evaluations are booked on.
        chunk: samples per forward pass where memory is short; None for all at once.
        context: entered around every forward pass, in rollout and update alike (autocast, attention backend).
        frozen: entered instead where a role other than ``current`` is played, which needs no graph and whose densities
            nobody compares (a quicker attention kernel); ``context`` when None.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        roles: Mapping[str, Role] | None = None,
        ledger: Ledger | None = None,
        chunk: int | None = None,
        context: Context = nullcontext,
        frozen: Context | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.roles = dict(roles or {})
        self.ledger = ledger if ledger is not None else Ledger()
        self.chunk = chunk
        self.context = context
        self.frozen = frozen or context

    @property
    def process(self) -> Process:
        """The noising process."""
        return self.denoiser.process

    @contextmanager
    def playing(self, role: str) -> Iterator[None]:
        """Play a role for a block in which gradients may flow.

        Any backward pass must end inside: the weights that the graph refers to are swapped back on leaving.

        Raises:
            KeyError: for an unknown role.
        """
        if role == "current":
            yield
            return
        if role not in self.roles:
            raise KeyError(f"this policy has no role {role!r}; it has current, {', '.join(self.roles) or 'no other'}.")
        with self.roles[role].use():
            yield

    def posterior(
        self, x: Tensor, t: Time, cond: Any = None, role: str = "current", *, checkpoint: bool = False
    ) -> Posterior:
        """Evaluate the network in a role; any role but ``current`` without a graph.

        Args:
            x: states ``(B, *)``.
            t: one time or ``(B,)`` times.
            cond: the condition of each sample, or None.
            role: whose weights.
            checkpoint: recompute the forward pass in the backward pass instead of keeping its activations. Time and
                state are arguments of the recomputed function, never captured, and no noise is drawn inside.

        Raises:
            KeyError: for an unknown role.
        """
        self.ledger.evaluations += len(x)
        if role == "current":
            return self._run(x, t, cond, checkpoint, self.context)
        with self.playing(role), torch.no_grad():
            return self._run(x, t, cond, False, self.frozen)

    def _run(self, x: Tensor, t: Time, cond: Any, checkpoint: bool, context: Context) -> Posterior:
        step = self.chunk or max(len(x), 1)
        if len(x) <= step:
            return self._call(x, t, cond, checkpoint, context)
        parts = []
        for i in range(0, len(x), step):
            index = torch.arange(i, min(i + step, len(x)))
            tt = t[index.to(t.device)] if isinstance(t, Tensor) and t.ndim else t
            part = None if cond is None else cond[index]
            parts.append(self._call(x[index.to(x.device)], tt, part, checkpoint, context))
        return _join(parts, t)

    def _call(self, x: Tensor, t: Time, cond: Any, checkpoint: bool, context: Context) -> Posterior:
        if not (checkpoint and torch.is_grad_enabled()):
            with context():
                return self.denoiser.posterior(x, t, cond)
        kept: dict[str, Any] = {}

        def forward(x: Tensor, t: Time) -> tuple[Tensor, ...]:
            with context():
                p = self.denoiser.posterior(x, t, cond)
            kept["has"] = (p.v is not None, p.output is not None)
            return tuple(z for z in (p.x0, p.eps, p.v, p.output) if z is not None)

        out = list(run_checkpointed(forward, x, t, use_reentrant=False))
        x0, eps = out.pop(0), out.pop(0)
        v, output = (out.pop(0) if has else None for has in kept["has"])
        return Posterior(x0, eps, self.process, t, v, output)


def _join(parts: list[Posterior], t: Time) -> Posterior:
    def cat(items: list[Tensor | None]) -> Tensor | None:
        return None if items[0] is None else torch.cat([i for i in items if i is not None])

    x0, eps = cat([p.x0 for p in parts]), cat([p.eps for p in parts])
    assert x0 is not None and eps is not None
    return Posterior(x0, eps, parts[0].process, t, cat([p.v for p in parts]), cat([p.output for p in parts]))


def final_posterior(x: Tensor, process: Process) -> Posterior:
    """Return the posterior at data time, where the sample itself is what is known: ``x0 = x``."""
    x = x.to(work_dtype(x))
    return Posterior(x, torch.zeros_like(x), process, 0.0)
