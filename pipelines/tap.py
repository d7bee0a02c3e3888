"""One controlled call of a pipeline's own ``__call__``.

The undecorated function runs on a *shadow* of the pipeline: an object of a subclass with the same components and an
instance dictionary of its own, so that nothing the call writes on ``self`` reaches the user's pipeline, whatever
exception ends it. The shadow's scheduler is a stand-in: a shallow copy of the real one, of the same class, whose
``step`` and ``set_timesteps`` are overridden on the instance. A :class:`Session` says what is to happen:

    walk      which grid points the loop visits, and whether the networks really run there
    way in    P: replace what ``prepare_latents`` returns;  S: let ``step`` return x and take the next iteration
    out       the arguments of the last ``step``; the call is then left by an exception of our own
"""

from __future__ import annotations

import builtins
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.pipelines.memo import Memo
from flowalign.pipelines.track import BatchTime, Returned, Track, enumerate_track

__all__ = ["Halt", "Session", "StepCall", "Tap", "Visit"]

MISSING = object()


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
    entered: bool = False
    placed: bool = False
    track: Tensor | None = None
    offset: int = 0
    scheduler: Any = None
    prepared: Any = None
    prepared_shape: torch.Size | None = None
    calls: list[StepCall] = field(default_factory=list)
    networks: list[tuple[str, Any]] = field(default_factory=list)
    captured: list[StepCall] = field(default_factory=list)
    stock_out: list[Any] = field(default_factory=list)


class Tap:
    """A pipeline made callable one step at a time.

    Args:
        pipe: any instantiated ``DiffusionPipeline``; never written to.
        memo: where encodings are kept.

    Raises:
        ValueError: if the pipeline has no scheduler or no Python loop that can be tapped.
    """

    def __init__(self, pipe: Any, memo: Memo) -> None:
        if not isinstance(getattr(pipe, "scheduler", None), object) or "scheduler" not in vars(pipe):
            raise ValueError(
                f"{type(pipe).__name__} has no attribute `scheduler`, so there is no step to tap. A pipeline that "
                "nests others (Kandinsky combined, VisualCloze) is wrapped by its parts: load(pipe.decoder_pipe)."
            )
        self.pipe, self.memo = pipe, memo
        function = inspect.unwrap(type(pipe).__call__)
        self.code: CodeType = function.__code__
        self.globals = {**function.__globals__, "enumerate": enumerate_track}
        self.function = FunctionType(self.code, self.globals, function.__name__, None, function.__closure__)
        self.function.__kwdefaults__, self.function.__defaults__ = function.__kwdefaults__, function.__defaults__
        self.signature = inspect.signature(function)
        self.accepted = frozenset(self.signature.parameters) - {"self"}
        kind: Any = type(pipe)
        self.shadow_class = _shadow_class(kind)
        self.device: tuple[Any, Any] | None = None
        self.freed: dict[str, nn.Module] = {}
        memo.around = self.awake

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Bring freed encoders to the device of the others for the length of an encoding."""
        if not self.freed:
            yield
            return
        there = next(p.device for k, m in self.modules().items() if k not in self.freed for p in m.parameters())
        for module in self.freed.values():
            module.to(there)
        try:
            yield
        finally:
            for module in self.freed.values():
                module.to("cpu")

    def modules(self) -> dict[str, nn.Module]:
        """Return the pipeline's networks by component name."""
        names = [k for k in self.pipe.config if not k.startswith("_")]
        return {k: vars(self.pipe)[k] for k in names if isinstance(vars(self.pipe).get(k), nn.Module)}

    def call(self, arguments: Mapping[str, Any], session: Session) -> Any:
        """Run the pipeline under a session; None where the session left it early.

        The caller's gradient mode holds from ``prepare_latents`` on and is given back, as is the random state.
        """
        shadow: Any = object.__new__(self.shadow_class)
        vars(shadow).update(vars(self.pipe))
        grad, state = torch.is_grad_enabled(), torch.random.get_rng_state()
        run = _Run(self, session, shadow, grad, state)
        vars(shadow)["_flowalign_run"] = run
        vars(shadow)["scheduler"] = run.stand_in(self.pipe.scheduler)
        with ExitStack() as stack:
            stack.callback(
                vars(run).clear
            )  # run, stand-in and closures are a cycle: no graph may wait for the collector
            stack.callback(torch.set_grad_enabled, grad)
            stack.callback(run.restore_rng)
            stack.enter_context(run.patched())
            torch.set_grad_enabled(False)
            torch.default_generator.manual_seed(0)
            try:
                out = self.function(shadow, **_fresh(arguments))
            except Halt:
                out = None
            finally:
                vars(shadow).clear()
        if session.x is not None and not session.placed:
            raise ValueError(
                f"states of shape {tuple(session.x.shape)} were given, but this call of {type(self.pipe).__name__} "
                f"works on {tuple(session.prepared_shape or ())}. Make them with start(), or see shape()."
            )
        return out


class _Run:
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
        session.track, session.entered = grid, True
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
        session.prepared = items[0]
        if session.x is None or not isinstance(items[0], Tensor) or session.x.shape != items[0].shape:
            return out  # another loop's latents (the prior of StableUnCLIP)
        session.placed = True
        # x * 1: some loops write into their latents in place
        items[0] = session.x.to(items[0]) * 1
        return type(out)(items) if isinstance(out, tuple | list) else items[0]

    def on_step(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record the arguments; return what the visit puts, or leave."""
        session = self.session
        call = self._bind(scheduler, args, kwargs)
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

    def _bind(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall:
        bound = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs).arguments
        names = list(bound)[1:]
        extra = {k: v for k, v in bound.items() if k in names and k not in ("model_output", "timestep", "sample")}
        extra.pop("return_dict", None)
        known = [id(s) for s in self.schedulers]
        if id(scheduler) not in known:
            known.append(id(scheduler))
            self.schedulers.append(scheduler)
        number = known.index(id(scheduler))
        first = bound.get("model_output", bound[names[0]])
        return StepCall(number, first, bound.get("timestep"), bound["sample"], extra)

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
                return _zeros(out, session.replay_batch, session.batch)
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


def _zeros(tree: Any, recorded: int, batch: int) -> Any:
    """Return zeros like a recorded network output, for another batch size."""
    if isinstance(tree, Tensor):
        if recorded == batch or tree.ndim == 0 or tree.shape[0] % recorded:
            return torch.zeros_like(tree)
        return tree.new_zeros((tree.shape[0] // recorded * batch, *tree.shape[1:]))
    if isinstance(tree, tuple) and type(tree) is tuple:
        return tuple(_zeros(t, recorded, batch) for t in tree)
    if isinstance(tree, list):
        size = len(tree) // recorded * batch if recorded != batch and len(tree) % recorded == 0 else len(tree)
        return [torch.zeros_like(tree[i % len(tree)]) for i in range(size)]
    if isinstance(tree, Mapping):
        out = copy.copy(tree)
        for key, value in tree.items():
            out[key] = _zeros(value, recorded, batch)  # type: ignore[index]
        return out
    return tree


@contextmanager
def swapped(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an instance attribute and put back what was there, even if that was nothing."""
    before = vars(target).get(name, MISSING)
    vars(target)[name] = value
    try:
        yield
    finally:
        if before is MISSING:
            vars(target).pop(name, None)
        else:
            vars(target)[name] = before


@contextmanager
def constant_noise(kind: type, extra: dict[str, Any], value: float | None) -> Iterator[None]:
    """Let ``randn_tensor`` in a pipeline's module return a constant; does nothing for None."""
    if value is None:
        yield
        return
    spaces = [extra] + [vars(inspect.getmodule(c)) for c in kind.__mro__ if inspect.getmodule(c) is not None]

    def constant(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> Tensor:
        return torch.full(tuple(shape), value, device=device, dtype=dtype)

    before = [(space, space["randn_tensor"]) for space in spaces if "randn_tensor" in space]
    for space, _ in before:
        space["randn_tensor"] = constant
    try:
        yield
    finally:
        for space, old in reversed(before):
            space["randn_tensor"] = old


def _fresh(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Copy lists: some pipelines edit the caller's prompt list in place."""
    return {k: list(v) if type(v) is list else v for k, v in arguments.items()}


class _Silent:
    """A progress bar that shows nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, n: int = 1) -> None:
        """Count nothing."""

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Close nothing."""


@functools.cache
def _shadow_class(kind: Any) -> Any:  # noqa: C901 - a list of small overrides
    """Return a subclass of a pipeline class whose encoders, latents and bookkeeping go through the session."""

    def wrap(name: str, handler: Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> Any:
        method = getattr(kind, name)

        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return handler(self, MethodType(method, self), args, kwargs)

        return wrapped

    def encode(self: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run: _Run = vars(self)["_flowalign_run"]
        bound = inspect.signature(method).bind(*args, **kwargs).arguments
        bound.update(bound.pop("kwargs", {}))
        return run.tap.memo.prompts(method, method.__name__, dict(bound), run.session.batch)

    def prepare(self: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return vars(self)["_flowalign_run"].on_prepare("latents", method, args, kwargs)

    def progress_bar(self: Any, iterable: Any = None, total: Any = None, **_: Any) -> Any:
        return iterable if iterable is not None else _Silent()

    def execution_device(self: Any) -> Any:
        tap: Tap = vars(self)["_flowalign_run"].tap
        module = next((m for k, m in tap.modules().items() if k not in tap.freed), None)
        first = None if module is None else next(iter(module.parameters()), None)
        here = None if first is None else first.device
        if tap.device is None or tap.device[0] != here:  # the property walks all modules; ask again only if moved
            tap.device = (here, here if tap.freed else kind._execution_device.fget(self))
        return tap.device[1]

    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "progress_bar": progress_bar,
        "maybe_free_model_hooks": lambda self: None,
        "_execution_device": property(execution_device),
    }
    for name in dir(kind):
        if name.startswith("encode_prompt") and inspect.isfunction(inspect.getattr_static(kind, name)):
            members[name] = wrap(name, encode)
    if callable(getattr(kind, "prepare_latents", None)):
        members["prepare_latents"] = wrap("prepare_latents", prepare)
    return builtins.type(kind.__name__, (kind,), members)
