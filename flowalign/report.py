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

from flowalign.config import to_dict
from flowalign.evaluate import Outcome
from flowalign.folder import Folder
from flowalign.media_files import data_uri, grid
from flowalign.plots import COLOURS, Series, figure

__all__ = ["Shown", "write_report"]

TEMPLATE = Path(__file__).parent / "templates" / "report.html"
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
    import jinja2

    names = labels or [f.summary().get("method", f.path.name) for f in folders]
    notes = notes or [""] * len(folders)
    runs = [
        Shown.read(f, n, COLOURS[i % len(COLOURS)], w)
        for i, (f, n, w) in enumerate(zip(folders, names, notes, strict=True))
    ]
    main = headline(runs)
    config = folders[0].config()
    loader = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    loader.filters |= {"pct": _percent, "points": _points, "secs": _seconds}
    html = loader.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title or f"{names[0]} on {config.pipeline}",
        words=words,
        runs=runs,
        main=main,
        categories=list(next((r.accuracy for r in runs if r.accuracy), {})),
        sheets=_sheets(runs, main),
        learning=_learning(runs),
        quality=_quality(runs, main),
        insides=_insides(runs),
        reward=config.reward,
        config=[(r.label, _yaml(to_dict(r.folder.config()))) for r in runs],
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)
    return path


def headline(runs: Sequence[Shown]) -> str:
    """Return the category that gained most: the one that was asked to."""
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


# -- curves ----------------------------------------------------------------------------------------------------------
def _learning(runs: Sequence[Shown]) -> str:
    """Draw the training reward, by network evaluations."""
    keys = list(
        dict.fromkeys(k for r in runs for m in r.metrics for k in m if k == "reward" or k.startswith("reward/"))
    )
    keys = [k for k in keys if k != "reward"] if len(keys) == 2 else keys
    panels = {_reward_title(k): [_series(r, k, runs) for r in runs] for k in keys}
    panels["groups without variance"] = [_series(r, "dead", runs) for r in runs]
    return figure(panels, "thousand network evaluations", percent=["groups without variance"])


def _reward_title(key: str) -> str:
    return "training reward" + (f": {key.removeprefix('reward/').rsplit(':', 1)[-1]}" if "/" in key else "")


def _series(run: Shown, key: str, runs: Sequence[Shown]) -> Series:
    rows = [m for m in run.metrics if key in m]
    x = [m.get("ledger/evaluations", m["iteration"]) / 1000 for m in rows]
    width = max(1, len(rows) // 15) if len(rows) > 30 else 0
    return Series(run.label if len(runs) > 1 else "", x, [m[key] for m in rows], colour=run.colour, smooth=width)


def _quality(runs: Sequence[Shown], main: str) -> str:
    """Draw held-out accuracy, layouts kept and drift of the checks, by seconds of training."""
    score = {r.label: r.summary.get("judge", "") for r in runs}
    several = len(runs) > 1
    panels: dict[str, list[Series]] = {}
    names = list(dict.fromkeys(c for r in runs for k in r.checks for c in k.get(score[r.label], {})))
    for name in sorted(names, key=lambda c: c != main):
        panels[f"accuracy: {name}"] = [_check(r, score[r.label], name, "after", several) for r in runs]
    panels[f"layouts kept: {main}"] = [_check(r, score[r.label], main, "layouts_kept", several) for r in runs]
    panels["drift from the base"] = [
        Series(
            r.label if several else "",
            [c["seconds"] for c in r.checks],
            [c["drift"] for c in r.checks],
            colour=r.colour,
        )
        for r in runs
    ]
    kept = f"layouts kept: {main}"
    share = [k for k in panels if k.startswith(("accuracy", "layouts"))]
    return figure(panels, "seconds of training", percent=share, lines={kept: 0.8})


def _check(run: Shown, score: str, name: str, what: str, several: bool) -> Series:
    rows = [(c["seconds"], c[score][name]) for c in run.checks if name in c.get(score, {})]
    rows = [(s, c) for s, c in rows if c[what] is not None]
    values = [c[what] for _, c in rows]
    pair = bool(values) and isinstance(values[0], list | tuple)
    y = [v[0] for v in values] if pair else values
    error = [v[1] for v in values] if pair else None
    return Series(run.label if several else "", [s for s, _ in rows], y, error, run.colour)


def _insides(runs: Sequence[Shown]) -> str:
    """Draw what the optimiser sees: ratio, distance to the reference, lag, gradient norm."""
    panels = {
        "ratio": "ratio", "largest |ratio - 1|": "ratio_gap", "KL to the base": "kl", "lag of the old policy": "lag",
        "gradient norm": "grad_norm", "reward spread in a group": "reward_std",
    }  # fmt: skip
    return figure({t: [_series(r, k, runs) for r in runs] for t, k in panels.items()}, "thousand network evaluations")


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
