"""A kernel that hands the step to the pipeline's own scheduler object.

Multistep solvers (UniPC, DPM++, DEIS, LMS, PNDM) keep what they saw before on themselves. Here each step runs on a
fresh copy of the solver as it was when the loop began; whatever the step changed on it becomes the ``carry``, tensors
``(B, ...)`` that the core may index when particles branch or are resampled.

A stochastic solver's ``prev = mean + std · z`` is read off by letting its own draws be zero and then one
(:mod:`~flowalign.pipelines.draws`), so DDPM, Euler-ancestral, LCM, SDE-DPM++ and the Brownian tree solvers have a mean,
a std and a log-probability too.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.gaussian import Gaussian, per_sample, work_dtype
from flowalign.kernels import Kernel
from flowalign.pipelines.draws import constant_draws
from flowalign.pipelines.grid import Grid
from flowalign.process import Posterior, Time

if TYPE_CHECKING:
    from flowalign.pipelines.adapter import Adapter

__all__ = ["Handover"]

SECOND = "old_pred_original_sample"  # CogVideoX DPM is given back its own second return value


class Handover(Kernel):
    """The pipeline's own solver as a kernel; exact on the pipeline's own grid.

    Args:
        adapter: whose solver; its grids must contain the steps taken.

    Attributes:
        coefficients: c_j of each draw of the last step; with the draws of a stock call they give its noise
            (:func:`flowalign.pipelines.draws.combined`).
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._noisy: dict[tuple[float, float], bool] = {}
        self.coefficients: list[Tensor] = []

    def __call__(self, x: Tensor, posterior: Posterior, t: Time, s: Time, carry: Any = None) -> tuple[Gaussian, Any]:
        """Return the solver's law of ``x_s`` and its memory.

        Raises:
            ValueError: if ``t → s`` is not a step of the pipeline's grid, or differs within the batch.
        """
        now, then = _one(t), _one(s)
        grid, index = self._find(now, then)
        x = x.to(work_dtype(x))
        raw = posterior.output
        if raw is None:
            raw = grid.convention.write(x, posterior)
        if self.adapter.known.settles:  # the pipeline blends before the network looks: step from what it saw
            a, sigma = (per_sample(c, x) for c in posterior.process(t))
            x = a * posterior.x0 + sigma * posterior.eps
        solver = _restore(grid, index, carry)
        mean, second, drew = self._step(solver, grid, index, raw, x, carry, None)
        found = []
        with torch.no_grad():
            for j in range(drew):
                one, _, _ = self._step(_restore(grid, index, carry), grid, index, raw.detach(), x.detach(), carry, j)
                found.append(_common(one - mean.detach()))
        std = found[0].abs() if len(found) == 1 else sum((c.square() for c in found), x.new_zeros(())).sqrt()
        self._noisy[now, then], self.coefficients = bool(drew), found
        return Gaussian(mean.to(work_dtype(mean)), std), _memory(solver, grid, second, len(x))

    def stochastic(self, t: float, s: float) -> bool:
        """Return whether the solver draws noise from t to s; tried on zeros if it has not been seen."""
        key = (float(t), float(s))
        if key not in self._noisy:
            grid, index = self._find(*key)
            plan = self.adapter.known.any_plan()
            x, raw = torch.zeros(1, *plan.shape), torch.zeros(1, *plan.shape)
            if plan.batched and len(plan.shapes) == 1:
                raw = torch.zeros(1, *plan.outputs[1:])
            _, _, drew = self._step(_restore(grid, index, None), grid, index, raw, x, None, None)
            self._noisy[key] = bool(drew)
        return self._noisy[key]

    def _find(self, t: float, s: float) -> tuple[Grid, int]:
        grids = self.adapter.known.known_grids()
        for grid in grids:
            i = grid.find(t)
            if i is not None and grid.listed[i + 1] == s:
                return grid, i
        raise ValueError(
            f"the pipeline's own solver steps along its own grid only, and {t:.6g} → {s:.6g} is no step of it; known "
            f"grids: {[list(g.listed) for g in grids]}. Take the times from times(steps), or another kernel."
        )

    def _step(
        self, solver: Any, grid: Grid, index: int, raw: Tensor, x: Tensor, carry: Any, one: int | None
    ) -> tuple[Tensor, Any, int]:
        """Run one real step; return the next state, a second return value if there is one, and how often it drew."""
        parameters = inspect.signature(type(solver).step).parameters
        plan = self.adapter.known.any_plan()
        stamp = grid.timesteps[index]
        arguments: dict[str, Any] = {k: v for k, v in plan.extra.items() if k in parameters}
        arguments |= {"model_output": raw, "timestep": stamp, "sample": x, "return_dict": False}
        arguments |= dict.fromkeys(plan.echoed, raw)
        if plan.looks_ahead:
            arguments["prev_timestep"] = grid.timesteps[index + 1] if index + 1 < len(grid) else None
        if plan.stamp_dims:
            arguments["timestep"] = stamp.expand(len(x))
        if SECOND in parameters:
            arguments[SECOND] = None if carry is None else carry[-1]
            arguments["timestep_back"] = grid.timesteps[index - 1] if index else None
        with constant_draws(solver, one) as drew:
            out = solver.step(**{k: v for k, v in arguments.items() if k in parameters})
        second = out[1] if len(out) > 1 and isinstance(out[1], Tensor) else None
        return out[0], second if SECOND in parameters else None, len(drew)


def _one(t: Time) -> float:
    values = torch.as_tensor(t, dtype=torch.float64).reshape(-1)
    if not bool((values == values[0]).all()):
        raise ValueError(
            f"the pipeline's own solver takes one time for the whole batch; got {sorted(set(values.tolist()))}. "
            "Group the batch by time, or use a kernel of flowalign.kernels."
        )
    return float(values[0])


def _copy(solver: Any) -> Any:
    twin = copy.copy(solver)
    for key, value in vars(twin).items():
        if type(value) is list:
            vars(twin)[key] = list(value)
    return twin


def _restore(grid: Grid, index: int, carry: Any) -> Any:
    """Return the solver with its memory, or fresh at this grid point."""
    solver = _copy(grid.scheduler)
    state = vars(solver)
    if "is_scale_input_called" in state:
        state["is_scale_input_called"] = True
    if carry is not None:
        for name, value in carry[0]:
            state[name] = _decode(value)
    elif "_step_index" in state and (index or grid.offset):
        state["_step_index"] = index + grid.offset
    return solver


def _memory(solver: Any, grid: Grid, second: Any, batch: int) -> Any:
    """Return what the step changed on the solver, as nested tuples."""
    before = vars(grid.scheduler)
    changed = []
    for name, value in sorted(vars(solver).items()):
        old = before.get(name)
        same = value is old or (
            isinstance(value, int | float | bool | str) and type(old) is type(value) and old == value
        )
        if isinstance(value, list) and isinstance(old, list):
            same = len(value) == len(old) and all(a is b for a, b in zip(value, old, strict=True))
        if not same and name not in ("timesteps", "sigmas", "is_scale_input_called", "noise_sampler"):
            changed.append((name, _encode(value, batch)))
    return (tuple(changed), second)


def _encode(value: Any, batch: int) -> Any:
    """Make memory indexable: lists become tuples, a tensor that is not per sample is repeated for each."""
    if isinstance(value, list):
        return ("list", *(_encode(v, batch) for v in value))
    if isinstance(value, Tensor):
        if value.ndim and value.shape[0] == batch:
            return ("rows", value)
        return ("same", value.expand(batch, *value.shape))
    return ("plain", value)


def _decode(value: Any) -> Any:
    kind, *rest = value
    if kind == "list":
        return [_decode(v) for v in rest]
    return rest[0][0] if kind == "same" else rest[0]


def _common(std: Tensor) -> Tensor:
    """Return one std per sample where it is constant over space, else the map."""
    flat = std.flatten(1)
    mean = flat.double().mean(1)
    if bool(((flat.double() - mean[:, None]).abs().amax(1) <= 1e-3 * mean.abs() + 1e-6).all()):
        return mean.to(std).reshape(-1, *[1] * (std.ndim - 1))
    return std
