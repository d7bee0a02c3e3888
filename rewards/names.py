"""Rewards by name: the dictionary, and the little language of reward specifications.

    spec := term ("," term)*        term := name ["?" option "=" value ("&" ...)*] ["@" weights] [":" weight]

``name`` is a key of ``REWARDS`` or a user's ``module:Class``; options are arguments of the class, as in
``geneval?mode=partial`` or ``pickscore?divisor=26``, and ``unjudged=VALUE`` gives samples that cannot be judged a value
of the user's choice; ``weights`` is a hub id, a path or a URL, handed over as the argument ``weights``; ``weight`` is a
number, 1 where it is left out. A term's weight is what stands after its last colon if that reads as a number, so
``my_module:MyReward:0.5`` and ``remote@http://judge:8000:0.5`` work.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flowalign.protocols import Card, Reward

__all__ = ["REWARDS", "Term", "cards", "load", "locate", "parse"]

_HERE = "flowalign.rewards."

REWARDS: dict[str, str] = {
    "aesthetic": _HERE + "aesthetic:Aesthetic",
    "clap": _HERE + "clap:Clap",
    "clip": _HERE + "clip:ClipScore",
    "clip-hf": _HERE + "clip:HFClipScore",
    "clip-iqa": _HERE + "quality:ClipIqa",
    "compressibility": _HERE + "jpeg:Compressibility",
    "dino": _HERE + "dino:DinoSimilarity",
    "dino-adversarial": _HERE + "discriminator:Discriminator",
    "dynamic-degree": _HERE + "motion:DynamicDegree",
    "face": _HERE + "face:FaceIdentity",
    "frames": _HERE + "frames:FrameReward",
    "frechet": _HERE + "sets:FrechetSet",
    "full-reference": _HERE + "quality:FullReference",
    "geneval": _HERE + "geneval:GenEval",
    "hps": _HERE + "hps:HPS",
    "hps-crop": _HERE + "hps:HPSCrop",
    "hps3": _HERE + "hps3:HPS3",
    "idm": _HERE + "idm:ActionAgreement",
    "imagereward": _HERE + "imagereward:ImageReward",
    "incompressibility": _HERE + "jpeg:Incompressibility",
    "judge": _HERE + "judge:OpenAIJudge",
    "log-spectral": _HERE + "audio_signal:LogSpectralDistance",
    "lpips": _HERE + "quality:LPIPS",
    "mmd": _HERE + "sets:MMDSet",
    "motion-smoothness": _HERE + "motion:MotionSmoothness",
    "newton": _HERE + "newton:Newton",
    "ocr": _HERE + "ocr:OCR",
    "pickscore": _HERE + "pickscore:PickScore",
    "promptecho": _HERE + "promptecho:PromptEcho",
    "psnr": _HERE + "quality:PSNR",
    "remote": _HERE + "remote:RemoteReward",
    "rewarddance": _HERE + "rewarddance:RewardDance",
    "shapes": _HERE + "shapes:ShapesJudge",
    "shapes-clip": _HERE + "shapes_clip:ShapesClip",
    "shapes-edit": _HERE + "shapes_edit:ShapesEdit",
    "shapes-video": _HERE + "shapes_video:ShapesVideo",
    "si-sdr": _HERE + "audio_signal:SISDR",
    "smoothness": _HERE + "quality:Smoothness",
    "spatial": _HERE + "spatial:Spatial",
    "ssim": _HERE + "quality:SSIM",
    "trained": _HERE + "training:Trained",
    "vendi": _HERE + "sets:VendiSet",
    "videoreward": _HERE + "videoreward:VideoReward",
    "vqa": _HERE + "vqa:VQAScore",
}
"""Name to ``module:Class``; the class has a class attribute ``card``. One line per reward, in alphabetical order."""


@dataclass(frozen=True)
class Term:
    """One reward of a specification.

    Attributes:
        name: its name or dotted path, with its options if there are any.
        weights: where its weights lie; None for the published ones.
        weight: its factor.
    """

    name: str
    weights: str | None = None
    weight: float = 1.0


def parse(spec: str) -> list[Term]:
    """Split a specification into terms.

    Raises:
        ValueError: an empty term or a weight that is not finite.
    """
    terms = []
    for part in spec.split(","):
        text, weight = part.strip(), 1.0
        head, _, tail = text.rpartition(":")
        if head and _is_number(tail) and not _is_port(head, tail):
            text, weight = head.strip(), float(tail)
        name, _, weights = (s.strip() for s in text.partition("@"))
        if not name or name.startswith(":") or not math.isfinite(weight):
            raise ValueError(
                f"reward specification {spec!r} has a bad term {part!r}: write "
                "name[?option=value][@weights][:weight], with commas."
            )
        terms.append(Term(name, weights or None, weight))
    return terms


def _is_port(head: str, tail: str) -> bool:
    """Whether ``tail`` is the port of a URL that has none yet: ``remote@http://judge:8000`` has no weight."""
    return "://" in head and ":" not in head.partition("://")[2] and tail.isdigit()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def locate(name: str) -> Any:
    """Return the class or factory that ``name`` (a key of ``REWARDS`` or ``module:attribute``) stands for.

    Raises:
        ValueError: no such reward; the nearest valid names are given. A user's module that fails to import, or lacks
            the attribute, says so by name.
    """
    name = name.partition("?")[0].strip()
    path = REWARDS.get(name, name)
    module, _, attribute = path.partition(":")
    if not attribute:
        near = difflib.get_close_matches(name, REWARDS, n=4, cutoff=0.4)
        hint = f"Nearest: {', '.join(near)}." if near else f"Known: {', '.join(sorted(REWARDS))}."
        raise ValueError(f"no reward is called {name!r}. {hint} A reward of your own is written module:Class.")
    if name not in REWARDS and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the console script's path lacks the folder in which the user's module lies
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0] and error.name != module:
            raise  # the module is there, something that it needs is not: its own message is the better one
        raise ValueError(f"reward {name!r}: no module {module!r} is found; is its folder on PYTHONPATH?") from error
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, dir(found), n=3, cutoff=0.4)
        raise ValueError(
            f"reward {name!r}: {module} has no {attribute!r}; it has {', '.join(near) or 'none'}"
        ) from error


def load(
    spec: str,
    *,
    device: torch.device | str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Reward:
    """Build the reward that a specification names.

    Args:
        spec: see the module; several terms give their weighted sum.
        device: where networks go; None leaves them on the CPU.
        options: constructor arguments by reward name, e.g. ``{"clip": {"scale": 100}}``.

    Raises:
        ValueError: unknown names, with the nearest valid ones; options for a reward that the spec does not name.
    """
    terms = parse(spec)
    options = dict(options or {})
    stray = set(options) - {t.name for t in terms}
    if stray:
        raise ValueError(f"options for {sorted(stray)}, which the specification {spec!r} does not name.")
    factories = [locate(t.name) for t in terms]  # all names are checked before any weights load
    rewards = [_build(t, make, device, options.get(t.name, {})) for t, make in zip(terms, factories, strict=True)]
    if len(terms) == 1 and terms[0].weight == 1.0:
        return rewards[0]
    from flowalign.rewards.algebra import Weighted

    return Weighted(rewards, [t.weight for t in terms])


def _build(term: Term, make: Any, device: torch.device | str | None, options: Mapping[str, Any]) -> Reward:
    kwargs = {**_query(term.name), **options}
    fill_in = kwargs.pop("unjudged", None)
    if term.weights is not None:
        kwargs["weights"] = term.weights
    ready = not isinstance(make, type) and isinstance(make, Reward)  # a function made a reward by its decorator
    if ready and kwargs:
        raise ValueError(f"{term.name!r} is a ready reward and takes no weights or options; got {sorted(kwargs)}.")
    if not ready:
        _check_options(term.name, make, kwargs)
    reward = make if ready else make(**kwargs)
    if not isinstance(reward, Reward):
        raise ValueError(
            f"{term.name!r} gave a {type(reward).__name__}, not a reward: it needs a `card` and "
            "__call__(media, prompts, meta) -> (B,) scores."
        )
    if device is not None and isinstance(reward, torch.nn.Module):
        reward.to(device)
    if fill_in is None:
        return reward
    from flowalign.rewards.transforms import Masked, Substitute

    return Masked(reward) if fill_in == "mask" else Substitute(reward, _value(term.name, fill_in))


def _value(name: str, text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name!r}: unjudged is a number, or mask; got {text!r}.") from error


def _query(name: str) -> dict[str, Any]:
    """Return the options after ``?``; values are read as JSON where they can be, else as text."""
    found: dict[str, Any] = {}
    for part in filter(None, name.partition("?")[2].split("&")):
        key, given, text = part.partition("=")
        if not given or not key.strip().isidentifier():
            raise ValueError(f"reward {name!r}: options are written name?option=value&option=value; got {part!r}.")
        try:
            found[key.strip()] = json.loads(text)
        except ValueError:
            found[key.strip()] = text.strip()
    return found


def _check_options(name: str, make: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that the class does not have, and their lack where it needs some, before its weights load."""
    signature = inspect.signature(make)
    known = signature.parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key in kwargs:
        if key not in known and not open_ended:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or sorted(known)
            raise ValueError(f"reward {name!r} has no option {key!r}; nearest: {', '.join(near) or 'it has none'}.")
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        hint = (
            "A function that scores becomes a reward by the decorator @reward(name) of flowalign.rewards.algebra."
            if "media" in known
            else f"Give it as an option: {name}?option=value."
        )
        raise ValueError(f"reward {name!r} cannot be made: {error}. {hint}") from error


def cards() -> list[Card]:
    """Return the card of every known reward, by name; no weights are loaded."""
    return [locate(name).card for name in sorted(REWARDS)]
