"""The main job: evaluate, train, evaluate again, save, report.

    train(config)  →  folder with the resolved configuration, metrics, checkpoints, result, summary.json, report.html

Whatever may be wrong is found in the first seconds: names, prompts, settings that cannot learn, a reward that answers
NaN. After a crash or Ctrl-C the same call with ``resume=True`` goes on from the newest checkpoint, bit for bit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flowalign import checkpoint
from flowalign.ahead import check_trackers
from flowalign.build import Job, build
from flowalign.collect import Collector, collect
from flowalign.config import RunConfig
from flowalign.fit import fit
from flowalign.fit_checks import check_gradients, check_settings
from flowalign.folder import Folder
from flowalign.ledger import Ledger
from flowalign.methods.base import Training
from flowalign.monitor import Checker
from flowalign.paired import borrowed, judge_base, judge_trained, recall
from flowalign.policy import Policy, Weights
from flowalign.prepare import prepare
from flowalign.progress import Bars, patience, trackers
from flowalign.recipe import Recipe
from flowalign.result import save_result
from flowalign.summary import summarise

if TYPE_CHECKING:
    from flowalign.memory_plan import MemoryPlan

__all__ = ["Bars", "Run", "patience", "train"]

CHECKPOINTS = "checkpoints"
RECORDS = ("metrics.jsonl", "checks.jsonl")


@dataclass
class Run:
    """A run under way.

    Attributes:
        job: its parts.
        folder: where it writes.
        recipe: the method's choices.
        policy: of the training.
        parameters: what is trained.
        other: a policy with the same roles on the evaluated pipeline, with a ledger of its own.
        role: whose weights are evaluated and saved.
    """

    job: Job
    folder: Folder
    recipe: Recipe
    policy: Policy
    parameters: list[nn.Parameter]
    other: Policy
    role: str

    @contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """Book the seconds of a block under a name, and the network evaluations of the evaluated pipeline."""
        began, count = time.perf_counter(), self.other.ledger.evaluations
        yield
        more = self.other.ledger.evaluations - count
        self.folder.spend(**{name: time.perf_counter() - began, "evaluation_network_evaluations": more})


def train(config: RunConfig, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Do a whole run.

    Args:
        config: what to do.
        resume: go on with the run that the folder holds.
        progress: show bars.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ValueError: for a configuration that cannot work, before any long work.
    """
    run = start(config, resume)
    say = Bars(progress)
    before = judge_base(run, say)
    interrupted = _learn(run, say)
    after = None
    if not interrupted:
        after = judge_trained(run, say)
    with run.policy.playing(run.role):
        save_result(run.job, run.folder)
    for learner in run.recipe.learners:
        learner.export(run.folder.path / "result")
    summary = summarise(run, before, after, "interrupted" if interrupted else "done")
    from flowalign.report import write_report

    write_report([run.folder], run.folder.path / "report.html")
    return summary


def start(config: RunConfig, resume: bool = False) -> Run:
    """Check everything and open the folder.

    Raises:
        ValueError: see :func:`train`.
    """
    method = config.method
    if not isinstance(method, Training):
        raise ValueError(f"{method.name} is a steering method: it trains nothing. Run flowalign steer {method.name}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "flowalign train runs in one process; WORLD_SIZE says that there are several. Call flowalign.fit with an "
            "accelerate.Accelerator of your own for several."
        )
    Folder.check(config, resume)
    check_trackers(config.trackers)
    given = config.evaluation.base
    if given is not None and not given.is_file():
        raise ValueError(f"evaluation.base: there is no file {given}; it is the before.pt of another run's folder.")
    torch.manual_seed(config.fit.seed)
    job = build(config)
    if given is not None:
        recall(borrowed(given), job)
    recipe = method.recipe(job.pipeline.times(config.fit.steps))
    if config.restraint is not None:
        recipe = replace(recipe, restraint=config.restraint)
    check_settings(job.pipeline, recipe, config.fit)
    check_gradients(job.pipeline, job.scorer, recipe)
    roles = tuple(dict.fromkeys((*recipe.roles, "reference")))
    policy, parameters = prepare(
        job.pipeline, config.lora, roles, old=recipe.old, ema=config.ema, ledger=job.scorer.ledger, chunk=config.chunk,
        context=job.context, frozen=job.frozen,
    )  # fmt: skip
    other = Policy(job.judged, policy.roles, Ledger(), config.chunk, job.frozen)
    _probe(job, recipe, policy)
    planned = None
    if config.memory_budget is not None:
        recipe, planned = _fit_memory(job, recipe, policy, parameters)
    folder = Folder.open(config, resume, job.resolved)
    if planned is not None:
        (folder.path / "memory.txt").write_text(f"{planned}\n")
    return Run(job, folder, recipe, policy, parameters, other, "current" if config.ema is None else "ema")


def _fit_memory(job: Job, recipe: Recipe, policy: Policy, parameters: list[nn.Parameter]) -> tuple[Recipe, MemoryPlan]:
    """Choose micro-batches and recomputation that fit the budget, and set them; see :mod:`flowalign.memory_plan`.

    Raises:
        ValueError: if nothing fits.
    """
    from flowalign.memory_plan import fit_memory, parse_bytes

    o = job.config.fit
    budget = parse_bytes(job.config.memory_budget or "")
    collector = Collector(job.pipeline, job.scorer, policy, recipe, o.steps, o.seed)
    draw = job.source.draw(0, 1, 2 if job.source.alike else o.size)
    plan = fit_memory(collector, draw, parameters, o, budget)
    recipe, options = plan.apply(collector, o)
    job.config = replace(job.config, fit=options)
    return recipe, plan


def _probe(job: Job, recipe: Recipe, policy: Policy) -> None:
    """Sample and judge one small group: a reward that answers NaN, None or the wrong shape is found now."""
    kept, policy.ledger = policy.ledger, Ledger()
    booked = (job.scorer.ledger, job.judge.ledger)
    job.scorer.ledger = job.judge.ledger = policy.ledger
    o = job.config.fit
    collector = Collector(job.pipeline, job.scorer, policy, recipe, o.steps, o.seed)
    # a source that shares out whole units needs its full size; it says so now if that does not fit
    draw = job.source.draw(0, 1, min(o.size, 2) if job.source.alike else o.size)
    with torch.no_grad():
        experience = collect(collector, draw, 0)
        leaves = experience.trajectory.leaves
        job.judge.bind(experience.cond, draw.prompts, draw.meta)(leaves.x, leaves.row)
    policy.ledger, (job.scorer.ledger, job.judge.ledger) = kept, booked


# -- training --------------------------------------------------------------------------------------------------------
def _learn(run: Run, say: Bars) -> bool:
    """Train to the end of the budget; return whether it was interrupted."""
    o, config = run.job.config.fit, run.job.config
    place = run.folder.path / CHECKPOINTS
    state = _rewind(run, place)
    checker = Checker(run)
    at = _catch_up(run, state, checker)
    with trackers(run) as log, patience() as interrupted:
        began = last = time.perf_counter()
        earlier = run.folder.spent().get("clock", 0.0)  # in processes that were stopped
        first = iter([at])  # asked before any iteration, when a check of this very moment does not end the run yet

        def asked() -> bool:
            marked = checker.ends(next(first, math.inf))
            late = config.max_wall is not None and earlier + time.perf_counter() - began >= config.max_wall
            return late or marked or interrupted()

        stream = fit(
            run.job.pipeline, run.job.scorer, run.job.source, run.recipe, o, policy=run.policy,
            parameters=run.parameters, folder=place, resume=True, stop=asked,
        )  # fmt: skip
        with say.bar(o.iterations, config.method.name, at) as tick:
            for metrics in stream:
                run.folder.append("metrics.jsonl", metrics)
                log(metrics)
                checker(int(metrics["iteration"]))
                now = time.perf_counter()
                run.folder.spend(clock=now - last)
                last = now
                tick(1, {"reward": metrics.get("reward", float("nan"))})
        return interrupted()


def _rewind(run: Run, place: Path) -> dict[str, Any] | None:
    """Return the newest checkpoint; drop the lines after it, and half a line: they will be written again."""
    newest = checkpoint.latest(place)
    state = None if newest is None else checkpoint.load(newest)
    for name in RECORDS:
        run.folder.rewind(name, 0 if state is None else int(state["iteration"]))
    return state


def _catch_up(run: Run, state: dict[str, Any] | None, checker: Checker) -> int:
    """Return the iteration of the newest checkpoint; make what a kill between it and its line or check left out."""
    if state is None:
        return 0
    at = int(state["iteration"])
    lines, checks = (run.folder.lines(name) for name in RECORDS)
    if not lines or lines[-1]["iteration"] < at:
        run.folder.append("metrics.jsonl", state["metrics"])
    if checks and checks[-1]["iteration"] < at:
        averaged = run.policy.roles.get("ema")
        if isinstance(averaged, Weights):
            averaged.load_state_dict(state["roles"]["ema"])
        else:
            with torch.no_grad():
                for p, w in zip(run.parameters, state["weights"], strict=True):
                    p.copy_(w)
        run.policy.ledger.load_state_dict(state["ledger"])
        checker(at)
    return at
