"""The curves of a report, drawn from what runs left in their folders, and what the hacking monitor has to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flowalign.monitor import Z, marks
from flowalign.plots import Series, figure

if TYPE_CHECKING:
    from flowalign.report import Shown

__all__ = ["insides", "learning", "quality", "verdict", "watched"]


def learning(runs: Sequence[Shown]) -> str:
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


def quality(runs: Sequence[Shown], main: str) -> str:
    """Draw held-out accuracy, layouts kept and drift of the checks, by seconds of training."""
    score = {r.label: r.summary.get("judge", "") for r in runs}
    several = len(runs) > 1
    panels: dict[str, list[Series]] = {}
    names = list(dict.fromkeys(c for r in runs for k in r.checks for c in k.get(score[r.label], {})))
    for name in sorted(names, key=lambda c: c != main):
        panels[f"accuracy: {name}"] = [_check(r, score[r.label], name, "after", several) for r in runs]
    kept = f"layouts kept: {main} (few images)"  # 50 a category: the table has the figure
    panels[kept] = [_check(r, score[r.label], main, "layouts_kept", several) for r in runs]
    panels["drift from the base"] = [
        Series(
            r.label if several else "",
            [c["seconds"] for c in r.checks],
            [c["drift"] for c in r.checks],
            colour=r.colour,
        )
        for r in runs
    ]
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


def insides(runs: Sequence[Shown]) -> str:
    """Draw what the optimiser sees: ratio, distance to the reference, lag, gradient norm."""
    panels = {
        "ratio": "ratio", "largest |ratio - 1|": "ratio_gap", "KL to the base": "kl", "lag of the old policy": "lag",
        "gradient norm": "grad_norm", "reward spread in a group": "reward_std",
    }  # fmt: skip
    return figure({t: [_series(r, k, runs) for r in runs] for t, k in panels.items()}, "thousand network evaluations")


# -- the monitor -----------------------------------------------------------------------------------------------------
def watched(runs: Sequence[Shown], main: str) -> str:
    """Draw the trained reward beside the held-out ones, diversity, distance and variance; dashed where hacking began.

    Gains are paired differences from the base on the same prompts and noises, with their standard errors.
    """
    runs = [r for r in runs if any("trained" in c for c in r.checks)]
    if not runs:
        return ""
    several = len(runs) > 1
    held = list(dict.fromkeys(n for r in runs for c in r.checks for n in c.get("held_out", {})))
    panels = {"trained reward, gain": [_gain(r, several, "trained") for r in runs]}
    for name in held:
        panels[f"held out, gain: {name.rsplit(':', 1)[-1]}"] = [_gain(r, several, name) for r in runs]
    panels["diversity: spread kept"] = [_watch(r, several, lambda c: c["spread"]) for r in runs]
    panels[f"diversity: layouts kept, {main}"] = [_watch(r, several, _layouts(r, main)) for r in runs]
    panels["KL to the base, nats a sample"] = [_watch(r, several, lambda c: c["kl"]) for r in runs]
    panels["trained reward, s.d. within prompts"] = [_watch(r, several, lambda c: c["trained"]["std"]) for r in runs]
    share = [k for k in panels if k.startswith("diversity")]
    places = [(m["began_evaluations"] / 1000, r.colour) for r in runs for m in list(marks(r.checks).values())[:1]]
    return figure(panels, "thousand network evaluations", percent=share, marks=places)


def _layouts(run: Shown, main: str) -> Callable[[dict[str, Any]], float | None]:
    judge = run.summary.get("judge", "")
    return lambda c: c.get(judge, {}).get(main, {}).get("layouts_kept")


def _watch(run: Shown, several: bool, what: Callable[[dict[str, Any]], float | None]) -> Series:
    rows = [(c["evaluations"] / 1000, what(c)) for c in run.checks if "trained" in c]
    known = [(x, y) for x, y in rows if y is not None]
    return Series(run.label if several else "", [x for x, _ in known], [y for _, y in known], colour=run.colour)


def _gain(run: Shown, several: bool, name: str) -> Series:
    rows = [(c, c["trained"]["gain"] if name == "trained" else c["held_out"].get(name)) for c in run.checks]
    known = [(c["evaluations"] / 1000, g) for c, g in rows if g is not None]
    x, y, error = [x for x, _ in known], [g[0] for _, g in known], [g[1] for _, g in known]
    return Series(run.label if several else "", x, y, error, run.colour)


def verdict(run: Shown) -> str:
    """Return a sentence: where the trained reward rose while a held-out one fell, or that it was not seen."""
    checks = [c for c in run.checks if "trained" in c]
    if not checks:
        return f"{run.label}: these checks are of an older version and say nothing of held-out rewards."
    if not checks[0]["held_out"]:
        return (
            f"{run.label}: every evaluation reward is trained on, so nothing is held out; set evaluation.rewards. "
            "Look at diversity and distance."
        )
    found = marks(checks)
    if not found:
        rises = f"rose while a held-out one fell, both by more than {Z:g} standard errors, at two checks in succession"
        return f"{run.label}: no hacking seen at {len(checks)} checks: nowhere the trained reward {rises}."
    name, m = next(iter(found.items()))
    return (
        f"{run.label}: hacking began at iteration {m['began']} and was certain at {m['seen']}: the trained reward rose "
        f"by {m['rise'][0]:.3g} ± {m['rise'][1]:.2g} while the held-out {name.rsplit(':', 1)[-1]} fell by "
        f"{m['fall'][0]:.3g} ± {m['fall'][1]:.2g}."
    )
