"""Hacking, seen while it happens: small evaluations on the way, of what is trained on and of what is not.

Every check samples the same prompts from the same noises as the base did and records, as paired differences from it,

    trained      the weighted reward that is trained on, and its standard deviation within prompts
    held_out     every evaluation reward that is not trained on
    spread       diversity: root mean square distance of thumbnails from the mean of their prompt's, as a share of the
                 base's; beside it the layouts kept, where the world can name layouts
    drift, kl    distance to the base (:mod:`flowalign.distance`): mean squared difference of velocities on the base's
                 samples, and the divergence of the Flow-GRPO SDE's paths, in nats per sample on the model's own

The rule. Let T_i ± s_i and H_i ± u_i be the gains of the trained and of a held-out reward at check i, and j < i the
check with the largest H so far. Check i *speaks* if, with z = 3,

    T_i - T_j > z √(s_i² + s_j²)      and      H_j - H_i > z √(u_i² + u_j²)

and a run is marked at the first check that speaks when the one before it spoke too; hacking began at j. The errors of
two checks share images and noises, so the true ones are smaller; z is large because j was chosen as the best of many.
With independent errors and a flat held-out reward, 2.7 % of runs of 30 checks are marked (tests/test_monitor.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowalign.comparison import compare, mean_se
from flowalign.distance import drift, path_kl
from flowalign.evaluate import examine
from flowalign.exam import Exam, Outcome, category

if TYPE_CHECKING:
    from flowalign.run import Run

__all__ = ["Checker", "Mark", "grouped", "hacking", "marks", "measure_drift", "path_kl", "spread"]

Z = 3.0


# -- what is measured ------------------------------------------------------------------------------------------------
def grouped(exam: Exam, each: int = 4) -> Exam:
    """Return an exam of fewer prompts, evenly chosen, so that each has several images: one image has no spread."""
    chosen = []
    for name in exam.categories:
        mine = [p for p in exam.prompts if category(p) == name]
        n = min(len(mine), max(1, exam.images // each))
        chosen += [mine[k * len(mine) // n] for k in range(n)]
    return replace(exam, prompts=chosen)


def spread(outcome: Outcome) -> float | None:
    """Return the root mean square distance of thumbnails from their prompt's mean; None without two of any prompt."""
    if outcome.thumbs is None:
        return None
    parts = [outcome.thumbs[outcome.row == r] for r in outcome.row.unique()]
    parts = [p for p in parts if len(p) > 1]
    if not parts:
        return None
    square, free = sum(((p - p.mean(0)) ** 2).sum() for p in parts), sum(len(p) - 1 for p in parts)
    return float(torch.as_tensor(square / free).sqrt())


def within(values: Tensor, row: Tensor) -> float:
    """Return the standard deviation of values ``(N,)`` within prompts; over all where no prompt has two."""
    parts = [values[row == r] for r in row.unique()]
    parts = [p for p in parts if len(p) > 1] or [values]
    free = sum(len(p) - 1 for p in parts)
    return float((sum(((p - p.mean()) ** 2).sum() for p in parts) / max(free, 1)) ** 0.5)


def measure_drift(run: Run, exam: Exam, base: Outcome, role: str, limit: int = 64) -> float:
    """Return how far a role's velocity field has moved from the base's, on samples of the base."""
    return drift(run.job.judged, run.other, *_asked(exam, base, limit), base.x0[:limit], role, exam.seed)


def _asked(exam: Exam, outcome: Outcome, limit: int) -> tuple[list[str], list[Mapping[str, Any]]]:
    """Return texts and extras of the pictures that an outcome keeps."""
    prompts = [exam.prompts[int(outcome.row[i])] for i in outcome.shown[:limit]]
    return [p.text for p in prompts], [p.meta for p in prompts]


# -- the rule --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mark:
    """Where the trained reward went on rising while a held-out one fell.

    Attributes:
        began: index of the check at which the held-out reward was best.
        seen: index of the check at which the rule was sure.
        rise: of the trained reward between them, and its standard error.
        fall: of the held-out reward, and its standard error.
    """

    began: int
    seen: int
    rise: tuple[float, float]
    fall: tuple[float, float]


Gains = Sequence[Sequence[float]]  # (mean, standard error) by check


def hacking(trained: Gains, held: Gains, z: float = Z) -> Mark | None:
    """Return the first mark of the rule, or None; see the module."""
    before = False
    for i in range(1, len(held)):
        j = max(range(i), key=lambda k: held[k][0])
        rise, fall = trained[i][0] - trained[j][0], held[j][0] - held[i][0]
        errors = [math.hypot(g[i][1], g[j][1]) for g in (trained, held)]
        speaks = rise > z * errors[0] and fall > z * errors[1]
        if speaks and before:
            return Mark(j, i, (rise, errors[0]), (fall, errors[1]))
        before = speaks
    return None


def marks(checks: Sequence[Mapping[str, Any]], z: float = Z) -> dict[str, dict[str, Any]]:
    """Return the marks of a run's checks by held-out reward, earliest first, with iterations in place of indices."""
    checks = [c for c in checks if "trained" in c]
    found = {}
    for name in checks[0]["held_out"] if checks else ():
        mark = hacking([c["trained"]["gain"] for c in checks], [c["held_out"][name] for c in checks], z)
        if mark is not None:
            found[name] = {
                "began": checks[mark.began]["iteration"],
                "seen": checks[mark.seen]["iteration"],
                "began_evaluations": checks[mark.began]["evaluations"],
                "seen_evaluations": checks[mark.seen]["evaluations"],
                "rise": list(mark.rise),
                "fall": list(mark.fall),
            }
    return dict(sorted(found.items(), key=lambda kv: kv[1]["seen"]))


# -- during a run ----------------------------------------------------------------------------------------------------
class Checker:
    """Makes the checks of a run and says whether it was marked.

    Args:
        run: whose.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.exam = run, None if run.job.check is None else grouped(run.job.check)
        if self.exam is not None:
            self.base = Outcome.recall(run.folder.remember("check.pt", self._first))
            if not run.folder.lines("checks.jsonl"):
                self.write(0, self.base, "reference")

    def _first(self) -> dict[str, Any]:
        with self.run.spending("checks"):
            return self._look("reference").state_dict()

    def __call__(self, iteration: int) -> None:
        """Look, if it is time."""
        every = self.run.job.config.evaluation.every
        if self.exam is None or iteration % every:
            return
        with self.run.spending("checks"):
            self.write(iteration, self._look(self.run.role), self.run.role)

    def ends(self, at: float = math.inf) -> bool:
        """Return whether the run is to end because it was marked before iteration ``at``.

        A run ends with the iteration after the check that marked it, and is not taken further when it is resumed.
        """
        if not self.run.job.config.evaluation.stop_on_hacking:
            return False
        return any(m["seen"] < at for m in marks(self.run.folder.lines("checks.jsonl")).values())

    def _look(self, role: str) -> Outcome:
        assert self.exam is not None
        job = self.run.job
        return examine(job.judged, self.run.other, job.watch, self.exam, role=role, layouts=job.layouts)

    def write(self, iteration: int, outcome: Outcome, role: str) -> None:
        """Append a check to ``checks.jsonl``."""
        assert self.exam is not None
        run, ledger = self.run, self.run.policy.ledger
        record: dict[str, Any] = {
            "iteration": iteration,
            "seconds": ledger.seconds,
            "evaluations": ledger.evaluations,
            "drift": measure_drift(run, self.exam, self.base, role) if iteration else 0.0,
            "kl": self._kl(outcome, role) if iteration else 0.0,
            **self.watched(outcome),
        }
        for score in self.base.scores:  # a base kept by an older version may know fewer
            parts = compare(self.base, outcome, score)
            record[score] = {c: p.to_dict() for c, p in parts.items()}
        run.folder.append("checks.jsonl", record)

    def watched(self, outcome: Outcome) -> dict[str, Any]:
        """Return the trained reward, the held-out ones and the diversity of an outcome, against the base's."""
        weights = self.run.job.scorer.weights
        before, after = (sum(w * o.scores[n] for n, w in weights.items()) for o in (self.base, outcome))
        assert isinstance(before, Tensor) and isinstance(after, Tensor)
        kept, whole = spread(outcome), spread(self.base)
        return {
            "trained": {
                "mean": float(after.mean()), "std": within(after, outcome.row), "gain": mean_se(after - before)
            },
            "held_out": {
                n: mean_se(outcome.scores[n] - v) for n, v in self.base.scores.items() if n not in weights
            },
            "spread": None if kept is None or not whole else kept / whole,
        }  # fmt: skip

    def _kl(self, outcome: Outcome, role: str, limit: int = 64) -> float:
        assert self.exam is not None
        run = self.run
        asked = _asked(self.exam, outcome, limit)
        return path_kl(run.job.judged, run.other, *asked, outcome.x0[:limit], role, self.exam.seed)
