"""Which rows and times can share one call of a pipeline: tried, never assumed.

Some pipelines take one prompt only; some pad the prompts of a batch to the longest, so that a sample would depend on
its neighbours; some read the timestep as a number, and some ignore a vector of them without a word. Each ability is
tried once per kind of input, against one call per row, and rows are grouped accordingly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.pipelines.condition import Inputs, call_arguments

if TYPE_CHECKING:
    from flowalign.pipelines.adapter import Adapter
    from flowalign.pipelines.plan import Plan

__all__ = ["Batching"]


class Batching:
    """What one adapter has found out about batches."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.per_sample: dict[Any, bool] = {}
        self.batches: dict[Any, bool] = {}

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
        plan = self.adapter._plan(pair)
        if not plan.batched or call_arguments(pair.rows, self.adapter.tap.accepted) is None:
            return False
        t = self.adapter._grid(pair, self.adapter._two(pair)).listed[0]
        device = self.adapter._device()
        x = torch.randn(2, *plan.shape, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            apart = torch.cat([self.adapter._step(x[i : i + 1], t, pair[torch.tensor([i])])[1] for i in (0, 1)])
            try:
                together = self.adapter._step(x, t, pair)[1]
            except Exception:  # whatever the pipeline does with two rows, it does not take them: that is the answer
                return False
        return self._agree(together, apart, plan)

    def _agree(self, a: Tensor, b: Tensor, plan: Plan) -> bool:
        """Return whether two answers are the same to the round-off of the pipeline's precision."""
        limit = 1e-3 if plan.dtypes[0] in (torch.float32, torch.float64) and not self._half() else 5e-2
        return a.shape == b.shape and float((a - b).float().abs().amax()) < limit * (
            float(b.float().abs().amax()) + 1e-12
        )

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
            self.adapter._locate(cond, float(v))[1] != self.adapter.steps for v in times
        ):
            return False
        with torch.no_grad():
            apart = torch.cat(
                [self.adapter._step(x[i : i + 1], float(times[i]), cond[torch.tensor([i])])[1] for i in (0, 1)]
            )
            try:
                together = self.adapter._step(x, times, cond)[1]
            except Exception:  # whatever the pipeline does with t, it does not take a vector: that is the answer
                return False
        return self._agree(together, apart, self.adapter._plan(cond))
