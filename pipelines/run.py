"""The callbacks of one controlled call: grid, loop, ``prepare_latents``, ``step`` and networks.

Made by :class:`~flowalign.pipelines.tap.Tap` for one call and emptied after it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowalign.pipelines.patching import constant_noise, swapped, zeros
from flowalign.pipelines.session import Halt, Session, Visit, bind
from flowalign.pipelines.track import BatchTime, Returned, Track

if TYPE_CHECKING:
    from flowalign.pipelines.tap import Tap

__all__ = ["Run"]


class Run:
    """The callbacks of one call."""

    def __init__(self, tap: Tap, session: Session, shadow: Any, grad: bool, rng: Tensor) -> None:
        self.tap, self.session, self.shadow, self.grad = tap, session, shadow, grad
        self.code = tap.code
        self.rng: Tensor | None = rng
        self.visit: Visit | None = None
        self.step_count = self.network_count = self.iteration = 0
        self.schedulers: list[Any] = []

    def restore_rng(self) -> None:
        """Give the ambient random state back, once."""
        if self.rng is not None:
            torch.random.set_rng_state(self.rng)
            self.rng = None

    # -- the scheduler ------------------------------------------------------------------------------------------
    def stand_in(self, real: Any) -> Any:
        """Return a shallow copy of the scheduler that reports here. Bound methods survive a deepcopy of it."""
        run = self
        copied = copy.copy(real)
        for key, value in vars(copied).items():
            if type(value) is list:
                vars(copied)[key] = list(value)

        @functools.wraps(type(real).step)
        def step(this: Any, *args: Any, **kwargs: Any) -> Any:
            return run.on_step(this, args, kwargs)

        @functools.wraps(type(real).set_timesteps)
        def set_timesteps(this: Any, *args: Any, **kwargs: Any) -> None:
            type(this).set_timesteps(this, *args, **kwargs)
            run.on_grid(this)

        vars(copied)["step"] = MethodType(step, copied)
        vars(copied)["set_timesteps"] = MethodType(set_timesteps, copied)
        return copied

    def on_grid(self, scheduler: Any) -> None:
        """Make the fresh grid a track; move one entry off the grid where that is asked."""
        timesteps = scheduler.timesteps
        if not isinstance(timesteps, Tensor):
            timesteps = torch.as_tensor(timesteps)
        if self.session.edit is not None:
            index, timestep, sigma = self.session.edit
            timesteps = timesteps.clone()
            timesteps[index] = timestep if timesteps.is_floating_point() else round(timestep)
            sigmas = vars(scheduler).get("sigmas")
            if isinstance(sigmas, Tensor):
                scheduler.sigmas = sigmas.clone()
                scheduler.sigmas[index] = sigma
        scheduler.timesteps = Track.of(timesteps, self)

    # -- the loop ----------------------------------------------------------------------------------------------
    def visits(self, track: Track) -> Iterator[tuple[int, Tensor]]:
        """Drive the pipeline's loop."""
        session, grid = self.session, track.plain()
        self._enter(grid)
        if session.visits is None:
            for i in range(len(grid)):
                if session.limit is not None and i >= session.limit:
                    raise Halt
                self._begin(None, i)
                yield i, grid[i]
            self._end()
            return
        for visit in session.visits:
            self._begin(visit, visit.index)
            yield visit.index, grid[visit.index] if visit.time is None else BatchTime.of(visit.time)
        self._end()

    def _enter(self, grid: Tensor) -> None:
        session, scheduler = self.session, vars(self.shadow)["scheduler"]
        whole = vars(scheduler)["timesteps"]
        whole = whole.plain() if isinstance(whole, Track) else whole
        head = len(grid) <= len(whole) and torch.equal(grid.to(whole), whole[: len(grid)])
        session.offset = 0 if head else max(len(whole) - len(grid), 0)
        session.track = grid
        frozen = copy.copy(scheduler)
        for name in ("step", "set_timesteps"):
            vars(frozen).pop(name, None)
        frozen.timesteps = whole
        for key, value in vars(frozen).items():
            if type(value) is list:
                vars(frozen)[key] = list(value)
        session.scheduler = frozen
        if session.stop_at_entry:
            raise Halt

    def _begin(self, visit: Visit | None, index: int) -> None:
        self.visit, self.iteration = visit, self.iteration + 1
        self.step_count = self.network_count = 0
        self.restore_rng()
        # what a replayed iteration computes before its step is thrown away
        torch.set_grad_enabled(self.grad and (visit is None or visit.real or visit.put is None))
        if visit is not None and "_step_index" in vars(self.shadow.scheduler):
            self.shadow.scheduler._step_index = index + self.session.offset

    def _end(self) -> None:
        self.visit = None
        torch.set_grad_enabled(self.grad)

    # -- what the pipeline calls --------------------------------------------------------------------------------
    def on_prepare(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the pipeline's own ``prepare_latents``, then put x where its latents were."""
        session = self.session
        with constant_noise(type(self.tap.pipe), self.tap.globals, session.noise):
            out = method(*args, **kwargs)
        torch.set_grad_enabled(self.grad)
        items = list(out) if isinstance(out, tuple | list) else [out]
        session.prepared_shape = items[0].shape if isinstance(items[0], Tensor) else None
        if session.x is None or not isinstance(items[0], Tensor) or session.x.shape != items[0].shape:
            return out  # another loop's latents (the prior of StableUnCLIP)
        session.placed = True
        # x * 1: some loops write into their latents in place
        items[0] = session.x.to(items[0]) * 1
        return type(out)(items) if isinstance(out, tuple | list) else items[0]

    def on_step(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the arguments; return what the visit puts, or leave."""
        session = self.session
        call = bind(self.schedulers, scheduler, args, kwargs)
        position = self.step_count
        self.step_count += 1
        if session.visits is None:
            session.calls.append(call)
            out = type(scheduler).step(scheduler, *args, **kwargs)
            session.stock_out.append(out[0] if isinstance(out, tuple) else out.prev_sample)
            return out
        last = self.step_count == session.steps_per_visit
        assert self.visit is not None
        if position not in session.captures:
            return type(scheduler).step(scheduler, *args, **kwargs)
        if self.visit.put is not None:
            if "_step_index" in vars(scheduler) and scheduler._step_index is not None:
                scheduler._step_index += 1  # add_noise between two steps reads it
            torch.set_grad_enabled(self.grad)
            value = self.visit.put[session.captures.index(position)]
            return Returned(value.to(call.sample) * 1)
        session.captured.append(call)
        if last:
            raise Halt
        return Returned(call.sample)

    # -- networks ----------------------------------------------------------------------------------------------
    @contextmanager
    def patched(self) -> Iterator[None]:
        """Watch the components' ``forward`` for as long as this session needs it, and put it back."""
        session = self.session
        watch = session.record or any(not v.real for v in session.visits or ())
        with ExitStack() as stack:
            for name, module in self.tap.modules().items() if (watch or session.module_memo) else ():
                stack.enter_context(swapped(module, "forward", self._watch(name, module, module.forward)))
                method: Any = getattr(module, "encode", None)
                if session.module_memo and callable(method):
                    stack.enter_context(swapped(module, "encode", self._quiet(name + ".encode", method)))
            if self.grad:
                for module, name, value in self.tap.repaired():
                    stack.enter_context(swapped(module, name, value))
            yield

    def _watch(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            session = self.session
            if not self.iteration:
                # a hook inside wants to see the activations pass (Joy): they would not
                quiet = session.module_memo and not any(m._forward_hooks for m in module.modules())
                return self._memoised(name, forward, args, kwargs) if quiet else forward(*args, **kwargs)
            if self.visit is not None and not self.visit.real and session.replay is not None:
                out = session.replay[self.network_count % len(session.replay)][1]
                self.network_count += 1
                return zeros(out, session.replay_batch, session.batch)
            out = forward(*args, **kwargs)
            if session.record and (self.visit is None or self.visit.real):
                session.networks.append((name, out))
            return out

        return watched

    def _quiet(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def quiet(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs) if self.iteration else self._memoised(name, method, args, kwargs)

        return quiet

    def _memoised(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.tap.memo.whole(name, method, args, kwargs)
