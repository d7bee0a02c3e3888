"""Fit a training run into so many bytes: what to recompute, and in how small pieces.

A probe runs one step, the decoder and the rewards on one and on two samples and measures what each keeps and needs
(:mod:`flowalign.meter`); bytes are affine in the samples. Of n samples with k taped of K steps then

    without recomputation   k·step(n) + tail(n)            tail = decoder and rewards
    recomputed steps        k·light(n) + max(step(c), tail(n))         c the policy's chunk
    recomputed tail         ... with tail(d) of d samples at a time in place of tail(n)

and what a piece needs besides while it runs. The first setting in the order of its cost (recomputed forward passes, a
little for every halving of a batch) that fits is taken. Micro-batches keep the gradient: their mean is accumulated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from flowalign.adjoint import LeanAdjoint
from flowalign.collect import Collector, enter
from flowalign.meter import Meter, tensor_bytes
from flowalign.noise import Noise
from flowalign.options import FitOptions
from flowalign.policy import Weights
from flowalign.recipe import Recipe
from flowalign.rollout import Tape, rollout
from flowalign.source import Draw
from flowalign.trajectory import Nodes

__all__ = ["Costs", "Line", "MemoryPlan", "Stage", "fit_memory", "parse_bytes", "predict", "probe", "settings"]

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
class Line:
    """Bytes that are affine in the number of samples: ``base + each·n``."""

    base: float
    each: float

    @classmethod
    def through(cls, one: float, two: float) -> Line:
        """Return the line through the bytes of one and two samples; it never falls."""
        each = max(two - one, 0.0)
        return cls(max(one - each, 0.0), each)

    def __call__(self, n: int) -> float:
        """Return the bytes of n samples, none of none."""
        return self.base + self.each * n if n else 0.0


@dataclass(frozen=True)
class Stage:
    """What one part of the way needs.

    Attributes:
        kept: held for the backward pass, results included.
        forward: most that is alive while it runs with gradients.
        backward: most that is alive in its backward pass, what it holds included.
        silent: most that is alive while it runs without gradients.
    """

    kept: Line
    forward: Line
    backward: Line
    silent: Line


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Attributes:
        step: one sampling step.
        light: the same under a checkpoint: what is kept between forward and backward pass.
        decode: states to media.
        reward: media to scores.
        tail: both.
        again: both under a checkpoint.
        state: one level of a trajectory without its graph.
        fixed: weights, their copies in other roles, gradients and optimiser.
        gradients: of the trained weights; part of ``fixed`` and of every step's backward pass.
    """

    step: Stage
    light: Stage
    decode: Stage
    reward: Stage
    tail: Stage
    again: Stage
    state: Line
    fixed: float
    gradients: float


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
        phases: predicted bytes above ``fixed``, by phase.
        fixed: weights, copies, gradients, optimiser.
    """

    batch: int
    samples: int
    recompute: bool = False
    chunk: int | None = None
    judge: int = 256
    again: bool = False
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
        return f"{', '.join(parts)}: {readable(self.total)}, of which {readable(self.fixed)} are weights and optimiser"

    def apply(self, collector: Collector, options: FitOptions) -> tuple[Recipe, FitOptions]:
        """Set the policy's and the scorer's pieces; return the recipe and the options to run with."""
        collector.policy.chunk, scorer = self.chunk, collector.scorer
        scorer.chunk, scorer.checkpoint = self.judge, self.again
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


# -- measuring -------------------------------------------------------------------------------------------------------
def probe(collector: Collector, draw: Draw, parameters: list[nn.Parameter]) -> Costs:
    """Measure one step, decoder and rewards on one and two samples of a draw of two.

    Raises:
        ValueError: where the draw is smaller.
    """
    if int(draw.samples.sum()) < 2:
        raise ValueError("a memory probe needs a draw of two samples.")
    judge, device = collector.bind(draw), parameters[0].device
    rows = torch.arange(len(draw.prompts)).repeat_interleave(draw.samples)[:2]
    times = collector.recipe.grid(collector.pipeline.times(collector.steps))
    noise = Noise(collector.seed, draw.keys)
    start = enter(collector.pipeline, judge.cond, rows, noise, float(times[0])).x.detach()
    measured: list[dict[str, tuple[float, ...]]] = []
    _visit(collector, judge, start[:1], rows[:1], times, device, parameters)  # what is learnt once is not counted
    for n in (1, 2):
        measured.append(_visit(collector, judge, start[:n], rows[:n], times, device, parameters))
    one, two = measured
    stage = {k: Stage(*(Line.through(a, b) for a, b in zip(one[k], two[k], strict=True))) for k in one if k != "state"}
    state = Line.through(one["state"][0], two["state"][0])
    trained = tensor_bytes(parameters)
    return Costs(**stage, state=state, fixed=_fixed(collector, parameters), gradients=trained)


def _fixed(collector: Collector, parameters: list[nn.Parameter]) -> float:
    """Return the bytes of all weights, their copies, the gradients and Adam's two moments."""
    modules = {id(m): m for m in _modules(collector)}
    weights = [t for m in modules.values() for t in (*m.parameters(), *m.buffers())]
    copies = [c for r in collector.policy.roles.values() if isinstance(r, Weights) for c in r.copies]
    return tensor_bytes([*weights, *copies]) + 3 * tensor_bytes(parameters)


def _modules(collector: Collector) -> Iterator[nn.Module]:
    yield collector.pipeline.denoiser
    tap = getattr(collector.pipeline, "tap", None)  # the adapter of a diffusers pipeline holds autoencoder and encoders
    yield from () if tap is None else tap.modules().values()
    for reward in collector.scorer.rewards.values():
        yield from (m for m in vars(reward).values() if isinstance(m, nn.Module))
        if isinstance(reward, nn.Module):
            yield reward


def _visit(
    collector: Collector, judge: Any, x: Tensor, row: Tensor, times: Tensor, device: torch.device,
    parameters: list[nn.Parameter],
) -> dict[str, tuple[float, ...]]:  # fmt: skip
    """Return kept, forward, backward and silent bytes of every stage for these samples."""
    grid, cond, policy = times[:2], judge.cond, collector.policy
    booked = policy.ledger.state_dict(), collector.scorer.ledger.state_dict()

    def step(x: Tensor, checkpoint: bool, tape: bool = True) -> Any:
        return rollout(
            policy, collector.recipe.kernel, grid, Nodes.enter(x, row), cond, noise=Noise(0), n_rows=len(judge.prompts),
            tape=Tape(0, checkpoint) if tape else None, keep=collector.recipe.keep,
        )  # fmt: skip

    def score(media: Tensor) -> Tensor:
        return torch.stack(list(collector.scorer.judge(media, *_words(judge, row)).values())).sum(0)

    out = {
        "step": _measure(lambda z: step(z, False), x, device, parameters, lambda t: t.leaves.x),
        "light": _measure(lambda z: step(z, True), x, device, parameters, lambda t: t.leaves.x),
    }
    with torch.no_grad():
        media = judge.media(x, row)
    with_gradient = collector.scorer.differentiable
    out["decode"] = _measure(lambda z: judge.media(z, row), x, device, [], lambda m: m)
    out["reward"] = _measure(score, media, device, [], lambda r: r, with_gradient)
    out["tail"] = _measure(lambda z: score(judge.media(z, row)), x, device, [], lambda r: r, with_gradient)
    out["again"] = _measure(
        lambda z: run_checkpointed(lambda y: score(judge.media(y, row)), z, use_reentrant=False), x, device, [],
        lambda r: r, with_gradient,
    )  # fmt: skip
    with Meter(device) as meter:
        tree = step(x.detach(), False, tape=False)
    out["state"] = (float(meter.kept),)
    del tree
    policy.ledger.load_state_dict(booked[0])
    collector.scorer.ledger.load_state_dict(booked[1])
    return out


def _words(judge: Any, row: Tensor) -> tuple[list[str], list | None]:
    rows = row.tolist()
    return [judge.prompts[r] for r in rows], None if judge.meta is None else [judge.meta[r] for r in rows]


def _measure(
    run: Any, x: Tensor, device: torch.device, parameters: list[nn.Parameter], end: Any, gradient: bool = True
) -> tuple[float, ...]:
    """Return bytes kept, and at most alive in the forward, the backward and a silent forward pass."""
    with torch.no_grad(), Meter(device) as meter:
        run(x.detach())
        silent = float(meter.peak)
    if not gradient:
        return silent, silent, silent, silent
    leaf = x.detach().requires_grad_()
    with torch.enable_grad(), Meter(device) as meter:
        result = run(leaf)
        kept, forward = float(meter.kept), float(meter.peak)
        meter.restart()
        torch.autograd.grad(end(result).sum(), [leaf, *parameters], allow_unused=True)
        backward = float(meter.peak)
        del result
    return kept, forward, backward, silent


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
    if plan.again:
        light = costs.state(n) + costs.again.kept(n)  # inputs of the chunks, and scores
        return light, light + costs.again.forward(d), light + costs.again.backward(d)
    whole = costs.tail.kept(n)
    rest = whole - costs.tail.kept(d) if n > d else 0.0
    return whole, rest + costs.tail.forward(d), rest + costs.tail.backward(d)


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
        "judge": states + costs.tail.silent(d),
        # the transitions are copied out of the trajectory, x and x_next, and taken in batches
        "update": 3 * states + costs.step.backward(b) + LOSS * costs.state(b),
    }
    if isinstance(recipe.credit, LeanAdjoint):
        held, forward, backward = _tail(costs, plan, n)
        out["gradient of the reward"] = states + max(held, forward, backward)
        out["adjoint"] = 2 * states + costs.step.backward(n) - costs.gradients
    return out


# -- choosing --------------------------------------------------------------------------------------------------------
def settings(recipe: Recipe, options: FitOptions) -> list[MemoryPlan]:
    """Return every setting, the cheapest first."""
    n = options.groups * options.size
    judges = sorted({max(1, n >> i) for i in range(n.bit_length())}, reverse=True)
    out: list[tuple[float, MemoryPlan]] = []
    for batch, samples in _batches(recipe, options):
        split = math.log2(max(1.0, options.batch / batch))
        for recompute in (False, True) if recipe.tape is not None else (False,):
            for chunk in [None, *(c for c in judges if c < samples)]:
                for judge in [j for j in judges if j <= samples] or [samples]:
                    for again in (False, True):
                        pieces = math.log2(samples / judge) + (math.log2(samples / chunk) if chunk else 0.0)
                        cost = 0.05 * (split + pieces) + 0.25 * recompute + 0.1 * again
                        out.append((cost, MemoryPlan(batch, samples, recompute, chunk, judge, again)))
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
    for setting in settings(recipe, options):
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
