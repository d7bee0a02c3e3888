"""The one training loop.

Per iteration: draw prompts → roll out → decode and judge → credit → minibatches of what the objective wants → update →
roles and learners follow → metrics. A generator: a notebook plots live, the command line logs, a test stops early.

Whatever is random is a function of (seed, iteration), so a resumed run continues bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowalign import checkpoint
from flowalign.collect import Collector, collect
from flowalign.experience import same
from flowalign.fit_checks import check_gradients, check_processes, check_settings
from flowalign.keeper import Keeper
from flowalign.ledger import Ledger
from flowalign.minibatch import minibatches
from flowalign.noise import mix
from flowalign.options import FitOptions
from flowalign.pause import Away
from flowalign.policy import Policy
from flowalign.protocols import Pipeline
from flowalign.recipe import Recipe
from flowalign.restraint import anchors
from flowalign.scorer import Scorer
from flowalign.source import Draw, Source
from flowalign.trainer import Trainer

__all__ = ["FitOptions", "Metrics", "fit"]

Metrics = dict[str, float]


def never() -> bool:
    """Return False: nobody asks to stop."""
    return False


def fit(
    pipeline: Pipeline,
    scorer: Scorer,
    source: Source,
    recipe: Recipe,
    options: FitOptions,
    *,
    policy: Policy,
    parameters: list[nn.Parameter],
    accelerator: Any = None,
    folder: Path | None = None,
    resume: bool = False,
    stop: Callable[[], bool] = never,
) -> Iterator[Metrics]:
    """Train, yielding the metrics of each iteration.

    Args:
        pipeline: the generator.
        scorer: its judge.
        source: of prompts.
        recipe: the method.
        options: see :class:`FitOptions`.
        policy: from :func:`flowalign.prepare.prepare`, with the recipe's roles.
        parameters: what is trained.
        accelerator: an ``accelerate.Accelerator`` for several processes; None for one.
        folder: where checkpoints go; none are written without it. Of several processes the main one writes.
        resume: continue from the newest checkpoint of the folder.
        stop: asked before the first iteration and after each; a true answer, of any process, saves and ends the run
            (Ctrl-C, a user's own budget). Budgets are those of each process, and end all with the first.

    Raises:
        ValueError: before any sampling, for settings that cannot learn.
        RuntimeError: if the ratio at the first update is not one.
        FloatingPointError: for a gradient that is not finite.
        flowalign.pause.Away: a judge stayed away for longer than the scorer's patience; the run can be resumed.
    """
    check_settings(pipeline, recipe, options)
    check_gradients(pipeline, scorer, recipe)
    check_processes(source, options, accelerator, recipe.uneven)
    policy.ledger = scorer.ledger
    if recipe.objective.shaped:
        first = source.draw(0, 1, options.size)
        recipe.objective.prepare(tuple(pipeline.shape(pipeline.encode(first.prompts, first.meta))))
    trainer = Trainer(policy, parameters, recipe, source, options, accelerator, scorer.learners)
    if resume and folder is not None and (path := checkpoint.latest(folder)) is not None:
        trainer.load_state_dict(checkpoint.load(path))
    gather = same if accelerator is None else accelerator.gather
    collector = Collector(pipeline, scorer, policy, recipe, options.steps, options.seed, gather, options.overlap)
    keeper = Keeper(folder if _leads(accelerator) else None, trainer, options.checkpoint_every)
    if _agreed(stop(), accelerator):  # a run that is over is restored, and taken no further
        return
    if trainer.iteration == 0:
        for learner in trainer.learners:
            learner.before(collector, source, options)
    while trainer.iteration < options.iterations and not _agreed(_spent(policy.ledger, options), accelerator):
        try:
            with keeper.pausing(scorer, stop):
                metrics = _iterate(trainer, collector)
        except Away:
            if stop():
                return
            raise
        trainer.iteration += 1
        ended = _agreed(stop(), accelerator)
        last = ended or trainer.iteration >= options.iterations or _agreed(_spent(policy.ledger, options), accelerator)
        keeper.keep(metrics, last)
        yield {"iteration": float(trainer.iteration), **metrics}
        if ended:
            return


def _leads(accelerator: Any) -> bool:
    """Return whether this process writes the checkpoints: of several, all of which read them, one does."""
    return accelerator is None or accelerator.is_main_process


def _agreed(wish: bool, accelerator: Any) -> bool:
    """Return whether any process wishes it: clocks differ, and one that ended alone would leave the others waiting."""
    if accelerator is None or accelerator.num_processes == 1:
        return wish
    return bool(accelerator.gather(torch.tensor([wish], device=accelerator.device)).any())


def _iterate(trainer: Trainer, collector: Collector) -> Metrics:
    """Do one iteration."""
    o, recipe, ledger = trainer.options, trainer.recipe, trainer.policy.ledger
    draw = _share(trainer.source.draw(trainer.iteration, o.groups, o.size), trainer.accelerator)
    seen: dict[str, list[Tensor]] = {}
    collector.scorer.heard.clear()  # whoever judged before, it was not this iteration's samples
    experience = None
    if recipe.objective.wants != "grown":
        experience = collect(collector, draw, trainer.iteration)
    held = anchors(recipe.restraint, collector, draw, trainer.iteration)
    with ledger.phase("update"):
        fresh = True
        for update in range(o.updates):
            batches = minibatches(recipe, collector, experience, draw, o, trainer.iteration, update)
            span = o.accumulate or len(batches)
            for i, batch in enumerate(batches):
                size = min(span, len(batches) - i // span * span)
                for name, value in trainer.backward(batch, 1.0 / size, fresh).items():
                    seen.setdefault(name, []).append(value.float())
                fresh = False
                if (i + 1) % span == 0 or i + 1 == len(batches):
                    for name, value in trainer.hold(held).items():
                        seen.setdefault(name, []).append(value.float())
                    seen.setdefault("grad_norm", []).append(torch.tensor(trainer.step()))
    trainer.follow("old")
    metrics = {k: float(torch.stack([x.cpu() for x in v]).mean()) for k, v in seen.items()}
    if experience is not None:
        metrics |= _summarise(experience)
        trainer.source.observe(draw, experience.total.detach().cpu(), experience.trajectory.leaves.row)
        for learner in recipe.learners:
            metrics |= learner.observe(experience)
    metrics |= _teach(collector, mix(o.seed, trainer.iteration, 600))
    return metrics | {f"ledger/{k}": v for k, v in ledger.state_dict().items()}


def _teach(collector: Collector, seed: int) -> Metrics:
    """Let the rewards that learn do so, from what they told of this iteration's samples."""
    scorer, metrics = collector.scorer, Metrics()
    if scorer.learners:
        with collector.policy.ledger.phase("teach"):
            for learner in scorer.learners:
                told = [what for who, what in scorer.heard if who is learner]
                metrics |= learner.learn(told, seed, collector.gather)
    return metrics


def _share(draw: Draw, accelerator: Any) -> Draw:
    """Return this process's groups; a sample keeps its key, so its noise does not depend on who draws it."""
    if accelerator is None or accelerator.num_processes == 1:
        return draw
    n, groups = accelerator.num_processes, int(draw.group.max()) + 1
    if groups % n:
        raise ValueError(f"{groups} groups cannot be shared evenly by {n} processes; set groups to a multiple of {n}.")
    first = accelerator.process_index * (groups // n)
    return draw.part(range(first, first + groups // n))


def _summarise(experience: Any) -> Metrics:
    total, group = experience.total.detach().float().cpu(), experience.group[experience.trajectory.leaves.row]
    out = {f"reward/{k}": float(r.detach().mean()) for k, r in experience.rewards.items()}
    spread = torch.stack([total[group == g].std(correction=0) for g in group.unique()])
    return out | {
        "reward": float(total.mean()),
        "reward_std": float(spread.mean()),
        "dead": float((spread == 0).float().mean()),
    }


def _spent(ledger: Ledger, options: FitOptions) -> bool:
    late = options.max_seconds is not None and ledger.seconds >= options.max_seconds
    return late or (options.max_evaluations is not None and ledger.evaluations >= options.max_evaluations)
