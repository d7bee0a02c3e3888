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

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from flowalign.pipelines.memo import Memo
from flowalign.pipelines.quirks import repairs
from flowalign.pipelines.run import Run
from flowalign.pipelines.session import Halt, Session
from flowalign.pipelines.shadow import RUN, shadow_class
from flowalign.pipelines.track import enumerate_track

__all__ = ["Tap"]


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
        self.shadow_class = shadow_class(kind)
        self.device: tuple[Any, Any] | None = None
        self.repairs: tuple[Any, list[tuple[nn.Module, str, Any]]] | None = None
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

    def repaired(self) -> list[tuple[nn.Module, str, Any]]:
        """Return what is to be set on the networks while gradients are on; looked for once."""
        modules = self.modules()
        key = tuple(map(id, modules.values()))
        if self.repairs is None or self.repairs[0] != key:
            self.repairs = (key, repairs(modules.values()))
        return self.repairs[1]

    def call(self, arguments: Mapping[str, Any], session: Session) -> Any:
        """Run the pipeline under a session; None where the session left it early.

        The caller's gradient mode holds from ``prepare_latents`` on and is given back, as is the random state.
        """
        shadow: Any = object.__new__(self.shadow_class)
        vars(shadow).update(vars(self.pipe))
        grad, state = torch.is_grad_enabled(), torch.random.get_rng_state()
        run = Run(self, session, shadow, grad, state)
        vars(shadow)[RUN] = run
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


def _fresh(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Copy lists: some pipelines edit the caller's prompt list in place."""
    return {k: list(v) if type(v) is list else v for k, v in arguments.items()}
