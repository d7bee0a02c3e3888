"""The main job: evaluate, train, evaluate again, save, report.

    train(config)  →  folder with the resolved configuration, metrics, checkpoints, result, summary.json, report.html

Whatever may be wrong is found in the first seconds: names, prompts, settings that cannot learn, a reward that answers
NaN. After a crash or Ctrl-C the same call with ``resume=True`` goes on from the newest checkpoint, bit for bit.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flowalign import checkpoint
from flowalign.build import Job, build
from flowalign.collect import Collector, collect
from flowalign.config import RunConfig
from flowalign.evaluate import Exam, Outcome, examine
from flowalign.fit import check_gradients, check_settings, fit
from flowalign.folder import Folder
from flowalign.ledger import Ledger
from flowalign.methods.base import Training
from flowalign.monitor import Checker
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
        seconds: of evaluations, by name.
    """

    job: Job
    folder: Folder
    recipe: Recipe
    policy: Policy
    parameters: list[nn.Parameter]
    other: Policy
    role: str
    seconds: dict[str, float]


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
    before = _base(run, say)
    interrupted = _learn(run, say)
    after = None
    if not interrupted:
        after = _recall(run.folder.remember("after.pt", lambda: _exam(run, run.role, "after", say)), run.job.exam)
    with run.policy.playing(run.role):
        save_result(run.job, run.folder)
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
    given = config.evaluation.base
    if given is not None and not given.is_file():
        raise ValueError(f"evaluation.base: there is no file {given}; it is the before.pt of another run's folder.")
    torch.manual_seed(config.fit.seed)
    job = build(config)
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
    folder = Folder.open(config, resume)
    if planned is not None:
        (folder.path / "memory.txt").write_text(f"{planned}\n")
    return Run(job, folder, recipe, policy, parameters, other, "current" if config.ema is None else "ema", {})


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


# -- evaluation ------------------------------------------------------------------------------------------------------
def _base(run: Run, say: Bars) -> Outcome:
    """Return the evaluation of the base: made once per folder, or taken from another run's."""
    source = run.job.config.evaluation.base
    if source is None:
        made = run.folder.remember("before.pt", lambda: _exam(run, "reference", "before", say))
    else:
        made = run.folder.remember("before.pt", lambda: _borrowed(source))
    return _recall(made, run.job.exam)


def _borrowed(path: Path) -> dict[str, Any]:
    """Return another run's evaluation of the base."""
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(f"evaluation.base: {path} is no before.pt of a run ({error}).") from error


def _recall(state: dict[str, Any], exam: Exam) -> Outcome:
    """Return an outcome that was kept.

    Raises:
        ValueError: if it is of another exam.
    """
    if state["mark"] != exam.mark:
        raise ValueError(
            f"the evaluation kept in the file is of {state['mark']}, and this run asks for {exam.mark}: they cannot be "
            "paired. Leave evaluation.base out, or set prompts, images, steps and seed alike."
        )
    return Outcome.recall(state)


def _exam(run: Run, role: str, name: str, say: Bars) -> dict[str, Any]:
    exam, began = run.job.exam, time.perf_counter()
    with say.bar(len(exam.rows()), f"evaluate {name}") as tick:
        outcome = examine(
            run.job.judged, run.other, run.job.judge, exam, role=role, layouts=run.job.layouts, progress=tick
        )
    run.seconds[f"evaluate_{name}"] = time.perf_counter() - began
    return outcome.state_dict() | {"mark": exam.mark}


# -- training --------------------------------------------------------------------------------------------------------
def _learn(run: Run, say: Bars) -> bool:
    """Train to the end of the budget; return whether it was interrupted."""
    o, config = run.job.config.fit, run.job.config
    place = run.folder.path / CHECKPOINTS
    checker = Checker(run)
    at = _catch_up(run, place, checker)
    if checker.ends(at):
        return False
    with trackers(run) as log, patience() as interrupted:
        began = time.perf_counter()

        def asked() -> bool:
            late = config.max_wall is not None and time.perf_counter() - began >= config.max_wall
            return late or checker.ends() or interrupted()

        stream = fit(
            run.job.pipeline, run.job.scorer, run.job.source, run.recipe, o, policy=run.policy,
            parameters=run.parameters, folder=place, resume=True, stop=asked,
        )  # fmt: skip
        with say.bar(o.iterations, config.method.name, at) as tick:
            for metrics in stream:
                run.folder.append("metrics.jsonl", metrics)
                log(metrics)
                checker(int(metrics["iteration"]))
                tick(1, {"reward": metrics.get("reward", float("nan"))})
        return interrupted()


def _catch_up(run: Run, place: Path, checker: Checker) -> int:
    """Bring the records to where the newest checkpoint is; return its iteration.

    Lines after it are dropped, as they will be written again. A kill between the checkpoint and its line or its check
    leaves those missing: they are made now.
    """
    newest = checkpoint.latest(place)
    if newest is None:
        for name in RECORDS:
            run.folder.rewind(name, 0)
        return 0
    state = checkpoint.load(newest)
    at = int(state["iteration"])
    for name in RECORDS:
        run.folder.rewind(name, at)
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
