"""What is learnt of a pipeline by trying it: the way in, the layout of its states, which networks its loop runs.

One real iteration is recorded; everything else is asked of iterations whose networks are replayed with zeros, so that
learning costs one network evaluation. ``step`` must receive exactly the x that was put in: that is the whole criterion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowalign.pipelines.session import Session, StepCall, Visit
from flowalign.pipelines.tap import Tap

__all__ = ["Plan", "learn"]


@dataclass(frozen=True)
class Plan:
    """How one kind of call is driven.

    Attributes:
        way: ``P`` replaces the result of ``prepare_latents``; ``S`` lets ``step`` return x; ``PS`` is P at the start of
            the grid and S after it, where what is computed from the starting latents must stay theirs.
        shapes: of what ``step`` receives, per scheduler, with the batch in front if ``batched``.
        dtypes: the precision each of them has in the pipeline's own loop.
        blocks: 2 where the loop's variable is the doubled guidance batch (DiT).
        batched: whether the first dimension runs along the batch; otherwise one call per row.
        steps: ``step`` calls per iteration.
        captures: those that count.
        networks: names and output shapes of one iteration, to be replayed.
        settle: whether the pipeline changes its latents after a step.
        warm: whether iteration 0 must come first: with replayed networks (variables bound there) or really
            (key-value caches); set by the self-test.
        extra: further arguments of ``step`` (``eta``, ...).
        echoed: further arguments of ``step`` that are the model output once more.
        looks_ahead: whether ``step`` is also given the next timestep (UnCLIP).
        outputs: shape of a raw model output.
        stamp_dims: dimensions of the timestep that the pipeline hands to ``step``.
    """

    way: Literal["P", "S", "PS"]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    blocks: int
    batched: bool
    steps: int
    captures: tuple[int, ...]
    networks: tuple[tuple[str, Any], ...]
    settle: bool
    extra: Mapping[str, Any]
    stamp_dims: int = 0
    echoed: tuple[str, ...] = ()
    looks_ahead: bool = False
    outputs: tuple[int, ...] = ()
    warm: Literal["", "dummy", "real"] = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one sample's state; several parts are one flat vector."""
        if len(self.shapes) == 1:
            return self._row(self.shapes[0])
        return (sum(_count(self._row(s)) for s in self.shapes),)

    def _row(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[1:] if self.batched or shape[:1] == (1,) else shape

    def unpack(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what ``step`` is to see, one tensor per scheduler, of states ``(B, *shape)``."""
        if len(self.shapes) > 1:
            sizes = [_count(self._row(s)) for s in self.shapes]
            parts = [p.reshape(len(x), *self._row(s)) for p, s in zip(x.split(sizes, 1), self.shapes, strict=True)]
        else:
            parts = [x]
        if not self.batched:
            return tuple(p.reshape(s) for p, s in zip(parts, self.shapes, strict=True))
        return tuple(torch.cat([p] * self.blocks) if self.blocks > 1 else p for p in parts)

    def pack(self, parts: Sequence[Tensor], batch: int) -> Tensor:
        """Return ``(B, *shape)`` of what came back: the inverse of :meth:`unpack`.

        Learned variances ride along as further channels (DeepFloyd, DiT, Kandinsky 2): the mean comes first.
        """
        rows = []
        for part, shape in zip(parts, self.shapes, strict=True):
            if len(shape) > 1 and part.ndim == len(shape) and part.shape[1] == 2 * shape[1]:
                part = part[:, : shape[1]]
            rows.append(part[:batch] if self.batched else part.reshape(1, *self._row(shape)))
        return rows[0] if len(rows) == 1 else torch.cat([r.reshape(batch, -1) for r in rows], 1)

    def session(self, batch: int, **settings: Any) -> Session:
        """Return a session with this plan's step count and replay."""
        return Session(
            steps_per_visit=self.steps, captures=self.captures, replay=self.networks, replay_batch=1, batch=batch,
            **settings,
        )  # fmt: skip


def learn(tap: Tap, arguments: Mapping[str, Any]) -> Plan:
    """Try one row and return how to drive this kind of call.

    Raises:
        ValueError: if the pipeline never calls ``scheduler.step``, or lets no x in.
    """
    name = type(tap.pipe).__name__
    probe = Session(visits=None, limit=1, record=True, batch=1)
    with torch.no_grad():
        tap.call(arguments, probe)
    if not probe.calls:
        raise ValueError(
            f"{name} was run, but its loop never called scheduler.step, so there is nothing to tap. Pipelines that "
            "step copies of their scheduler or nest other pipelines are not supported: see `flowalign pipelines`."
        )
    steps = len(probe.calls)
    last = {call.scheduler: i for i, call in enumerate(probe.calls)}
    captures = tuple(sorted(last.values()))
    seen = [probe.calls[i] for i in captures]
    plan = Plan(
        way="S",
        shapes=tuple(tuple(c.sample.shape) for c in seen),
        dtypes=tuple(c.sample.dtype for c in seen),
        blocks=_blocks(seen),
        batched=all(c.sample.shape[0] == _blocks(seen) for c in seen),
        steps=steps,
        captures=captures,
        networks=tuple((n, _shadow(out)) for n, out in probe.networks),
        settle=False,
        extra={k: v for k, v in seen[0].extra.items() if _plain(v)},
        looks_ahead="prev_timestep" in seen[0].extra,
        outputs=tuple(seen[0].output.shape),
        echoed=tuple(k for k, v in seen[0].extra.items() if isinstance(v, Tensor) and v is seen[0].output),
        stamp_dims=seen[0].timestep.ndim if isinstance(seen[0].timestep, Tensor) else 0,
    )
    with torch.no_grad():
        return _way_in(tap, arguments, plan, probe)


def _way_in(tap: Tap, arguments: Mapping[str, Any], plan: Plan, probe: Session) -> Plan:
    device = probe.calls[0].sample.device
    mark = tuple(torch.randn(s).to(device, d) for s, d in zip(plan.shapes, plan.dtypes, strict=True))
    if plan.blocks > 1:
        mark = tuple(torch.cat([m[: len(m) // plan.blocks]] * plan.blocks) for m in mark)
    x = None
    if len(mark) == 1 and probe.prepared_shape == mark[0].shape:
        session = plan.session(1, x=mark[0], visits=[Visit(0, real=False)])
        tap.call(arguments, session)
        if session.captured and _equal(session.captured[0].sample, mark[0]):
            x = mark[0]
    plan = replace(plan, way="S" if x is None else "P", settle=_settles(tap, arguments, plan, mark, x))
    try:  # does a later iteration need what the first one has bound?
        tap.call(arguments, plan.session(1, x=x, visits=[Visit(1, put=mark, real=False), Visit(1, real=False)]))
    except UnboundLocalError:
        plan = replace(plan, warm="dummy")
    return plan


def _settles(tap: Tap, arguments: Mapping[str, Any], plan: Plan, mark: tuple[Tensor, ...], x: Tensor | None) -> bool:
    """Return whether code after the step changes what it returned; the grid must have two entries for it to show."""
    session = plan.session(1, x=x, visits=[Visit(0, put=mark, real=False), Visit(1, real=False)])
    tap.call(arguments, session)
    if len(session.captured) != len(mark):
        raise ValueError(f"{type(tap.pipe).__name__} ended its loop before a second step; ask for at least two steps.")
    return not all(_equal(c.sample, m) for c, m in zip(session.captured, mark, strict=True))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(a))


def _blocks(calls: Sequence[StepCall]) -> int:
    sample = calls[0].sample
    return 2 if sample.shape[0] == 2 and torch.equal(sample[0], sample[1]) else 1


def _shadow(tree: Any) -> Any:
    """Return a structure with the shapes of a network's outputs and none of their storage."""
    if isinstance(tree, Tensor):
        return tree.detach().new_zeros(()).expand(tree.shape)
    if type(tree) is tuple:
        return tuple(_shadow(t) for t in tree)
    if isinstance(tree, list):
        return [_shadow(t) for t in tree]
    if isinstance(tree, Mapping):
        fields = {k: _shadow(v) for k, v in tree.items()}
        return fields if type(tree) is dict else type(tree)(**fields)
    return tree


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | bool | str)


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
