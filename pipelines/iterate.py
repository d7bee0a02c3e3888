"""One iteration of a pipeline's own loop for states, times and conditions mixed freely; and how it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.pipelines.session import Visit
from flowalign.process import Time

if TYPE_CHECKING:
    from flowalign.pipelines.adapter import Adapter
    from flowalign.pipelines.condition import Inputs

__all__ = ["begin", "evaluate", "step"]


def begin(adapter: Adapter, noise: Tensor, t: float, cond: Inputs) -> Tensor:
    """Return the states at which the loop begins for standard normal ``noise`` ``(B, *shape)``.

    ``prepare_latents`` is affine in its noise, so two calls with constant noise tell.

    Raises:
        ValueError: if t is not the first time of a grid, or the noise is not drawn with ``randn_tensor``.
    """
    known = adapter.known
    grid, steps = known.locate(cond, float(t))
    if float(t) != grid.listed[0]:
        raise ValueError(
            f"{type(adapter.pipe).__name__} starts at t = {grid.listed[0]:.6g} "
            f"with {steps} steps, not at {float(t):.6g}. "
            "Start at times[0]; for a clean state x0 use process.diffuse(x0, t, noise)."
        )
    key = (cond.rows[0].kind, steps, cond.guided) if not cond.rows[0].kind else None
    if key is None or key not in known.starts:
        who = cond[torch.tensor([0])] if key is not None else cond
        offset, one = (_begin(adapter, who, steps, value) for value in (0.0, 1.0))
        if torch.equal(offset, one):
            raise ValueError(
                f"{type(adapter.pipe).__name__} does not draw its starting noise with randn_tensor, so start() cannot "
                "replace it. Make the first state yourself: noise * pipe.scheduler.init_noise_sigma."
            )
        pair = (offset, one - offset)
        if key is not None:
            known.starts[key] = pair
    else:
        pair = known.starts[key]
    return pair[0] + pair[1] * noise.to(pair[0])


def _begin(adapter: Adapter, cond: Inputs, steps: int, value: float) -> Tensor:
    plan = adapter.known.plan(cond)
    found: list[Tensor] = []
    with torch.no_grad():
        for part in adapter.batching.calls(cond):
            session = plan.session(len(part), visits=[Visit(0, real=False)], noise=value)
            adapter.run([cond.rows[i] for i in part], cond.guided, session, steps)
            found.append(plan.pack([c.sample for c in session.captured], len(part)))
    return torch.cat(found).float()


def evaluate(adapter: Adapter, x: Tensor, t: Time, cond: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the raw output, the part of it that predicts the mean, and the states that the network really saw.

    Times and rows may be mixed freely. The states are x itself but where the pipeline blends or pins between steps.
    """
    times = torch.as_tensor(t, dtype=torch.float64).cpu()
    single = times.ndim == 0 or bool((times == times[0]).all())
    groups: list[tuple[Any, list[int]]]
    if single or adapter.batching.spreads(x, times, cond):
        shared: Any = float(times.reshape(-1)[0]) if single else times
        groups = [(shared, list(range(len(x))))]
    else:
        groups = [(float(v), (times == v).nonzero().flatten().tolist()) for v in times.unique()]
    pieces: list[tuple[list[int], tuple[Tensor, Tensor, Tensor]]] = []
    for when, members in groups:
        index = torch.tensor(members)
        for part in adapter.batching.calls(cond[index]):
            own = index[torch.tensor(part)]
            whole = len(own) == len(x)
            part_t = when[own] if isinstance(when, Tensor) else when
            got = step(adapter, x if whole else x[own.to(x.device)], part_t, cond if whole else cond[own])
            pieces.append((own.tolist(), got))
    if len(pieces) == 1:
        return pieces[0][1]
    back = torch.tensor([i for own, _ in pieces for i in own]).argsort().to(x.device)
    raw, mean, seen = (torch.cat([got[k] for _, got in pieces])[back] for k in range(3))
    return raw, mean, seen


def step(adapter: Adapter, x: Tensor, t: Any, cond: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Run one iteration for rows that fit in one call."""
    known = adapter.known
    plan, batch = known.plan(cond), len(x)
    first = float(t[0]) if isinstance(t, Tensor) else float(t)
    grid, steps = known.locate(cond, first)
    spot = grid.spot(first)
    time = None
    if isinstance(t, Tensor):
        values = [grid.spot(float(v)) for v in t]
        stamps = [grid.timesteps[s.index] if s.timestep is None else torch.tensor(s.timestep) for s in values]
        time = torch.stack([s.to(grid.timesteps) for s in stamps])
    parts = plan.unpack(x)
    visits = [Visit(0, put=parts, real=plan.warm == "real")] if plan.warm and spot.index > 0 else []
    enters = plan.way == "P" or (plan.way == "PS" and spot.index == 0)
    if not enters or (plan.settle and spot.index > 0):
        visits.append(Visit(max(spot.index - 1, 0), put=parts, real=False))
    visits.append(Visit(spot.index, time=time))
    edit = None
    if spot.timestep is not None and spot.sigma is not None:
        edit = (spot.index + grid.offset, spot.timestep, spot.sigma)
    session = plan.session(batch, visits=visits, x=parts[0] if enters else None, edit=edit)
    adapter.run(cond.rows, cond.guided, session, steps)
    if not session.captured:
        raise RuntimeError(f"{type(adapter.pipe).__name__} left its loop without a step at t = {first:.6g}.")
    outputs = [c.output for c in session.captured]
    raw = outputs[0][:batch] if len(outputs) == 1 and plan.batched else plan.pack(outputs, batch)
    seen = plan.pack([c.sample for c in session.captured], batch) if plan.settle else x
    return raw, plan.pack(outputs, batch), seen
