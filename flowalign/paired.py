"""The two evaluations of a run, before and after, on the same prompts and noises, kept image by image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowalign.build import Job
from flowalign.evaluate import Outcome, examine
from flowalign.progress import Bars

if TYPE_CHECKING:
    from flowalign.run import Run

__all__ = ["borrowed", "judge_base", "judge_trained", "recall"]


def judge_base(run: Run, say: Bars) -> Outcome:
    """Return the evaluation of the base: made once per folder, or taken from another run's."""
    source = run.job.config.evaluation.base
    if source is None:
        made = run.folder.remember("before.pt", lambda: _exam(run, "reference", "before", say))
    else:
        made = run.folder.remember("before.pt", lambda: borrowed(source))
    return recall(made, run.job)


def judge_trained(run: Run, say: Bars) -> Outcome:
    """Return the evaluation of the trained weights; a run that was resumed with a larger budget has others to judge."""
    lines = run.folder.lines("metrics.jsonl")
    at = int(lines[-1]["iteration"]) if lines else 0
    made = run.folder.remember("after.pt", lambda: _exam(run, run.role, "after", say), iteration=at)
    return recall(made, run.job)


def borrowed(path: Path) -> dict[str, Any]:
    """Return another run's evaluation of the base."""
    try:
        state = torch.load(path, weights_only=True)
        state["mark"], state["scores"]
    except Exception as error:
        raise ValueError(f"evaluation.base: {path} is no before.pt of a run ({error!r}).") from error
    return state


def recall(state: dict[str, Any], job: Job) -> Outcome:
    """Return an outcome that was kept.

    Raises:
        ValueError: if it is of another exam, or was sampled or judged in another way.
    """
    kept = state["mark"]
    for k, wanted in job.mark.items():
        if kept.get(k) != wanted:
            raise ValueError(
                f"the evaluation kept in the file has {k} = {kept.get(k)!r}, and this run {wanted!r}: they cannot be "
                "paired. Leave evaluation.base out, or set pipeline, call, guidance, precision, prompts, images, "
                "steps, seed and rewards alike."
            )
    return Outcome.recall(state)


def _exam(run: Run, role: str, name: str, say: Bars) -> dict[str, Any]:
    exam = run.job.exam
    with say.bar(len(exam.rows()), f"evaluate {name}") as tick, run.spending(f"evaluate_{name}"):
        outcome = examine(
            run.job.judged, run.other, run.job.judge, exam, role=role, layouts=run.job.layouts, progress=tick
        )
    return outcome.state_dict() | {"mark": run.job.mark}
