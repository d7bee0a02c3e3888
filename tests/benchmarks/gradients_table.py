"""What is made of the comparison's results: a table in Markdown and a plot, means over seeds.

Samples to a gain: where a run's held-out reward first reached what Flow-GRPO ended with, by straight lines between
looks; of the seeds that reached it, and how many did.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = ["LABELS", "RESULTS", "draw", "needed", "table"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "gradients"
PLOT = ROOT / "docs" / "figures" / "gradients.png"
LABELS = {
    "draft-1": "DRaFT-1", "draft-3": "DRaFT-3", "draft-full": "DRaFT (all 10 steps)", "draft-lv": "DRaFT-LV (n = 2)",
    "refl": "ReFL", "alignprop": "AlignProp", "adjoint-matching": "Adjoint Matching", "rtb": "RTB",
    "nabla-db": "∇-DB", "flow-grpo": "Flow-GRPO",
}  # fmt: skip
GRADIENT = ("draft-1", "draft-3", "draft-full", "draft-lv", "refl", "alignprop", "adjoint-matching", "nabla-db")
Run = dict[str, Any]


def results() -> dict[str, list[Run]]:
    """Return all results by method, in the order of the table."""
    found: dict[str, list[Run]] = {}
    for name in LABELS:
        runs = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{name}-seed*.json"))]
        if runs:
            found[name] = runs
    return found


def within(run: Run, seconds: float) -> list[Run]:
    """Return the looks up to the one at ``seconds``; a run that goes on for longer has more."""
    looks = len(run["curve"]) - 1
    return list(run["curve"][: 1 + round(looks * min(1.0, seconds / run["seconds"]))])


def needed(curve: list[Run], gain: float) -> float:
    """Return the samples at which the held-out reward first reached a gain, between looks by a straight line."""
    for a, b in pairwise(curve):
        low, high = a["shapes-clip"]["gain"][0], b["shapes-clip"]["gain"][0]
        if high >= gain:
            share = 0.0 if high == low else max(0.0, (gain - low) / (high - low))
            return float(a["samples"] + share * (b["samples"] - a["samples"]))
    return math.inf


def peak(runs: list[Run]) -> float:
    """Return the megabytes of an iteration, which the first seed measures."""
    return statistics.mean(r["peak_bytes"] for r in runs if "peak_bytes" in r) / 1e6


def spread(values: list[float], form: str = "{:+.3f}") -> str:
    """Return mean ± standard error over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{form.format(statistics.mean(values))} ± {error:.3f}"


def table(seconds: float) -> Iterator[str]:
    """Yield the lines of the table, at equal seconds, and one more for Flow-GRPO's end."""
    found = results()
    grpo = found.get("flow-grpo", [])
    # what the policy gradient ended with: how many samples does each method need for as much?
    reached = statistics.mean(r["curve"][-1]["shapes-clip"]["gain"][0] for r in grpo) if grpo else 0.0
    gain = max(reached, 0.005)
    yield (
        "| method | rate | seeds | reward gain | strict gain | layouts kept | distance | samples | seconds | "
        f"samples to {gain:+.3f} | peak MB |"
    )
    yield "|---" * 11 + "|"
    for name, runs in found.items():
        yield row(LABELS[name], runs, [within(r, seconds) for r in runs], gain)
    if grpo and grpo[0]["seconds"] > seconds:
        yield row("Flow-GRPO, all its time", grpo, [r["curve"] for r in grpo], gain)


def row(label: str, runs: list[Run], curves: list[list[Run]], gain: float) -> str:
    """Return one line."""
    last = [c[-1] for c in curves]
    kept = [p["shapes"]["kept"] for p in last if p["shapes"]["kept"] is not None]
    reach = [needed(c, gain) for c in curves]
    hit = [r for r in reach if math.isfinite(r)]
    samples = f"{statistics.mean(hit):.0f} ({len(hit)}/{len(reach)})" if hit else f"never (0/{len(reach)})"
    return (
        f"| {label} | {runs[0]['config']['fit']['lr']:g} | {len(runs)} | "
        f"{spread([p['shapes-clip']['gain'][0] for p in last])} | {spread([p['shapes']['gain'][0] for p in last])} | "
        f"{f'{statistics.mean(kept):.0%}' if kept else '-'} | {statistics.mean(p['drift'] for p in last):.4f} | "
        f"{statistics.mean(p['samples'] for p in last):.0f} | {statistics.mean(p['seconds'] for p in last):.0f} | "
        f"{samples} | {peak(runs):.0f} |"
    )


def draw(seconds: float) -> None:
    """Draw reward against samples and seconds, the strict judge against reward, and memory against reward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = results()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(1, 4, figsize=(14, 3.8))
    for (name, runs), colour in zip(found.items(), plt.get_cmap("tab10").colors, strict=False):
        style = "-" if name in GRADIENT else "--"
        whole = means([r["curve"] for r in runs])
        even = means([within(r, seconds) for r in runs])
        axes[0].plot(whole["samples"], whole["reward"], style, color=colour, label=LABELS[name])
        axes[1].plot(even["seconds"], even["reward"], style, color=colour)
        axes[2].plot(even["reward"], even["strict"], style, color=colour)
        axes[2].plot(even["reward"][-1:], even["strict"][-1:], "o", color=colour, ms=4)
        axes[3].plot(peak(runs), even["reward"][-1], "o", color=colour)
    axes[0].set(xlabel="samples rolled out", ylabel="gain of shapes-clip, held-out prompts")
    axes[0].set_title("reward against samples")
    axes[1].set(xlabel="seconds of one core", title="reward against seconds")
    axes[2].set(xlabel="gain of shapes-clip", ylabel="gain of the strict judge", title="is the reward's gain real?")
    axes[2].axhline(0, color="#bbbbbb", lw=0.8, zorder=0)
    axes[3].set(xlabel="peak MB of an iteration", title="reward against memory", xscale="log")
    axes[3].set_xticks([50, 100, 200, 400, 800], ["50", "100", "200", "400", "800"], minor=False)
    axes[3].minorticks_off()
    fig.legend(loc="lower center", ncol=5, frameon=False)
    fig.tight_layout(rect=(0, 0.13, 1, 1))
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(PLOT, dpi=110)


def means(curves: list[list[Run]]) -> dict[str, list[float]]:
    """Return the means over seeds of what is drawn, look by look."""
    looks = list(zip(*curves, strict=True))
    out = {k: [statistics.mean(p[k] for p in look) for look in looks] for k in ("samples", "seconds")}
    for key, name in (("reward", "shapes-clip"), ("strict", "shapes")):
        out[key] = [statistics.mean(p[name]["gain"][0] for p in look) for look in looks]
    return out
