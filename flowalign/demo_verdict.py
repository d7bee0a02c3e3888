"""What came of a demo: its promises against its figures, a table, and one report of all runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flowalign.facts import WORLDS, focus_of
from flowalign.folder import Folder

__all__ = ["report", "rewarded", "table", "verdict"]

GAIN, OTHER_GAIN, FULL_GAIN, KEPT, HARM = 0.10, 0.04, 0.25, 0.80, -0.03


def verdict(summaries: dict[str, dict[str, Any]], focus: str, full: bool = False) -> dict[str, Any]:
    """Hold the figures of the two methods against what the demo promises.

    Args:
        summaries: by name; the two methods first.
        focus: the rewarded category, which was fixed before any figure was seen.
        full: whether the promises of the full demo hold.

    Returns:
        Per run the gain, its standard error and the layouts kept; ``promises``: what is asked → whether it holds.
    """
    figures = {name: _figures(s, focus) for name, s in summaries.items()}
    two = sorted(list(figures.values())[:2], key=lambda f: -f["gain"][0])
    need = FULL_GAIN if full else GAIN
    # half an hour is for the better one: the full demo promises nothing of the other but that it does no harm
    other = {} if full else {f"the other gains {100 * OTHER_GAIN:.0f} points": two[1]["gain"][0] >= OTHER_GAIN}
    promises = {
        f"the better gains {100 * need:.0f} points and five standard errors": two[0]["gain"][0] >= need
        and two[0]["gain"][0] > 5 * two[0]["gain"][1],
        **other,
        f"both keep {KEPT:.0%} of the layouts": all((f["layouts_kept"] or 0) >= KEPT for f in two),
        f"no other category falls by more than {-100 * HARM:.0f} points": all(f["worst_other"] >= HARM for f in two),
    }
    return {"focus": focus, "runs": figures, "promises": promises}


def rewarded(folder: Folder, categories: Iterable[str]) -> str:
    """Return the category that the training prompts dwell on, the world's where they do not say, or the first one."""
    config = folder.config()
    facts = WORLDS.get(config.pipeline)
    return focus_of(config) or (next(iter(categories)) if facts is None else facts.focus)


def _figures(summary: dict[str, Any], focus: str) -> dict[str, Any]:
    accuracy = summary["accuracy"]
    return {
        "gain": accuracy[focus]["gain"],
        "layouts_kept": accuracy[focus]["layouts_kept"],
        "worst_other": min((v["gain"][0] for c, v in accuracy.items() if c != focus), default=0.0),
        "drift": summary["drift"],
        "trained_seconds": summary["trained_seconds"],
        "evaluations": summary["evaluations"],
    }


def table(labels: Sequence[str], found: dict[str, Any]) -> str:
    """Return the figures of the runs and what became of the promises, as text."""
    width = max(map(len, labels)) + 2
    head = f"{'gain on ' + found['focus']:>18}{'± s.e.':>8}{'layouts kept':>14}{'worst other':>13}{'seconds':>9}"
    lines = [f"\n{'':{width}}{head}"]
    for label in labels:
        f = found["runs"][label]
        gain, se = (100 * x for x in f["gain"])
        kept = "-" if f["layouts_kept"] is None else f"{f['layouts_kept']:.0%}"
        row = f"{gain:+18.1f}{se:8.1f}{kept:>14}{100 * f['worst_other']:+13.1f}{f['trained_seconds']:9.0f}"
        lines.append(f"{label:{width}}{row}")
    lines += [""] + [f"  {'yes' if ok else 'NO ':3}  {what}" for what, ok in found["promises"].items()]
    return "\n".join([*lines, f"\n{found['seconds']:.0f} s in all"])


def report(output: Path, folders: Sequence[Folder], labels: Sequence[str]) -> Path:
    """Write one report of all runs, the two methods first, then the one without a penalty, then the control."""
    from flowalign.report import write_report

    notes = ["", "", free(folders[2]), "Must not gain."]
    words = (
        "One little text-to-image model, fine-tuned by two methods on the verdict of a strict judge, and a third time "
        "with nothing that holds it to the base, and too large steps. What becomes of that one differs by seed: "
        "layouts go, other categories, or the pictures themselves."
    )
    return write_report(
        folders, output / "report.html", labels=labels, notes=notes[: len(folders)],
        title="The demo: alignment, with and without a penalty", words=words,
    )  # fmt: skip


def free(folder: Folder) -> str:
    """Return what became of the run that nothing holds: its own reward, the judge's verdict, the layouts."""
    checks, summary = folder.lines("checks.jsonl"), folder.summary()
    own, parts = checks[-1]["trained"]["gain"], summary.get("accuracy", {})
    said = [f"Must not be followed. Its own reward changed by {own[0]:+.3f} ± {own[1]:.3f}"]
    said += [f"{name} by {100 * p['gain'][0]:+.1f} ± {100 * p['gain'][1]:.1f} points" for name, p in parts.items()]
    kept = {name: p["layouts_kept"] for name, p in parts.items() if p["layouts_kept"] is not None}
    if kept:
        least = min(kept, key=lambda name: kept[name])
        said.append(f"of the layouts of {least} {kept[least]:.0%} are left")
    return ", ".join(said) + f"; drift {summary.get('drift', 0.0):.2f}."
