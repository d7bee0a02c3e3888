"""Fit a training run into so many bytes: what to recompute, and in how small pieces.

From what was measured (:mod:`flowalign.memory_costs`), of n samples with k taped of K steps,

    without recomputation   k·step(n) + tail(n)            tail = decoder and rewards
    recomputed steps        k·light(n) + max(step(c), tail(n))         c the policy's chunk
    recomputed tail         ... with tail(d) of d samples at a time in place of tail(n)
    frame by frame          ... with one frame's decoder in place of a clip's, where frames can be decoded apart

and what a piece needs besides while it runs. The first setting in the order of its cost (recomputed forward passes, a
little for every halving of a batch) that fits is taken. Micro-batches keep the gradient: their mean is accumulated.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from itertools import product

from torch import nn

from flowalign.adjoint import LeanAdjoint
from flowalign.collect import Collector
from flowalign.memory_costs import Costs, Stage, probe
from flowalign.options import FitOptions
from flowalign.recipe import Recipe
from flowalign.source import Draw

__all__ = ["MemoryPlan", "fit_memory", "parse_bytes", "predict", "settings"]

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
LOSS = 16  # tensors of the size of a state that a policy gradient's densities keep for each transition, as measured


def parse_bytes(text: str) -> int:
    """Return the bytes of ``8GiB``, ``500 MB``, ``2e9``.

    Raises:
        ValueError: for what is no size.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([KMGT]I?)B?|B)?\s*", text, re.IGNORECASE)
    try:
        value = float(found[1]) * UNITS[(found[2] or "").upper()] if found else 0.0
    except ValueError:
        value = 0.0
    if value < 1:
        raise ValueError(f"a memory budget is written like 8GiB, 500MB or 2e9 (bytes); got {text!r}.")
    return int(value)


def readable(size: float) -> str:
    """Return bytes as text."""
    power = min(3, max(0, int(math.log2(max(size, 1)) // 10)))
    return f"{size / 2 ** (10 * power):.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


@dataclass(frozen=True)
class MemoryPlan:
    """A setting and the bytes that it is predicted to take.

    Attributes:
        batch: items per forward pass of the loss.
        samples: samples of a micro-batch, or of the rollout where nothing is taped.
        recompute: recompute the network in the backward pass.
        chunk: samples per forward pass of the network; None for all.
        judge: samples decoded and judged at a time.
        again: decode and judge again in the backward pass.
        by_frame: decode every frame of a video by itself, and again in the backward pass.
        phases: predicted bytes above ``fixed``, by phase.
        fixed: weights, copies, gradients, optimiser.
    """

    batch: int
    samples: int
    recompute: bool = False
    chunk: int | None = None
    judge: int = 256
    again: bool = False
    by_frame: bool = False
    phases: dict[str, float] | None = None
    fixed: float = 0.0

    @property
    def peak(self) -> float:
        """The largest phase, above ``fixed``."""
        return max((self.phases or {"": 0.0}).values())

    @property
    def total(self) -> float:
        """All bytes."""
        return self.fixed + self.peak

    def __str__(self) -> str:
        """Say it in a line."""
        parts = [f"{self.samples} samples at a time"]
        parts += ["network recomputed"] if self.recompute else []
        parts += [f"network in chunks of {self.chunk}"] if self.chunk else []
        parts += [f"decoded and judged by {self.judge}" + (", twice" if self.again else "")]
        parts += ["decoded frame by frame"] if self.by_frame else []
        return f"{', '.join(parts)}: {readable(self.total)}, of which {readable(self.fixed)} are weights and optimiser"

    def apply(self, collector: Collector, options: FitOptions) -> tuple[Recipe, FitOptions]:
        """Set the policy's and the scorer's pieces; return the recipe and the options to run with."""
        collector.policy.chunk, scorer = self.chunk, collector.scorer
        scorer.chunk, scorer.checkpoint, scorer.by_frame = self.judge, self.again, self.by_frame
        recipe = collector.recipe
        if recipe.tape is not None:
            tape = recipe.tape
            recipe = replace(recipe, tape=lambda i: replace(tape(i), checkpoint=self.recompute))
        return recipe, replace(options, batch=self.batch, accumulate=self._accumulate(recipe, options))

    def _accumulate(self, recipe: Recipe, options: FitOptions) -> int:
        """Return the batches per optimiser step that keep its gradient the mean of as many items as before."""
        if not options.accumulate:
            return 0
        return options.accumulate * max(1, round(options.batch / self.batch))


# -- predicting ------------------------------------------------------------------------------------------------------
def predict(costs: Costs, plan: MemoryPlan, recipe: Recipe, steps: int, taped: int) -> dict[str, float]:
    """Return the bytes above ``fixed`` that each phase of an iteration is predicted to take.

    Args:
        costs: measured.
        plan: a setting.
        recipe: of the method.
        steps: of the sampler.
        taped: how many of them keep a graph; 0 for methods that do not backpropagate through sampling.
    """
    if not taped:
        return _gathered(costs, plan, recipe, steps)
    return _grown(costs, plan, steps, taped, max(1, recipe.renoise))


def _tail(costs: Costs, plan: MemoryPlan, n: int) -> tuple[float, float, float]:
    """Return what decoder and rewards hold, and at most need in the forward and the backward pass."""
    d = min(plan.judge, n)
    tail, again = _ways(costs, plan)
    if plan.again:
        light = costs.state(n) + again.kept(n)  # inputs of the chunks, and scores
        return light, light + again.forward(d), light + again.backward(d)
    whole = tail.kept(n)
    rest = whole - tail.kept(d) if n > d else 0.0
    return whole, rest + tail.forward(d), rest + tail.backward(d)


def _ways(costs: Costs, plan: MemoryPlan) -> tuple[Stage, Stage]:
    """Return decoder and rewards as the plan has them decode, kept and made again."""
    if plan.by_frame and costs.framed is not None and costs.framed_again is not None:
        return costs.framed, costs.framed_again
    return costs.tail, costs.again


def _grown(costs: Costs, plan: MemoryPlan, steps: int, taped: int, copies: int) -> dict[str, float]:
    n = plan.samples * copies
    c = min(plan.chunk or n, n)
    prefix = (steps - taped) * costs.state(n)
    one = costs.light if plan.recompute else costs.step
    chain = prefix + taped * one.kept(n)
    held, tail_forward, tail_backward = _tail(costs, plan, n)
    inside = one.forward(c) + one.kept(n) - one.kept(c)
    last = prefix + (taped - 1) * one.kept(n)
    # what a step's backward pass needs: its own graph (made again for a chunk), and what is not yet freed
    unrolled = one.backward(c) + one.kept(n) - one.kept(c)
    return {
        "rollout": max(prefix + costs.step.silent(c) * (taped < steps), last + inside),
        "judge": chain + max(tail_forward, held),
        "backward through the judge": chain + tail_backward,
        "backward through the steps": last + unrolled,
    }


def _gathered(costs: Costs, plan: MemoryPlan, recipe: Recipe, steps: int) -> dict[str, float]:
    n, b = plan.samples, plan.batch
    c, d = min(plan.chunk or n, n), min(plan.judge, n)
    states = (steps + 1) * costs.state(n)
    out = {
        "rollout": states + costs.step.silent(c),
        "judge": states + _ways(costs, plan)[0].silent(d),
        # the transitions are copied out of the trajectory, x and x_next, and taken in batches
        "update": 3 * states + costs.step.backward(b) + LOSS * costs.state(b),
    }
    if isinstance(recipe.credit, LeanAdjoint):
        held, forward, backward = _tail(costs, plan, n)
        out["gradient of the reward"] = states + max(held, forward, backward)
        out["adjoint"] = 2 * states + costs.step.backward(n) - costs.gradients
    return out


# -- choosing --------------------------------------------------------------------------------------------------------
def settings(recipe: Recipe, options: FitOptions, apart: bool = False) -> list[MemoryPlan]:
    """Return every setting, the cheapest first.

    Args:
        recipe: of the method.
        options: of the run.
        apart: whether frames can be decoded by themselves.
    """
    n = options.groups * options.size
    judges = sorted({max(1, n >> i) for i in range(n.bit_length())}, reverse=True)
    out: list[tuple[float, MemoryPlan]] = []
    for batch, samples in _batches(recipe, options):
        split = math.log2(max(1.0, options.batch / batch))
        for recompute in (False, True) if recipe.tape is not None else (False,):
            for chunk in [None, *(c for c in judges if c < samples)]:
                for judge in [j for j in judges if j <= samples] or [samples]:
                    for again, framed in product((False, True), (False, True) if apart else (False,)):
                        pieces = math.log2(samples / judge) + (math.log2(samples / chunk) if chunk else 0.0)
                        cost = 0.05 * (split + pieces) + 0.25 * recompute + 0.1 * again + 0.15 * framed
                        out.append((cost, MemoryPlan(batch, samples, recompute, chunk, judge, again, framed)))
    return [plan for _, plan in sorted(out, key=lambda item: item[0])]


def _batches(recipe: Recipe, options: FitOptions) -> list[tuple[int, int]]:
    """Return batch sizes that divide the run's, and the samples that are alive with them."""
    n = options.groups * options.size
    if recipe.tape is None:
        return [(options.batch // m, n) for m in range(1, options.batch + 1) if options.batch % m == 0]
    groups = min(options.groups, max(1, options.batch // options.size))
    parts = [g for g in range(groups, 0, -1) if groups % g == 0 and options.groups % g == 0] or [groups]
    return [(g * options.size, g * options.size) for g in parts]


def fit_memory(
    collector: Collector, draw: Draw, parameters: list[nn.Parameter], options: FitOptions, budget: int
) -> MemoryPlan:
    """Return the cheapest setting that fits.

    Args:
        collector: of the run.
        draw: two samples, for the probe.
        parameters: what is trained.
        options: of the run.
        budget: in bytes, for everything.

    Raises:
        ValueError: if none does; with the leanest one and what to change.
    """
    recipe = collector.recipe
    costs = probe(collector, draw, parameters)
    steps = len(recipe.grid(collector.pipeline.times(collector.steps))) - 1
    taped = 0 if recipe.tape is None else max(steps - recipe.tape(i).first for i in range(64))
    least: MemoryPlan | None = None
    for setting in settings(recipe, options, costs.framed is not None):
        phases = predict(costs, setting, recipe, steps, taped)
        plan = replace(setting, phases=phases, fixed=costs.fixed)
        if plan.total <= budget:
            return plan
        if least is None or plan.total < least.total:
            least = plan
    assert least is not None
    worst = max(least.phases or {}, key=lambda k: (least.phases or {})[k])
    raise ValueError(
        f"a memory budget of {readable(budget)} cannot be met: the leanest setting ({least}) exceeds it, most of it in "
        f"the {worst} ({readable(least.peak)}). Give at least {readable(least.total)}, or ask for less: a lower "
        "resolution or fewer frames, a smaller group (fit.size), fewer taped steps, LoRA in place of all weights."
    )
