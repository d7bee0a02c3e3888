"""The self-test: two steps of the stock call against the adapter, on the user's own pipeline and inputs.

It is the honest answer for a pipeline that nobody has tried. The stock call runs undisturbed, decorated as it is, on a
shadow whose scheduler copy only writes down what passes through ``step``; the adapter must then give the same outputs
at the same states, and the same final latents when it rolls out on its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from flowalign.gaussian import Gaussian
from flowalign.pipelines.draws import combined, watched_draws
from flowalign.pipelines.handover import Handover
from flowalign.pipelines.iterate import evaluate
from flowalign.pipelines.session import StepCall, bind

if TYPE_CHECKING:
    from flowalign.pipelines.adapter import Adapter
    from flowalign.pipelines.condition import Inputs

__all__ = ["Stock", "Verdict", "examine", "noise_of", "stock"]

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verdict:
    """What the self-test says.

    Attributes:
        pipeline: class name.
        status: ``passes``, ``fails`` or ``not tried``.
        one_step: largest relative difference of a model output to the stock call's.
        rollout: the same of the final latents under the pipeline's own solver, with the noise that it drew in the stock
            call; None where it was not reached.
        reason: why not, in words.
    """

    pipeline: str
    status: Literal["passes", "fails", "not tried"]
    one_step: float | None = None
    rollout: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        """Return one line for a person."""
        if self.status != "passes":
            return f"{self.pipeline}: {self.status}: {self.reason}"
        return (
            f"{self.pipeline}: passes (one step {self.one_step:.1e}, rollout {self.rollout:.1e}, relative to the stock "
            "call)"
        )


class Stock(NamedTuple):
    """What a stock call handed to ``step``, what ``step`` returned, and the noise that it drew, call by call."""

    calls: list[StepCall]
    results: list[Tensor]
    draws: list[list[Tensor]]


def stock(adapter: Adapter, cond: Inputs, steps: int) -> Stock:
    """Run the pipeline's own decorated call, and write down what passes through ``step``."""
    pipe = adapter.pipe
    shadow = object.__new__(type(pipe))
    vars(shadow).update(vars(pipe))
    solver = copy.copy(pipe.scheduler)
    for key, value in vars(solver).items():
        if type(value) is list:
            vars(solver)[key] = list(value)
    calls: list[StepCall] = []
    results: list[Tensor] = []
    draws: list[list[Tensor]] = []
    schedulers: list[Any] = []

    @functools.wraps(type(solver).step)
    def step(this: Any, *args: Any, **kwargs: Any) -> Any:
        call = bind(schedulers, this, args, kwargs)
        calls.append(replace(call, sample=call.sample.clone(), output=call.output.clone()))
        with watched_draws(this) as drawn:
            out = type(this).step(this, *args, **kwargs)
        draws.append(list(drawn))
        results.append((out[0] if isinstance(out, tuple) else out.prev_sample).clone())
        return out

    vars(solver)["step"] = MethodType(step, solver)
    vars(shadow)["scheduler"] = solver
    vars(shadow)["_progress_bar_config"] = {"disable": True}
    for output_type in ("latent", "pt"):  # not every pipeline can leave its result undecoded, and they say so late
        calls.clear()
        results.clear()
        draws.clear()
        arguments = adapter.arguments(cond.rows, cond.guided, steps, output_type)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                type(pipe).__call__(shadow, **arguments)
            break
        except (ValueError, UnboundLocalError, AssertionError):
            if output_type == "pt":
                raise
    return Stock(calls, results, draws)


def noise_of(adapter: Adapter, solver: Handover, law: Gaussian, draws: Sequence[Sequence[Tensor]], i: int) -> Tensor:
    """Return the standard normal with which iteration i of a stock call went from the law's mean to where it went."""
    plan = adapter.known.any_plan()
    own = [draws[i * plan.steps + k] for k in plan.captures]
    drawn = [plan.pack([part[j] for part in own], 1) for j in range(len(own[0]))]
    return combined(solver.coefficients, drawn, law.std, law.mean)


def examine(adapter: Adapter, cond: Inputs, steps: int = 2) -> Verdict:
    """Compare two steps; where a first try fails, try with iteration 0 run for real (key-value caches)."""
    name = type(adapter.pipe).__name__
    try:
        adapter.steps = steps
        steps = adapter.known.two(cond)
        first = _compare(adapter, cond, steps)
    except Exception as problem:  # the pipeline's own code may raise anything: the verdict is that it did
        first = Verdict(name, "fails", reason=f"{type(problem).__name__}: {problem}")
    if first.status == "passes" or not adapter.known.plans:
        return first
    cold = dict(adapter.known.plans)
    # iteration 0 first (variables bound or caches filled there); or x by way of step() after the start, where what was
    # computed from the starting latents must stay theirs (Kandinsky 2.2 inpainting, Cosmos 2.5 with an image)
    others: tuple[dict[str, Any], ...] = (
        {"warm": "dummy"},
        {"warm": "real"},
        {"way": "PS"},
        {"way": "PS", "settle": True},  # what is restored in each iteration is remembered from the start (Joy)
    )
    for change in others:
        adapter.known.plans = {key: replace(plan, **change) for key, plan in cold.items()}
        try:
            second = _compare(adapter, cond, steps)
        except Exception:  # the first reason is the one to tell
            continue
        if second.status == "passes":
            return second
    adapter.known.plans = cold
    return first


@torch.no_grad()
def _compare(adapter: Adapter, cond: Inputs, steps: int) -> Verdict:
    name = type(adapter.pipe).__name__
    plan = adapter.known.plan(cond)
    calls, results, draws = stock(adapter, cond, steps)
    times = adapter.times(steps, cond).tolist()
    count = len(times) - 1
    if len(calls) != count * plan.steps:
        return Verdict(name, "fails", reason=f"{len(calls)} scheduler steps in the stock call for a grid of {count}")
    solver, carry, x = Handover(adapter), None, None
    worst = 0.0
    for i in range(count):
        own = [calls[i * plan.steps + k] for k in plan.captures]
        seen = plan.pack([c.sample for c in own], 1)
        x = seen if x is None else x
        want = plan.pack([c.output for c in own], 1)
        worst = max(worst, _gap(evaluate(adapter, seen, times[i], cond)[1], want))
        if worst < TOLERANCE:
            law, carry = solver(x, adapter.posterior(x, times[i], cond), times[i], times[i + 1], carry)
            x = law.mean + law.std * noise_of(adapter, solver, law, draws, i)
    if worst >= TOLERANCE:
        return Verdict(
            name, "fails", worst, None, f"model outputs differ from the stock call's by {worst:.1e} (relative)"
        )
    assert x is not None
    last = _final(results, plan.captures, plan.steps)
    end = plan.pack(last, 1)
    free = _gap(x, end)
    if free >= TOLERANCE:
        return Verdict(
            name, "fails", worst, free, f"each step agrees, but a free rollout ends {free:.1e} apart (relative)"
        )
    return Verdict(name, "passes", worst, free)


def _final(results: Sequence[Tensor], captures: Sequence[int], steps: int) -> list[Tensor]:
    return [results[len(results) - steps + k] for k in captures]


def _gap(a: Tensor, b: Tensor) -> float:
    a, b = a.float(), b.float()
    if a.shape != b.shape or not bool(torch.isfinite(b).all()):
        return float("inf") if a.shape != b.shape else float((~torch.isfinite(b)).sum())
    return float((a - b).abs().amax() / b.abs().amax().clamp_min(1e-12))
