"""What a comparison of credit found: one table, the published claims as paired differences, one plot.

Results are those that ``compare_credit.py`` keeps, one JSON file per (row, seed). The error of a gain or of a
difference is the larger of two: that over seeds, and that over images of the mean over seeds, where verdicts were kept
(all runs are judged on the same images, so that differences are paired twice).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["at", "claims", "draw", "error_of", "mean", "parts", "reach", "read", "table"]

Result = dict[str, Any]


def at(result: Result, unit: str, part: float) -> dict[str, Any]:
    """Return the point at a part of a budget."""
    return next(p for p in result["curve"] if p["why"] == f"{unit}:{part:g}")


def parts(result: Result) -> list[float]:
    """Return the parts of the budgets at which a run was looked at."""
    return sorted({float(p["why"].partition(":")[2]) for p in result["curve"] if p["why"] != "start"})


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error over seeds; NaN for one seed."""
    m = sum(values) / len(values)
    if len(values) < 2:
        return m, math.nan
    return m, math.sqrt(sum((v - m) ** 2 for v in values) / (len(values) - 1) / len(values))


def error_of(values: Sequence[float], verdicts: Sequence[tuple[str, str]] = ()) -> tuple[float, float]:
    """Return the mean over seeds and the larger of its two errors; see the module.

    Args:
        values: differences, one a seed.
        verdicts: of the images, as strings of 0 and 1: of the one and of the other, for each seed.
    """
    m, error = mean(values)
    if verdicts and all(a and b for a, b in verdicts):
        gaps = [[int(x) - int(y) for x, y in zip(a, b, strict=True)] for a, b in verdicts]
        images = mean([sum(g) / len(g) for g in zip(*gaps, strict=True)])[1]
        error = images if math.isnan(error) else max(error, images)
    return m, error


def gain(runs: Sequence[Result], unit: str, part: float = 1.0) -> tuple[float, float]:
    """Return the gain over the base at a part of a budget, and its error."""
    ends = [at(x, unit, part) for x in runs]
    verdicts = [(p.get("right", ""), x["curve"][0].get("right", "")) for p, x in zip(ends, runs, strict=True)]
    return error_of([p["gain"][0] for p in ends], verdicts)


def gap(both: Sequence[tuple[Result, Result]], unit: str, part: float = 1.0) -> tuple[float, float]:
    """Return by how much the first of each pair of runs is ahead of the second, and its error."""
    ends = [(at(x, unit, part), at(y, unit, part)) for x, y in both]
    verdicts = [(p.get("right", ""), q.get("right", "")) for p, q in ends]
    return error_of([p["gain"][0] - q["gain"][0] for p, q in ends], verdicts)


def read(out: Path, rows: Iterable[str]) -> dict[str, list[Result]]:
    """Return results by row, in the order of ``rows``."""
    found: dict[str, list[Result]] = {}
    for row in rows:
        files = sorted(out.glob(f"{row}-seed*.json"))
        if files:
            found[row] = [json.loads(f.read_text()) for f in files]
    return found


def table(results: dict[str, list[Result]]) -> str:
    """Return the comparison as Markdown; gains are paired with the base's pictures, errors are over seeds."""
    budgets = next(iter(results.values()))[0]["budgets"]
    e, s = budgets["evaluations"], budgets["seconds"]
    lines = [
        f"| row | seeds | lr | gain at {e:,} evaluations | gain at {s:g} s | spread kept | layouts kept | "
        "evaluations an iteration | seconds for the evaluations |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(results, key=lambda r: -mean([at(x, "evaluations", 1.0)["gain"][0] for x in results[r]])[0])
    for row in order:
        runs = results[row]
        ends = [at(x, "evaluations", 1.0) for x in runs]
        cells = [_points(gain(runs, unit)) for unit in ("evaluations", "seconds")]
        spread = mean([p["spread"] / x["curve"][0]["spread"] for p, x in zip(ends, runs, strict=True)])[0]
        kept = [p["layouts_kept"] for p in ends]
        cells += [f"{100 * spread:.0f} %", "–" if None in kept else f"{100 * mean(kept)[0]:.0f} %"]
        cells += [f"{mean([p['evaluations'] / p['iteration'] for p in ends])[0]:,.0f}"]
        cells += [f"{mean([p['seconds'] for p in ends])[0]:.1f}"]
        lines.append(f"| {row} | {len(runs)} | {runs[0]['lr']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _points(value: tuple[float, float]) -> str:
    m, error = value
    return f"{100 * m:+.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")


PAIRS = (
    ("flow-grpo", "permuted", "Flow-GRPO over the same with permuted rewards"),
    ("dense-grpo", "flow-sde", "DenseGRPO over Flow-GRPO (the same SDE)"),
    ("dense-grpo", "flow-grpo", "DenseGRPO over Flow-GRPO (as in the demo)"),
    ("tp-grpo", "flow-grpo", "TP-GRPO over Flow-GRPO"),
    ("branch-grpo", "dance-grpo", "BranchGRPO over DanceGRPO"),
    ("euphonium", "dance-grpo", "Euphonium over DanceGRPO"),
    ("b2-diffurl", "ddpo", "B²-DiffuRL over DDPO"),
    ("grpo-guard", "flow-sde", "GRPO-Guard over Flow-GRPO (the same SDE)"),
    ("mix-grpo", "dance-grpo", "MixGRPO over DanceGRPO"),
    ("tree-grpo", "dance-grpo", "TreeGRPO over DanceGRPO"),
)


def claims(results: dict[str, list[Result]]) -> str:
    """Return the published comparisons, seed by seed at equal budgets, and how soon one reaches the other's end."""
    lines = [
        "| claim | seeds | points at equal evaluations | at equal seconds | layouts kept | times as few evaluations |",
        "|---|---|---|---|---|---|",
    ]
    for a, b, what in PAIRS:
        rivals = {x["seed"]: x for x in results.get(b, [])}
        both = [(x, rivals[x["seed"]]) for x in results.get(a, []) if x["seed"] in rivals]
        if not both:
            continue
        ends = [[at(x, "evaluations", 1.0) for x in pair] for pair in both]
        kept = [
            p["layouts_kept"] - q["layouts_kept"] for p, q in ends if None not in (p["layouts_kept"], q["layouts_kept"])
        ]
        goal = mean([q["gain"][0] for _, q in ends])[0]
        speed = reach([x for x, _ in both], goal)
        said = "no gain to reach" if goal <= 0 else f"{reach([y for _, y in both], goal) / speed:.2f}×"
        said = "never" if speed == math.inf else said
        cells = [str(len(both)), *(_points(gap(both, unit)) for unit in ("evaluations", "seconds"))]
        cells += [_points(mean(kept)) if kept else "–", said]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reach(runs: list[Result], goal: float) -> float:
    """Return the evaluations at which the mean curve first has a gain; infinite if it never does."""
    before = (0.0, 0.0)
    for part in parts(runs[0]):
        y = mean([at(x, "evaluations", part)["gain"][0] for x in runs])[0]
        x = mean([at(x, "evaluations", part)["evaluations"] for x in runs])[0]
        if y >= goal:
            return before[0] + (x - before[0]) * (goal - before[1]) / max(y - before[1], 1e-12)
        before = (x, y)
    return math.inf


def draw(results: dict[str, list[Result]], path: Path) -> None:
    """Plot accuracy against evaluations and seconds, with standard errors over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for ax, unit in zip(axes, ("evaluations", "seconds"), strict=True):
        for i, (row, runs) in enumerate(results.items()):
            points = [[x["curve"][0] for x in runs], *([at(x, unit, p) for x in runs] for p in parts(runs[0]))]
            x = [mean([p[unit] for p in ps])[0] for ps in points]
            y, error = zip(*(mean([p["accuracy"][0] for p in ps]) for ps in points), strict=True)
            ax.plot(x, y, color=colours[i % 20], label=f"{row} ({len(runs)})", linewidth=1.6, marker="o", markersize=3)
            low, high = ([a + k * (0 if math.isnan(b) else b) for a, b in zip(y, error, strict=True)] for k in (-1, 1))
            ax.fill_between(x, low, high, color=colours[i % 20], alpha=0.12, linewidth=0)
        ax.set_xlabel("network evaluations, sampling and training" if unit == "evaluations" else "seconds of training")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("held-out strict accuracy")
    axes[1].legend(fontsize=7.5, ncol=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)
