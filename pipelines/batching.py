"""Which rows and times can share one call of a pipeline: tried, never assumed.

Some pipelines take one prompt only; some pad the prompts of a batch to the longest, so that a sample would depend on
its neighbours; some read the timestep as a number, and some ignore a vector of them without a word. Each ability is
tried once per kind of input, against one call per row, and rows are grouped accordingly.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.pipelines.condition import Inputs, call_arguments
from flowalign.pipelines.iterate import step

if TYPE_CHECKING:
    from flowalign.pipelines.adapter import Adapter
    from flowalign.pipelines.plan import Plan

__all__ = ["Batching"]

log = logging.getLogger("flowalign")
REFUSALS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class Batching:
    """What one adapter has found out about batches.

    Attributes:
        per_sample: by kind of call, whether it takes one time per sample.
        batches: by kind of call, whether rows of one prompt (``same``) or of several (``mixed``) can share it.
        reasons: why not, where not, in words.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.per_sample: dict[Any, bool] = {}
        self.batches: dict[Any, bool] = {}
        self.reasons: list[str] = []

    def calls(self, cond: Inputs) -> list[list[int]]:
        """Return which rows share a call: all of them, those that are the same, or each its own.

        Tried once for each kind of input: some pipelines take one prompt only, and some let the prompts of a batch
        change each other (padding to the longest), which would make a sample depend on its neighbours.
        """
        if len(cond) == 1:
            return [[0]]
        ids = [row.identity for row in cond.rows]
        groups: dict[Any, list[int]] = {}
        for i, identity in enumerate(ids):
            groups.setdefault(identity, []).append(i)
        key = (cond.rows[0].kind, cond.guided)
        if len(groups) > 1:
            if (key, "mixed") not in self.batches:
                pair = torch.tensor([0, next(i for i, other in enumerate(ids) if other != ids[0])])
                self.batches[key, "mixed"] = self._try_batch(cond[pair])
            if self.batches[key, "mixed"] and call_arguments(cond.rows, self.adapter.tap.accepted) is not None:
                return [list(range(len(cond)))]
        if all(len(members) == 1 for members in groups.values()):
            return list(groups.values())
        if (key, "same") not in self.batches:
            self.batches[key, "same"] = self._try_batch(cond[torch.tensor([0, 0])])
        if self.batches[key, "same"]:
            return list(groups.values())
        return [[i] for i in range(len(cond))]

    def _try_batch(self, pair: Inputs) -> bool:
        """Return whether two rows in one call give what each gives alone."""
        plan = self.adapter.known.plan(pair)
        if not plan.batched or call_arguments(pair.rows, self.adapter.tap.accepted) is None:
            return False
        t = self.adapter.known.grid(pair, self.adapter.known.two(pair)).listed[0]
        device = self.adapter.device()
        x = torch.randn(2, *plan.shape, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad(), self._exact():
            apart = torch.cat([step(self.adapter, x[i : i + 1], t, pair[torch.tensor([i])])[1] for i in (0, 1)])
            together = self._together(x, t, pair, "two rows")
        return together is not None and self._agree(together, apart, plan, "two rows")

    def _together(self, x: Tensor, t: Any, cond: Inputs, what: str) -> Tensor | None:
        """Return the answer of one call for all rows; None, and the reason kept, where the pipeline does not take it.

        Only what code does with shapes and types that it was not written for counts as an answer; running out of
        memory, an interrupt or a bug elsewhere is passed on.
        """
        try:
            return step(self.adapter, x, t, cond)[1]
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as problem:
            self._note(f"{what} in one call: {type(problem).__name__}: {problem}")
            return None

    def _note(self, reason: str) -> None:
        self.reasons.append(reason)
        log.info("%s takes rows or times one by one: %s", type(self.adapter.pipe).__name__, reason)

    def _agree(self, a: Tensor, b: Tensor, plan: Plan, what: str) -> bool:
        """Return whether two answers are the same to the round-off of the pipeline's precision."""
        limit = 1e-3 if plan.dtypes[0] in (torch.float32, torch.float64) and not self._half() else 5e-2
        if a.shape != b.shape:
            self._note(f"{what} in one call: an output of shape {tuple(a.shape)} for {tuple(b.shape)}")
            return False
        gap = float((a - b).float().abs().amax()) / (float(b.float().abs().amax()) + 1e-12)
        if not gap < limit:
            self._note(f"{what} in one call: outputs differ by {gap:.1e} (relative) from those of one call each")
        return gap < limit

    def _exact(self) -> torch.autocast:
        """Return a context without autocast: its round-off must not pass for a difference between calls."""
        return torch.autocast(self.adapter.device().type, enabled=False)

    def _half(self) -> bool:
        return any(
            p.dtype in (torch.float16, torch.bfloat16)
            for m in self.adapter.experts.values()
            for p in [next(m.parameters())]
        )

    def spreads(self, x: Tensor, times: Tensor, cond: Inputs) -> bool:
        """Return whether this kind of call takes one time per sample; tried once, against one call per time."""
        key = (cond.rows[0].kind, cond.guided)
        if key not in self.per_sample:
            other = int((times != times[0]).nonzero()[0])
            pair = torch.tensor([0, other])
            self.per_sample[key] = self._try_spread(x.detach()[pair.to(x.device)], times[pair], cond[pair])
        return self.per_sample[key]

    def _try_spread(self, x: Tensor, times: Tensor, cond: Inputs) -> bool:
        if len(self.calls(cond)) > 1 or any(
            self.adapter.known.locate(cond, float(v))[1] != self.adapter.steps for v in times
        ):
            return False
        with torch.no_grad(), self._exact():
            apart = torch.cat(
                [step(self.adapter, x[i : i + 1], float(times[i]), cond[torch.tensor([i])])[1] for i in (0, 1)]
            )
            together = self._together(x, times, cond, "two times")
        return together is not None and self._agree(together, apart, self.adapter.known.plan(cond), "two times")
