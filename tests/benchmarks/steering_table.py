"""Tables and the figure of ``compare_steering``: what its result files say, with errors over seeds.

Gains are paired with best-of-N by seed. Reward-against-budget curves give two more figures: how much of best-of-N's
budget another search needs for best-of-N's reward, read off the mean curves, and TTSnap's ω (relative area).
"""

from __future__ import annotations

import json
import math
import re
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

Runs = dict[str, list[dict[str, Any]]]
TITLES = {"nfe": "evaluations", "seconds": "CPU seconds"}


def file_of(folder: Path, kind: str, unit: str, name: str, seed: int | str) -> Path:
    """Return the file of a run."""
    return folder / f"{kind}-{unit}-{re.sub('[^a-z]+', '', name.lower().replace('*', 'star'))}-{seed}.json"


def mean_seconds(folder: Path, kind: str, name: str, unit: str = "nfe") -> float:
    """Return what a method took on average; nan where it was not run."""
    files = folder.glob(file_of(folder, kind, unit, name, "[0-9]*").name)
    took = [json.loads(f.read_text())["seconds"] for f in files]
    return statistics.mean(took) if took else math.nan


def spent(folder: Path, kind: str, name: str, unit: str) -> float:
    """Return the evaluations per prompt that a method took on average, gradients counted twice."""
    rows = [json.loads(f.read_text()) for f in folder.glob(file_of(folder, kind, unit, name, "[0-9]*").name)]
    total = statistics.mean(r["ledger"]["evaluations"] + 2 * r["ledger"]["gradients"] for r in rows)
    return total / len(rows[0]["strict"])


def read(folder: Path) -> dict[tuple[str, str], Runs]:
    """Return the runs by (reward, unit) and method, ordered by seed."""
    out: dict[tuple[str, str], Runs] = {}
    for path in sorted(p for k in ("graded", "clip") for p in folder.glob(f"{k}-*.json")):
        kind, unit = path.stem.split("-")[:2]
        row = json.loads(path.read_text())
        out.setdefault((kind, unit), {}).setdefault(row["method"], []).append(row)
    return {k: {m: sorted(r, key=lambda x: x["seed"]) for m, r in v.items()} for k, v in out.items()}


def mean_error(values: list[float]) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.mean(values), error


def shown(values: list[float], sign: str = "") -> str:
    """Return mean ± error."""
    mean, error = mean_error(values)
    return f"{mean:{sign}.3f} ± {error:.3f}"


def per_seed(rows: list[dict[str, Any]], key: str) -> dict[int, float]:
    """Return the mean over prompts of each seed."""
    return {r["seed"]: statistics.mean(r[key]) for r in rows}


def paired(rows: list[dict[str, Any]], rival: list[dict[str, Any]], key: str) -> list[float]:
    """Return the gains over a rival, seed by seed."""
    mine, other = per_seed(rows, key), per_seed(rival, key)
    return [mine[s] - other[s] for s in mine if s in other]


def tables(folder: Path) -> str:
    """Return everything as Markdown."""
    data = read(folder)
    parts = [table(runs, f"{kind} reward, equal {TITLES[unit]}") for (kind, unit), runs in sorted(data.items())
             if unit in TITLES]  # fmt: skip
    return "\n\n".join([*parts, *(curves(data, kind) for kind in ("graded", "clip") if (kind, "nfe2") in data)])


def table(runs: Runs, title: str) -> str:
    """Return one comparison."""
    heads = ["method", "seeds", "strict", "gain over best-of-N", "reward", "gain", "graded",
             "evaluations (a gradient is two)", "CPU s"]  # fmt: skip
    lines = [f"**{title}**", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    rival = runs.get("best-of-n", [])
    for name, rows in runs.items():
        gains = ["" if name == "best-of-n" or not rival else shown(paired(rows, rival, k), "+")
                 for k in ("strict", "reward")]  # fmt: skip
        strict, reward, graded = (shown(list(per_seed(rows, k).values())) for k in ("strict", "reward", "graded"))
        spent = statistics.mean(r["ledger"]["evaluations"] + 2 * r["ledger"]["gradients"] for r in rows)
        took = statistics.mean(r["seconds"] for r in rows)
        cells = [name, str(len(rows)), strict, gains[0], reward, gains[1], graded, f"{spent:.0f}", f"{took:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve(data: dict[tuple[str, str], Runs], kind: str, name: str, key: str, seed: int | None = None) -> list[Any]:
    """Return ``(part of the budget, mean, error)``, or of one seed ``(part, mean over prompts)``, budgets rising."""
    out = []
    for (k, unit), runs in data.items():
        if k == kind and unit.startswith("nfe") and name in runs:
            each, part = per_seed(runs[name], key), float(unit.removeprefix("nfe") or 1)
            if seed is None:
                out.append((part, *mean_error(list(each.values()))))
            elif seed in each:
                out.append((part, each[seed]))
    return sorted(out)


def reaches(points: list[Any], level: float) -> float:
    """Return the budget at which a curve first reaches a level, between points by its logarithm; nan where it does not.

    A curve that starts above the level gives its first budget: an upper bound.
    """
    if points and points[0][1] >= level:
        return float(points[0][0])
    for a, b in pairwise(points):
        if b[1] >= level:
            part = (level - a[1]) / (b[1] - a[1])
            return float(a[0] * (b[0] / a[0]) ** part)
    return math.nan


def curves(data: dict[tuple[str, str], Runs], kind: str) -> str:
    """Return reward and truth against the budget, and what follows from the curves."""
    names = [n for n in data[kind, "nfe2"] if len(curve(data, kind, n, "reward")) > 1]
    budgets = [p for p, *_ in curve(data, kind, "best-of-n", "reward")]
    heads = " | ".join(f"{b:g} ×" for b in budgets)
    lines = [f"**{kind} reward against the budget**", "", f"| of | {heads} |", "|---|" + "---|" * len(budgets)]
    for key in ("reward", "strict"):
        for name in names:
            at = {b: f"{m:.3f} ± {e:.3f}" for b, m, e in curve(data, kind, name, key)}
            lines.append(f"| {name}, {key} | " + " | ".join(at.get(b, "") for b in budgets) + " |")
    return "\n".join([*lines, "", *savings(data, kind, names, budgets)])


def savings(data: dict[tuple[str, str], Runs], kind: str, names: list[str], budgets: list[float]) -> list[str]:
    """Return, for each search, the budget that gives it what best-of-N's largest gives, and ω."""
    from flowalign.methods.ttsnap import omega

    rival = curve(data, kind, "best-of-n", "reward")
    seeds = [r["seed"] for r in data[kind, "nfe2"]["best-of-n"]]
    out = []
    for name in (n for n in names if n != "best-of-n"):
        needs = reaches(curve(data, kind, name, "reward"), rival[-1][1])
        told = "is not reached" if math.isnan(needs) else f"takes {needs:.2f} × ({budgets[-1] / needs:.1f} times less)"
        pairs = [(curve(data, kind, name, "reward", s), curve(data, kind, "best-of-n", "reward", s)) for s in seeds]
        # of a seed whose best-of-N gains nothing with its budget there is no relative gain
        areas = [omega(a, b) for a, b in pairs if len(a) == len(b) == len(budgets) and b[-1][1] > b[0][1]]
        out.append(
            f"- {name}: best-of-N's reward at {budgets[-1]:g} × {told}; ω = {shown(areas, '+') if areas else 'none'}."
        )
    return out


def draw(folder: Path, path: Path) -> None:
    """Draw gains over best-of-N with errors, a panel for each reward and unit, and reward against budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = read(folder)
    kinds = sorted({k for k, _ in data}, reverse=True)
    fig = Figure(figsize=(11, 3.1 * len(kinds)), dpi=120, layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(len(kinds), 3, squeeze=False)
    for line, kind in zip(axes, kinds, strict=True):
        for ax, unit in zip(line, TITLES, strict=False):
            gains_panel(ax, data.get((kind, unit), {}), f"{kind} reward, equal {TITLES[unit]}")
        curve_panel(line[2], data, kind)
        for ax in line:
            ax.tick_params(labelsize=8)
            for side in ("top", "right"):
                ax.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, facecolor="white")


def gains_panel(ax: Any, runs: Runs, title: str) -> None:
    """Draw strict gains over best-of-N, the best on top."""
    rival = runs.get("best-of-n", [])
    gains = {n: mean_error(paired(rows, rival, "strict")) for n, rows in runs.items() if rival and n != "best-of-n"}
    order = sorted(gains, key=lambda n: gains[n][0])
    middle, error = [gains[n][0] for n in order], [gains[n][1] for n in order]
    ax.errorbar(middle, range(len(order)), xerr=error, fmt="o", color="#3b5bdb")
    ax.axvline(0.0, color="#868e96", lw=1, ls="--")
    ax.set_yticks(range(len(order)), order)
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel("gain in strict success over best-of-N", fontsize=8)


def curve_panel(ax: Any, data: dict[tuple[str, str], Runs], kind: str) -> None:
    """Draw reward against budget."""
    if (kind, "nfe2") not in data:
        ax.set_axis_off()
        return
    for name in data.get((kind, "nfe2"), {}):
        points = curve(data, kind, name, "reward")
        own = {"color": "#868e96", "ls": "--"} if name == "best-of-n" else {}
        x, y, e = zip(*points, strict=True)
        ax.errorbar(x, y, yerr=e, marker="o", ms=3, lw=1.2, label=name, **own)
    ax.set_xscale("log", base=2)
    ax.set_title(f"{kind} reward against the budget", fontsize=9, loc="left")
    ax.set_xlabel("network evaluations, in those of the comparison", fontsize=8)
    ax.legend(fontsize=7, frameon=False)
