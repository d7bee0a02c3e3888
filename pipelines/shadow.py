"""The shadow of a pipeline: an object of a subclass with the same components and an instance dictionary of its own.

The pipeline's code runs on it, so that nothing the call writes on ``self`` reaches the user's pipeline. Its encoders
and ``prepare_latents`` go through the run (:mod:`~flowalign.pipelines.run`) that stands in its dictionary.
"""

from __future__ import annotations

import builtins
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowalign.pipelines.run import Run
    from flowalign.pipelines.tap import Tap

__all__ = ["RUN", "shadow_class"]

RUN = "_flowalign_run"


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
def shadow_class(kind: Any) -> Any:  # noqa: C901 - a list of small overrides
    """Return a subclass of a pipeline class whose encoders, latents and bookkeeping go through the session."""

    def wrap(name: str, handler: Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> Any:
        method = getattr(kind, name)

        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return handler(self, MethodType(method, self), args, kwargs)

        return wrapped

    def encode(self: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run: Run = vars(self)[RUN]
        bound = inspect.signature(method).bind(*args, **kwargs).arguments
        bound.update(bound.pop("kwargs", {}))
        return run.tap.memo.prompts(method, method.__name__, dict(bound), run.session.batch)

    def prepare(self: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return vars(self)[RUN].on_prepare("latents", method, args, kwargs)

    def progress_bar(self: Any, iterable: Any = None, total: Any = None, **_: Any) -> Any:
        return iterable if iterable is not None else _Silent()

    def execution_device(self: Any) -> Any:
        tap: Tap = vars(self)[RUN].tap
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
