"""``report.html``: one file to look at, with nothing outside it.

Written of one run, or of several side by side (the demo: two methods, and the run that shows what hacking looks like).
Everything is read from the run folders, so a report can be written again at any time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign import curves
from flowalign.config import to_dict
from flowalign.evaluate import Outcome
from flowalign.facts import focus_of
from flowalign.folder import Folder
from flowalign.media_files import data_uri, grid
from flowalign.page import write_page
from flowalign.plots import COLOURS

__all__ = ["Shown", "write_report"]

PROMPTS, STRIP = 6, 5  # prompts of a category shown, and pictures of each


@dataclass(frozen=True)
class Shown:
    """One run of a report.

    Attributes:
        label: what it is called.
        colour: of its curves.
        folder: where it is.
        summary: ``summary.json``.
        metrics: by iteration.
        checks: evaluations on the way.
        before: the base; None where it was not evaluated.
        after: the aligned model.
        note: a sentence under the label.
    """

    label: str
    colour: str
    folder: Folder
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    before: Outcome | None
    after: Outcome | None
    note: str = ""

    @classmethod
    def read(cls, folder: Folder, label: str, colour: str, note: str) -> Shown:
        """Read a run's folder."""
        before, after = (folder.recall(n) for n in ("before.pt", "after.pt"))
        return cls(
            label, colour, folder, folder.summary(), folder.lines("metrics.jsonl"), folder.lines("checks.jsonl"),
            None if before is None else Outcome.recall(before), None if after is None else Outcome.recall(after), note,
        )  # fmt: skip

    @property
    def accuracy(self) -> dict[str, Any]:
        """Figures by category; empty for a run without a final evaluation."""
        return self.summary.get("accuracy", {})


def write_report(
    folders: Sequence[Folder],
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
    title: str | None = None,
    words: str = "",
) -> Path:
    """Write a report.

    Args:
        folders: of the runs.
        path: of the file.
        labels: of the runs; the methods' names when None.
        notes: a sentence on each.
        title: of the page.
        words: a paragraph under the title.
    """
    names = labels or [f.summary().get("method", f.path.name) for f in folders]
    notes = notes or [""] * len(folders)
    runs = [
        Shown.read(f, n, COLOURS[i % len(COLOURS)], w)
        for i, (f, n, w) in enumerate(zip(folders, names, notes, strict=True))
    ]
    main = headline(runs)
    config = folders[0].config()
    values = {
        "title": title or f"{names[0]} on {config.pipeline}",
        "words": words,
        "runs": runs,
        "main": main,
        "categories": list(next((r.accuracy for r in runs if r.accuracy), {})),
        "sheets": _sheets(runs, main),
        "learning": curves.learning(runs),
        "watched": curves.watched(runs, main),
        "verdicts": [curves.verdict(r) for r in runs if r.checks],
        "quality": curves.quality(runs, main),
        "insides": curves.insides(runs),
        "reward": config.reward,
        "config": [(r.label, _yaml(to_dict(r.folder.config()))) for r in runs],
    }
    filters = {"pct": _percent, "points": _points, "secs": _seconds}
    return write_page(path, "report.html", runs[0].summary, values, filters)


def headline(runs: Sequence[Shown]) -> str:
    """Return the category that the prompts of the first run dwell on; where nobody knows, the one that gained most."""
    asked = focus_of(runs[0].folder.config())
    if any(asked in r.accuracy for r in runs):
        return asked
    gains = [(v["gain"][0], c) for r in runs for c, v in r.accuracy.items()]
    return max(gains)[1] if gains else ""


# -- pictures --------------------------------------------------------------------------------------------------------
def _sheets(runs: Sequence[Shown], main: str) -> list[dict[str, Any]]:
    """Return, category by category, rows of prompts with strips of pictures: the base, then each run."""
    whole = [r for r in runs if r.before is not None and r.after is not None]
    if not whole or whole[0].before is None or whole[0].before.pictures.ndim < 4:
        return []
    base = whole[0].before
    texts = _texts(whole[0])
    same = [r for r in whole if _texts(r) == texts]
    order = sorted(dict.fromkeys(base.category), key=lambda c: c != main)
    sheets = []
    for name in order:
        outcomes = [base, *(r.after for r in same if r.after is not None)]
        kept = [{int(o.row[i]) for i in o.shown} for o in outcomes]
        prompts = list(dict.fromkeys(int(base.row[i]) for i in base.shown if base.category[i] == name))
        # a shorter exam kept pictures of fewer prompts: those that all runs share come first
        prompts = sorted(prompts, key=lambda p: -sum(p in k for k in kept))[:PROMPTS]
        rows = []
        for p in prompts:
            rows.append({"prompt": texts[p], "strips": [_strip(o, p) for o in outcomes]})
        sheets.append({"name": name, "rows": rows, "columns": ["base", *(r.label for r in same)]})
    return sheets


def _strip(outcome: Outcome, prompt: int) -> str:
    """Return the pictures of a prompt as one image, or "" where this exam kept none."""
    places = [k for k, i in enumerate(outcome.shown) if int(outcome.row[i]) == prompt][:STRIP]
    if not places:
        return ""
    scores = outcome.judged
    binary = bool(((scores == 0) | (scores == 1)).all())
    good = [bool(scores[outcome.shown[k]] > 0.5) for k in places] if binary else None
    return data_uri(grid(outcome.pictures[places], len(places), good=good, size=64))


def _texts(run: Shown) -> dict[int, str]:
    """Return the exam's prompts by number."""
    return {int(k): v for k, v in run.summary.get("prompts", {}).items()}


# -- words -----------------------------------------------------------------------------------------------------------
def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"


def _yaml(data: Any) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False)
