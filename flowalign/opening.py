"""What names stand for: devices, rewards, pipelines, functions of the user's. Names are checked before weights load."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from flowalign.facts import WORLDS
from flowalign.named import function
from flowalign.protocols import Pipeline, Reward

__all__ = [
    "check_pipeline", "check_rewards", "open_pipeline", "open_reward", "open_rewards", "pick_device",
    "plain_source", "reward_weights",
]  # fmt: skip


def pick_device(name: str) -> torch.device:
    """Return the device; ``auto`` takes CUDA where there is one.

    Raises:
        ValueError: for a device that does not exist, or is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"there is no device {name!r}: write auto, cpu, cuda, cuda:1 or mps.") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} of them" if count else "none (no NVIDIA GPU, no driver, or a torch without CUDA)"
        raise ValueError(
            f"device {name!r} is a CUDA device, and torch finds {found}. Leave device at auto, or take cpu."
        )
    return device


def _parsed(spec: str) -> dict[str, tuple[str, float]]:
    """Return name → (specification without weight, weight).

    Raises:
        ValueError: for a reward that is named twice.
    """
    from flowalign import rewards

    out: dict[str, tuple[str, float]] = {}
    seen: set[tuple[str, str | None]] = set()
    for term in rewards.parse(spec):
        key = term.name if term.name not in out else f"{term.name}@{term.weights}"
        if (term.name, term.weights) in seen:
            raise ValueError(
                f"the specification {spec!r} names {term.name!r} twice: name it once, with its whole weight."
            )
        seen.add((term.name, term.weights))
        out[key] = (term.name if term.weights is None else f"{term.name}@{term.weights}", term.weight)
    return out


def open_rewards(spec: str, device: torch.device) -> dict[str, Reward]:
    """Return the rewards of a specification, each by itself and without its weight."""
    from flowalign import rewards

    return {name: rewards.load(one, device=device) for name, (one, _) in _parsed(spec).items()}


def reward_weights(spec: str) -> dict[str, float]:
    """Return the weight of each reward of a specification, under the names of :func:`open_rewards`."""
    return {name: weight for name, (_, weight) in _parsed(spec).items()}


def open_reward(spec: str, device: str = "auto") -> Reward:
    """Return the reward of a specification."""
    from flowalign import rewards

    return rewards.load(spec, device=pick_device(device))


def open_pipeline(
    name: str, call: Mapping[str, Any], guided: Sequence[bool], device: torch.device, dtype: torch.dtype | None = None
) -> list[Pipeline]:
    """Return a generator once for each answer to whether its guidance rule is on; all share their networks.

    Raises:
        ValueError: for a pipeline that does not exist, with the nearest names, or that cannot be loaded, with why.
    """
    if ":" in name:
        return [function(name)()] * len(guided)
    from flowalign.pipelines import load

    _hush()
    facts, where = WORLDS.get(name), _location(name)
    options = {**(facts.call if facts else {}), **call}
    try:
        made: dict[bool, Any] = {guided[0]: load(where, options, guided=guided[0], device=device, dtype=dtype)}
    except OSError as error:  # what diffusers and the hub raise for files that are not there, and for no connection
        raise ValueError(_unread(name, error)) from error
    pipe = made[guided[0]].pipe
    pipe.set_progress_bar_config(disable=True)
    for on in guided[1:]:
        made.setdefault(on, load(pipe, options, guided=on, check=False) if on not in made else None)
    return [cast(Pipeline, made[on]) for on in guided]


def _unread(name: str, error: OSError) -> str:
    """Return one paragraph on a pipeline whose files cannot be read."""
    why = " ".join(str(error).split())
    why = why if len(why) <= 300 else why[:300].rsplit(" ", 1)[0] + " ..."
    if Path(name).exists():
        return f"{name} cannot be loaded as a diffusers pipeline, a folder written by save_pretrained: {why}"
    return f"there is no folder {name}, and the hub id {name} cannot be loaded: {why}"


def _hush() -> None:
    """Switch off the bars that loading draws: a run has its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def check_rewards(*specs: str) -> None:
    """Refuse unknown rewards before anything is loaded.

    Raises:
        ValueError: with the nearest names.
    """
    from flowalign import rewards

    for spec in filter(None, specs):
        for term in rewards.parse(spec):
            rewards.locate(term.name)


def check_pipeline(name: str) -> None:
    """Refuse an unknown pipeline before anything is loaded.

    Raises:
        ValueError: with the nearest names.
    """
    if ":" not in name:
        _location(name)


def _location(name: str) -> str:
    from flowalign.pipelines import worlds

    here = Path(worlds.__file__).parent / "weights" / name
    if here.is_dir():
        return str(here)
    if Path(name).exists() or name.count("/") == 1:
        return name
    known = sorted(p.name for p in here.parent.iterdir() if p.is_dir()) if here.parent.is_dir() else []
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"Nearest demo worlds: {', '.join(close)}." if close else f"Demo worlds: {', '.join(known) or 'none'}."
    raise ValueError(
        f"no pipeline is called {name!r}. {hint} Otherwise give a folder written by save_pretrained, a hub id "
        "(owner/name), or module:function of your own."
    )


def plain_source(name: str, pipeline: Pipeline) -> str | None:
    """Return what ``DiffusionPipeline.from_pretrained`` finds a generator by; None for one that is not diffusers'."""
    from flowalign.pipelines import worlds
    from flowalign.pipelines.adapter import Adapter

    if not isinstance(pipeline, Adapter):
        return None
    return str(worlds.path(name)) if name in worlds.WORLDS else name
