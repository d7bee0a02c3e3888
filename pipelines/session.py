"""What one controlled call of a pipeline is to do, and what came of it.

A :class:`Session` is filled in by the caller, carried out by :class:`~flowalign.pipelines.run.Run`, and read after.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Halt", "Session", "StepCall", "Visit", "bind"]


class Halt(BaseException):
    """Leaves the pipeline's call; not an ``Exception``, so that no pipeline catches it."""


@dataclass(frozen=True)
class Visit:
    """One pass through the loop.

    Attributes:
        index: into the grid that the loop iterates.
        put: what ``step`` is to return, one tensor per scheduler; None to capture its arguments.
        real: whether networks run; otherwise their recorded shapes are replayed with zeros.
        time: ``(B,)`` timesteps in place of the grid's own.
    """

    index: int
    put: tuple[Tensor, ...] | None = None
    real: bool = True
    time: Tensor | None = None


@dataclass(frozen=True)
class StepCall:
    """What the pipeline handed to ``scheduler.step``, and which scheduler object it was."""

    scheduler: int
    output: Tensor
    timestep: Any
    sample: Tensor
    extra: Mapping[str, Any]


@dataclass
class Session:
    """What one call is to do, and what came of it. Lives for one call.

    Attributes:
        visits: the walk; None lets the loop and the real ``step`` run as they are and only records.
        x: what to replace the result of ``prepare_latents`` by (way P).
        steps_per_visit: how many ``step`` calls an iteration makes.
        captures: which of them count (the last of each scheduler object).
        limit: with ``visits=None``: leave before this iteration.
        edit: replace grid entry ``index`` by ``(timestep, sigma)``: a time off the grid.
        replay: shapes of the networks' outputs, per call within an iteration, for visits that are not real.
        record: remember the networks' outputs in :attr:`networks`.
        noise: fill the draws of ``prepare_latents`` with this constant.
        module_memo: remember ``vae.encode`` and encoders called outside ``encode_prompt`` too.
    """

    visits: Sequence[Visit] | None = ()
    x: Tensor | None = None
    steps_per_visit: int = 1
    captures: tuple[int, ...] = (0,)
    limit: int | None = None
    edit: tuple[int, float, float] | None = None
    replay: Sequence[Any] | None = None
    replay_batch: int = 1
    record: bool = False
    noise: float | None = None
    module_memo: bool = True
    stop_at_entry: bool = False
    batch: int = 1
    # results
    placed: bool = False
    track: Tensor | None = None
    offset: int = 0
    scheduler: Any = None
    prepared_shape: torch.Size | None = None
    calls: list[StepCall] = field(default_factory=list)
    networks: list[tuple[str, Any]] = field(default_factory=list)
    captured: list[StepCall] = field(default_factory=list)
    stock_out: list[Any] = field(default_factory=list)


def bind(schedulers: list[Any], scheduler: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> StepCall:
    """Return what a call of ``step`` was given, by name; ``schedulers`` are those seen so far, and is added to."""
    bound = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs).arguments
    names = list(bound)[1:]
    extra = {k: v for k, v in bound.items() if k in names and k not in ("model_output", "timestep", "sample")}
    extra.pop("return_dict", None)
    known = [id(s) for s in schedulers]
    if id(scheduler) not in known:
        known.append(id(scheduler))
        schedulers.append(scheduler)
    number = known.index(id(scheduler))
    first = bound.get("model_output", bound[names[0]])
    return StepCall(number, first, bound.get("timestep"), bound["sample"], extra)
