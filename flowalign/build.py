"""From a configuration to the parts of a run; everything that can be wrong is found here, before any long work.

This is where methods, pipelines and rewards meet, so it imports both outside worlds, lazily.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flowalign.allocate import make_source
from flowalign.config import RunConfig
from flowalign.evaluate import Exam, Layouts
from flowalign.learner import Learner, learners_of
from flowalign.noise import mix
from flowalign.policy import Policy
from flowalign.precision import run_context
from flowalign.prompts import read_prompts
from flowalign.protocols import Card, Meta, Pipeline, Reward
from flowalign.scorer import Scorer
from flowalign.source import Prompt, Source
from flowalign.steer import SteerConfig

__all__ = ["WORLDS", "Facts", "Job", "Shuffled", "build", "open_pipeline", "open_reward"]


@dataclass(frozen=True)
class Facts:
    """What a run on a demo world takes by default.

    Attributes:
        judge: strict reward, the truth that accuracies are reported by.
        held: rewards that the checks of a run watch beside those, where none are asked for; "" for none.
        layouts: ``module:function`` that names arrangements; "" for none.
        train: prompt set to learn from; ``focus`` is the train split with seven prompts of the focus to one other.
        focus: category that has room to improve.
        check: set that recipes are chosen on.
        report: set that figures are reported on.
        call: arguments of the pipeline's call at its best.
    """

    judge: str
    held: str = ""
    layouts: str = ""
    train: str = "focus"
    focus: str = "count"
    check: str = "select"
    report: str = "report"
    call: Mapping[str, Any] = field(default_factory=dict)


WORLDS: dict[str, Facts] = {
    "shapes": Facts("shapes", "shapes-clip", "flowalign.layouts:shapes", call={"guidance_scale": 1.0}),
    "shapes-turbo": Facts("shapes", "shapes-clip", "flowalign.layouts:shapes", call={"guidance_scale": 1.0}),
}


class Shuffled:
    """A reward whose scores are exchanged among the samples of the same prompt: the control that must not learn.

    The permutation is a function of the scores' own media, so that a resumed run repeats it.
    """

    def __init__(self, reward: Reward, seed: int = 0) -> None:
        self.reward, self.seed = reward, seed

    @property
    def card(self) -> Card:
        """The card of the reward inside."""
        return self.reward.card

    def learners(self) -> tuple[Learner, ...]:
        """Return what learns in the reward inside: the control differs from the run in nothing but the order."""
        return learners_of([self.reward])

    def __call__(self, media: Tensor, prompts: Sequence[str], meta: Meta | None = None) -> Tensor:
        """Score, then permute within each prompt."""
        scores = self.reward(media, prompts, meta)
        g = torch.Generator().manual_seed(mix(self.seed, int(media.double().sum().cpu().view(torch.int64))))
        out = scores.clone()
        for prompt in dict.fromkeys(prompts):
            mine = torch.tensor([i for i, p in enumerate(prompts) if p == prompt])
            out[mine] = scores[mine[torch.randperm(len(mine), generator=g)]]
        return out


@dataclass
class Job:
    """The parts of a run.

    Attributes:
        config: what was asked for.
        pipeline: the generator as it is trained.
        judged: the same generator as it is evaluated, which may differ in guidance.
        scorer: of the training.
        judge: of the evaluation; its first reward is the headline.
        watch: of the checks: the judge's rewards, the world's held-out ones, then what else is trained on.
        source: training prompts.
        exam: final evaluation.
        check: small evaluation while training; None for none.
        layouts: names arrangements; None where diversity is not measured.
        context: entered around every forward pass.
        frozen: entered instead where no gradients flow and no densities are compared.
    """

    config: RunConfig
    pipeline: Pipeline
    judged: Pipeline
    scorer: Scorer
    judge: Scorer
    watch: Scorer
    source: Source
    exam: Exam
    check: Exam | None
    layouts: Layouts | None
    context: Callable[[], AbstractContextManager[Any]]
    frozen: Callable[[], AbstractContextManager[Any]]


def build(config: RunConfig) -> Job:
    """Open everything that a configuration names.

    Raises:
        ValueError: for whatever does not exist, with the nearest names that do.
    """
    e, facts = config.evaluation, WORLDS.get(config.pipeline)
    if ":" not in config.pipeline:
        _location(config.pipeline)  # a name that is misspelt is found before prompts are missed that it would bring
    spec = _set(config.prompts, config, facts, "train")
    if not spec:
        raise ValueError(
            f"no prompts are given, and {config.pipeline!r} is no demo world that brings its own. Set prompts to a "
            "text file with one prompt a line, a .jsonl file, or a dataset's id."
        )
    prompts = read_prompts(spec, world_prompts)
    held = read_prompts(_set(e.prompts, config, facts, "report") or spec, world_prompts)
    small = read_prompts(_set(e.check_prompts, config, facts, "check") or spec, world_prompts)
    _check_names(config.reward, e.rewards or "", facts.judge if facts is not None else "")
    device = pick_device(config.device)
    pipeline, judged = open_pipeline(config.pipeline, config.call, [config.guidance, e.guidance], device)
    plain = open_rewards(config.reward, device)
    rewards = {n: (Shuffled(r, config.fit.seed) if config.permute else r) for n, r in plain.items()}
    weights = reward_weights(config.reward)
    judge_spec = e.rewards if facts is None else ", ".join(filter(None, (facts.judge, e.rewards)))
    judges = open_rewards(judge_spec, device) if judge_spec else plain
    watched = facts.held if facts is not None and e.every and e.rewards is None else ""
    aside = open_rewards(watched, device) if watched else {}
    steps = e.steps or config.fit.steps
    return Job(
        config, pipeline, judged,
        Scorer(pipeline, rewards, weights),
        Scorer(judged, judges),
        Scorer(judged, {**judges, **{n: r for n, r in {**aside, **plain}.items() if n not in judges}}),
        make_source(prompts, config.allocation, config.fit.seed),
        Exam(held, e.images, steps, e.batch, e.seed, config.keep_images),
        Exam(small, _per_category(small, e.check), steps, e.batch, e.seed + 1, 8) if e.every else None,
        _layouts(config, facts),
        run_context(config.precision, device),
        run_context(config.precision, device, gradients=False),
    )  # fmt: skip


def resolve_world(config: RunConfig) -> RunConfig:
    """Spell out what the demo world of a configuration brings, so that its pipeline can be replaced by a saved one."""
    facts = WORLDS.get(config.pipeline)
    if facts is None:
        return config
    e = config.evaluation
    rewards = ", ".join(filter(None, (facts.judge, e.rewards)))
    spelled = replace(
        e, prompts=_set(e.prompts, config, facts, "report"), rewards=rewards,
        layouts=e.layouts or facts.layouts or None, check_prompts=_set(e.check_prompts, config, facts, "check"),
    )  # fmt: skip
    return replace(
        config,
        prompts=_set(config.prompts, config, facts, "train"),
        evaluation=spelled,
        call={**facts.call, **config.call},
    )


def _set(given: str | None, config: RunConfig, facts: Facts | None, which: str) -> str:
    """Return a prompt specification: the one given, the world's own, or nothing."""
    if given or facts is None:
        return given or ""
    return f"{config.pipeline}:{getattr(facts, which)}"


def _layouts(config: RunConfig, facts: Facts | None) -> Layouts | None:
    path = config.evaluation.layouts or (facts.layouts if facts is not None else "")
    return _function(path) if path else None


def _check_names(*specs: str) -> None:
    """Refuse unknown rewards before anything is loaded."""
    from flowalign import rewards

    for spec in filter(None, specs):
        for term in rewards.parse(spec):
            rewards.locate(term.name)


def _per_category(prompts: Sequence[Prompt], images: int) -> int:
    kinds = {str(p.meta.get("category", "all")) for p in prompts}
    return max(1, images // len(kinds))


# -- what is named ---------------------------------------------------------------------------------------------------
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
        ValueError: for a pipeline that does not exist, with the nearest names.
    """
    if ":" in name:
        return [_function(name)()] * len(guided)
    from flowalign.pipelines import load

    _hush()
    facts = WORLDS.get(name)
    options = {**(facts.call if facts else {}), **call}
    made: dict[bool, Any] = {guided[0]: load(_location(name), options, guided=guided[0], device=device, dtype=dtype)}
    pipe = made[guided[0]].pipe
    pipe.set_progress_bar_config(disable=True)
    for on in guided[1:]:
        made.setdefault(on, load(pipe, options, guided=on, check=False) if on not in made else None)
    return [cast(Pipeline, made[on]) for on in guided]


def _hush() -> None:
    """Switch off the bars that loading draws: a run has its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def open_parts(config: SteerConfig) -> tuple[Pipeline, Scorer, list[Prompt], Policy]:
    """Return generator, rewards, prompts and policy of a steering run.

    Raises:
        ValueError: for whatever does not exist.
    """
    facts = WORLDS.get(config.pipeline)
    if ":" not in config.pipeline:
        _location(config.pipeline)
    spec = config.prompts or (f"{config.pipeline}:{facts.report}" if facts is not None else "")
    if not spec:
        raise ValueError("no prompts are given: set prompts to a file, or write the prompt itself.")
    looks_like_text = " " in spec and not Path(spec).exists()
    prompts = [Prompt(spec)] if looks_like_text else read_prompts(spec, world_prompts)
    _check_names(config.reward)
    device = pick_device(config.device)
    generator = open_pipeline(config.pipeline, config.call, [config.guidance], device)[0]
    weights = reward_weights(config.reward)
    scorer = Scorer(generator, open_rewards(config.reward, device), weights)
    policy = Policy(generator, context=run_context(config.precision, device))
    return generator, scorer, prompts[: config.limit], policy


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


def world_prompts(world: str, name: str) -> list[Prompt]:
    """Return a prompt set of a demo world.

    Raises:
        KeyError: for a world that is not known.
        ValueError: for a set that it does not have.
    """
    if world not in WORLDS:
        raise KeyError(world)
    from flowalign.pipelines import worlds

    folder = Path(worlds.__file__).parent / "prompts"
    if name == "focus":
        return _focus(read_prompts(str(folder / "train.jsonl")), WORLDS[world].focus)
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        known = ["focus", *sorted(p.stem for p in folder.glob("*.jsonl"))]
        raise ValueError(f"world {world} has no prompt set {name!r}; it has {', '.join(known)}.")
    return read_prompts(str(path))


def _focus(prompts: Sequence[Prompt], focus: str, share: int = 7) -> list[Prompt]:
    """Return prompts of which ``share`` in ``share + 1`` are of one category, the others evenly of the other ones."""
    mine = [p for p in prompts if p.meta.get("category") == focus]
    kinds = list(dict.fromkeys(p.meta.get("category") for p in prompts if p.meta.get("category") != focus))
    rest = [[p for p in prompts if p.meta.get("category") == k] for k in kinds]
    others = [p for depth in range(max(map(len, rest))) for r in rest for p in r[depth : depth + 1]]
    times = -(-share * len(others) // len(mine)) if len(others) < len(mine) else share
    wanted = -(-times * len(mine) // share)
    return mine * times + others[:wanted]


def _function(path: str) -> Any:
    """Return ``module:attribute``; the working directory counts as on the path, as it does for ``python -m``."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}.") from error
