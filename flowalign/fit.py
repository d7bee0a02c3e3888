"""The one training loop.

Per iteration: draw prompts → roll out → decode and judge → credit → minibatches of what the objective wants → update →
roles and learners follow → metrics. A generator: a notebook plots live, the command line logs, a test stops early.

Whatever is random is a function of (seed, iteration), so a resumed run continues bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowalign import checkpoint
from flowalign.adjoint import LeanAdjoint
from flowalign.collect import Collector, collect
from flowalign.credit import Group
from flowalign.experience import same
from flowalign.keeper import Keeper
from flowalign.ledger import Ledger
from flowalign.minibatch import minibatches
from flowalign.noise import mix
from flowalign.options import FitOptions
from flowalign.pause import Away
from flowalign.policy import Policy
from flowalign.protocols import Pipeline
from flowalign.recipe import Recipe, trained_steps
from flowalign.restraint import anchors
from flowalign.scorer import Scorer
from flowalign.source import Draw, Source
from flowalign.trainer import Trainer

__all__ = ["FitOptions", "Metrics", "check_gradients", "check_settings", "fit"]

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


@runtime_checkable
class Guided(Protocol):
    """A pipeline that can tell whether its own guidance rule is on."""

    guided: bool


def check_gradients(pipeline: Pipeline, scorer: Scorer, recipe: Recipe) -> None:
    """Refuse what has no gradient, or the wrong one, before any sampling.

    Raises:
        ValueError: a method that differentiates the reward with one that gives no gradient; guidance in the adjoint;
            a ceiling where each reward has an advantage of its own.
    """
    asked = recipe.credit is not None and recipe.credit.differentiates
    blind = [name for name, r in scorer.rewards.items() if not r.card.differentiable]
    if (asked or recipe.objective.wants == "grown") and blind:
        raise ValueError(
            f"this method differentiates the reward, and {', '.join(map(repr, blind))} gives no gradient (its card "
            "says differentiable=False). Take a differentiable reward (flowalign rewards marks them), or a method that "
            "only compares scores, e.g. diffusion-nft or flow-grpo."
        )
    guided = isinstance(pipeline, Guided) and pipeline.guided
    chained = isinstance(recipe.credit, LeanAdjoint) and recipe.credit.solver == "exact"
    if chained and (guided or recipe.guide is not None):
        raise ValueError(
            "guidance is on, and this method carries gradients back through the chain: a guided network's Jacobian is "
            "scaled up by the guidance at every step, and the adjoint blows up. Set guidance: false for training; the "
            "result can be sampled with guidance."
        )
    apart = recipe.per_reward or (isinstance(recipe.credit, Group) and recipe.credit.per_reward)
    if recipe.restraint.ceiling is not None and apart:
        raise ValueError(
            "restraint.ceiling cuts the weighted sum of the rewards, and this method has one advantage for each "
            "reward. Put a ceiling on the reward itself (flowalign.rewards.transforms.Clip)."
        )


def _spent(ledger: Ledger, options: FitOptions) -> bool:
    late = options.max_seconds is not None and ledger.seconds >= options.max_seconds
    return late or (options.max_evaluations is not None and ledger.evaluations >= options.max_evaluations)


def check_settings(pipeline: Pipeline, recipe: Recipe, options: FitOptions) -> None:
    """Refuse what cannot learn before any long work starts.

    Raises:
        ValueError: no step to train on, or groups too small to compare anything in.
    """
    wants = recipe.objective.wants
    if wants in ("transitions", "paths"):
        trained_steps(recipe, recipe.grid(pipeline.times(options.steps)), pipeline.process)
    if options.filter_groups and wants != "transitions":
        raise ValueError(
            f"fit.filter_groups leaves groups without variance out of a policy gradient; this objective trains on "
            f"{wants}, where they still count. Leave the option out."
        )
    if wants == "grown" and options.overlap > 1:
        raise ValueError(
            f"fit.overlap = {options.overlap} scores in another thread, without gradients; this method backpropagates "
            "through its rewards. Set overlap to 1."
        )
    if (wants == "pairs" or recipe.objective.paired) and options.size < 2:
        raise ValueError(f"preference pairs need size >= 2 samples per prompt; got {options.size}.")
    if recipe.objective.paired and options.batch % 2:
        raise ValueError(
            f"this objective compares samples in pairs, and batches of {options.batch} would part one: set fit.batch "
            "to an even number."
        )
    grouped = getattr(getattr(recipe.credit, "normalise", None), "center", None) == "group"
    if wants in ("transitions", "leaves") and grouped and options.size < 2 and recipe.select is None:
        raise ValueError(
            f"a group of {options.size} sample has no advantage: its reward is its group's mean. Set size to 2 or more."
        )


def check_processes(source: Source, options: FitOptions, accelerator: Any, uneven: bool = False) -> None:
    """Refuse what would make several processes draw or count differently, and hang.

    Raises:
        ValueError: for a source that follows rewards, or groups or samples left out by reward (``uneven``).
    """
    if accelerator is None or accelerator.num_processes == 1:
        return
    if uneven:
        raise ValueError(
            f"this method trains on the samples that its rewards choose: {accelerator.num_processes} processes would "
            "choose differently many and take different numbers of steps. Use one process."
        )
    if not source.alike or options.filter_groups:
        what = "fit.filter_groups" if options.filter_groups else "a source that follows the rewards"
        raise ValueError(
            f"{what} depends on the rewards that each process sees, so {accelerator.num_processes} processes would go "
            "different ways. Use one process, or even allocation without filtering."
        )
