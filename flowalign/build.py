"""From a configuration to the parts of a run; everything that can be wrong is found here, before any long work.

What names stand for is in :mod:`flowalign.opening`, what the demo worlds bring in :mod:`flowalign.facts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.allocate import make_source
from flowalign.config import RunConfig
from flowalign.evaluate import Exam, Layouts
from flowalign.facts import WORLDS, Facts, resolve_world, world_prompts
from flowalign.learner import Learner, learners_of
from flowalign.named import function
from flowalign.noise import mix
from flowalign.opening import (
    check_pipeline,
    check_rewards,
    open_pipeline,
    open_reward,
    open_rewards,
    pick_device,
    reward_weights,
)  # fmt: skip
from flowalign.policy import Policy
from flowalign.precision import run_context
from flowalign.prompts import read_prompts
from flowalign.protocols import Card, Meta, Pipeline, Reward
from flowalign.scorer import Scorer
from flowalign.source import Prompt, Source
from flowalign.steer import SteerConfig

__all__ = [
    "WORLDS", "Facts", "Job", "Shuffled", "build", "open_parts", "open_pipeline", "open_reward", "open_rewards",
    "pick_device", "resolve_world", "reward_weights", "world_prompts",
]  # fmt: skip


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

    @property
    def resolved(self) -> RunConfig:
        """The configuration with what a demo world and this machine bring."""
        return replace(resolve_world(self.config), device=str(pick_device(self.config.device)))

    @property
    def mark(self) -> dict[str, Any]:
        """What must agree for two evaluations to be paired: generator, call, what is asked, who judges."""
        whole = self.resolved
        return self.exam.mark | {
            "pipeline": whole.pipeline, "call": dict(whole.call), "guidance": whole.evaluation.guidance,
            "precision": whole.precision, "rewards": sorted(self.judge.rewards), "layouts": whole.evaluation.layouts,
        }  # fmt: skip


def build(config: RunConfig) -> Job:
    """Open everything that a configuration names.

    Raises:
        ValueError: for whatever does not exist, with the nearest names that do.
    """
    check_pipeline(config.pipeline)  # before the prompts are missed that the world meant would bring
    facts, whole = WORLDS.get(config.pipeline), resolve_world(config)
    e, spec = whole.evaluation, whole.prompts
    if not spec:
        raise ValueError(
            f"no prompts are given, and {config.pipeline!r} is no demo world that brings its own. Set prompts to a "
            "text file with one prompt a line, a .jsonl file, or a dataset's id."
        )
    prompts = read_prompts(spec, world_prompts)
    held = read_prompts(e.prompts or spec, world_prompts)
    small = read_prompts(e.check_prompts or spec, world_prompts)
    check_rewards(config.reward, e.rewards or "")
    device = pick_device(config.device)
    pipeline, judged = open_pipeline(config.pipeline, config.call, [config.guidance, e.guidance], device)
    plain = open_rewards(config.reward, device)
    rewards = {n: (Shuffled(r, config.fit.seed) if config.permute else r) for n, r in plain.items()}
    weights = reward_weights(config.reward)
    judges = open_rewards(e.rewards, device) if e.rewards else plain
    watched = facts.held if facts is not None and e.every and config.evaluation.rewards is None else ""
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
        function(e.layouts) if e.layouts else None,
        run_context(config.precision, device),
        run_context(config.precision, device, gradients=False),
    )  # fmt: skip


def _per_category(prompts: Sequence[Prompt], images: int) -> int:
    kinds = {str(p.meta.get("category", "all")) for p in prompts}
    return max(1, images // len(kinds))


def open_parts(config: SteerConfig) -> tuple[Pipeline, Scorer, list[Prompt], Policy]:
    """Return generator, rewards, prompts and policy of a steering run.

    Raises:
        ValueError: for whatever does not exist.
    """
    facts = WORLDS.get(config.pipeline)
    check_pipeline(config.pipeline)
    spec = config.prompts or (f"{config.pipeline}:{facts.report}" if facts is not None else "")
    if not spec:
        raise ValueError("no prompts are given: set prompts to a file, or write the prompt itself.")
    looks_like_text = " " in spec and not Path(spec).exists()
    prompts = [Prompt(spec)] if looks_like_text else read_prompts(spec, world_prompts)
    check_rewards(config.reward)
    device = pick_device(config.device)
    generator = open_pipeline(config.pipeline, config.call, [config.guidance], device)[0]
    weights = reward_weights(config.reward)
    scorer = Scorer(generator, open_rewards(config.reward, device), weights)
    policy = Policy(generator, context=run_context(config.precision, device))
    return generator, scorer, prompts[: config.limit], policy
