"""Reward gradients against policy gradients on the demo model: one JSON per (method, seed), one table, one plot.

    python -m tests.benchmarks.compare_gradients --seconds 30 --seeds 0 1 2     runs what is missing, then both
    python -m tests.benchmarks.compare_gradients --table                        only the table and the plot

Every method trains all weights of ``shapes`` on the small open_clip model ``shapes-clip`` from the same prompts, for
the same seconds of one core's own time (a busy machine does not count), and is looked at on held-out prompts with the
same noises: the reward it was trained on, the strict judge, layouts among correct pictures (diversity), the velocity's
distance to the base. Samples are those rolled out for training; peak bytes are those alive in one iteration, with
gradients and the optimiser's moments, without the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "gradients"
PLOT = ROOT / "docs" / "figures" / "gradients.png"
STEPS = 10
LABELS = {
    "draft-1": "DRaFT-1", "draft-3": "DRaFT-3", "draft-full": "DRaFT (all 10 steps)", "draft-lv": "DRaFT-LV (n = 2)",
    "refl": "ReFL", "alignprop": "AlignProp", "adjoint-matching": "Adjoint Matching", "rtb": "RTB",
    "nabla-db": "∇-DB", "flow-grpo": "Flow-GRPO",
}  # fmt: skip
GRADIENT = ("draft-1", "draft-3", "draft-full", "draft-lv", "refl", "alignprop", "adjoint-matching", "nabla-db")


def methods() -> dict[str, dict[str, Any]]:
    """Return the settings of every method: those of its demo preset, and what makes the variant."""
    from flowalign.methods import METHODS

    grown = {"groups": 4, "size": 4, "batch": 16, "accumulate": 0, "lr": 2e-4}
    steps = {"groups": 4, "size": 8, "batch": 96, "lr": 2e-4}
    table: dict[str, dict[str, Any]] = {
        "draft-1": {"method": {"name": "draft", "depth": 1}, "fit": grown},
        "draft-3": {"method": {"name": "draft", "depth": 3}, "fit": grown},
        "draft-full": {"method": {"name": "draft", "mode": "full"}, "fit": grown},
        "draft-lv": {"method": {"name": "draft", "depth": 1, "repeats": 2}, "fit": grown},
        "refl": {"method": {"name": "draft", "mode": "refl", "depth": 3}, "fit": grown},
        "alignprop": {"method": {"name": "draft", "mode": "random", "eta": 1.0}, "fit": grown},
        "adjoint-matching": {"method": {"name": "adjoint-matching"}, "fit": steps},
        "rtb": {"method": {"name": "rtb"}, "fit": {**steps, "batch": 16}},
        "nabla-db": {"method": {"name": "nabla-db"}, "fit": steps},
        "flow-grpo": {"method": {"name": "flow-grpo"}, "fit": steps},
    }
    return {k: v for k, v in table.items() if v["method"]["name"] in METHODS}


def configure(name: str, seed: int, images: int) -> Any:
    """Return the run's configuration."""
    from flowalign.config import compose

    own = methods()[name]
    fit = {**own["fit"], "steps": STEPS, "iterations": 10**6, "seed": seed, "weight_decay": 0.0}
    data = {
        "method": own["method"], "reward": "shapes-clip", "fit": fit, "trackers": [], "device": "cpu",
        "evaluation": {"every": 1, "check": images, "batch": 64},
    }  # fmt: skip
    return compose(data, None, "demo", name)


def one(name: str, seed: int, seconds: float, looks: int, images: int) -> dict[str, Any]:
    """Train one method with one seed and look at it on the way."""
    from flowalign.build import build
    from flowalign.config import to_dict
    from flowalign.evaluate import examine
    from flowalign.fit import fit
    from flowalign.prepare import prepare

    config = configure(name, seed, images)
    torch.manual_seed(seed)
    job = build(config)
    recipe = config.method.recipe(job.pipeline.times(config.fit.steps))
    roles = tuple(dict.fromkeys((*recipe.roles, "reference")))
    policy, parameters = prepare(
        job.pipeline, config.lora, roles, old=recipe.old, ema=config.ema, ledger=job.scorer.ledger, context=job.context
    )
    run = look_parts(job, policy)
    base = examine(*run[:3], job.check, role="reference", layouts=job.layouts)
    out: dict[str, Any] = {"method": name, "seed": seed, "seconds": seconds, "config": to_dict(config)}
    curve = [point(run, job, base, base, {"seconds": 0.0, "samples": 0, "evaluations": 0, "gradients": 0})]
    spent, iterations, began = 0.0, 0, time.process_time()
    stream = fit(job.pipeline, job.scorer, job.source, recipe, config.fit, policy=policy, parameters=parameters)
    for _ in stream:
        iterations += 1
        spent += time.process_time() - began
        if spent >= seconds * len(curve) / looks:
            used = {"seconds": spent, "samples": iterations * config.fit.groups * config.fit.size}
            used |= {"evaluations": policy.ledger.evaluations, "gradients": policy.ledger.gradients}
            after = examine(*run[:3], job.check, role="ema", layouts=job.layouts)
            curve.append(point(run, job, base, after, used))
            if len(curve) > looks:
                break
        began = time.process_time()
    stream.close()
    return out | {"iterations": iterations, "curve": curve, "peak_bytes": peak(job, recipe, config, policy, parameters)}


def done(path: Path, config: Any, args: argparse.Namespace) -> bool:
    """Return whether a result is there and of these very settings; others are made again."""
    from flowalign.config import to_dict

    if not path.exists():
        return False
    found = json.loads(path.read_text())
    same = found["config"] == json.loads(json.dumps(to_dict(config), default=str))
    return same and found["seconds"] == args.seconds and len(found["curve"]) == args.looks + 1


def look_parts(job: Any, policy: Any) -> tuple[Any, Any, Any]:
    """Return generator, policy with a ledger of its own, and the judges of the looks."""
    from flowalign.ledger import Ledger
    from flowalign.policy import Policy

    return job.judged, Policy(job.judged, policy.roles, Ledger(), None, job.context), job.watch


def point(run: Any, job: Any, base: Any, after: Any, used: dict[str, float]) -> dict[str, Any]:
    """Return what one look saw, over all categories."""
    from flowalign.evaluate import compare, drift

    def pooled(outcome: Any) -> Any:
        return replace(outcome, category=["all"] * len(outcome.row))

    seen: dict[str, Any] = dict(used)
    for name in base.scores:
        c = compare(pooled(base), pooled(after), name)["all"]
        seen[name] = {"before": c.before, "after": c.after, "gain": c.gain, "layouts": c.layouts, "kept": c.kept}
    if used["samples"]:
        prompts = [job.check.prompts[int(base.row[i])] for i in base.shown[:32]]
        seen["drift"] = drift(
            run[0], run[1], [p.text for p in prompts], [p.meta for p in prompts], base.x0[:32], "ema", 0
        )
    return seen


def peak(job: Any, recipe: Any, config: Any, policy: Any, parameters: Any) -> int:
    """Return the most bytes alive in one more iteration, above those alive before it."""
    from flowalign.fit import fit
    from flowalign.meter import Meter

    options = replace(config.fit, iterations=1)
    for p in parameters:
        p.grad = None
    with Meter() as meter:
        list(fit(job.pipeline, job.scorer, job.source, recipe, options, policy=policy, parameters=parameters))
        return int(meter.peak)


# -- what is made of it ----------------------------------------------------------------------------------------------
def results() -> dict[str, list[dict[str, Any]]]:
    """Return all results by method, in the order of the table."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in LABELS:
        runs = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{name}-seed*.json"))]
        if runs:
            found[name] = runs
    return found


def spread(values: list[float], form: str = "{:+.3f}") -> str:
    """Return mean ± standard error over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{form.format(statistics.mean(values))} ± {error:.3f}"


def needed(run: dict[str, Any], gain: float) -> float:
    """Return the samples at which a run's held-out reward first reached a gain, between looks by a straight line."""
    curve = run["curve"]
    for a, b in pairwise(curve):
        low, high = a["shapes-clip"]["gain"][0], b["shapes-clip"]["gain"][0]
        if high >= gain:
            share = 0.0 if high == low else max(0.0, (gain - low) / (high - low))
            return a["samples"] + share * (b["samples"] - a["samples"])
    return math.inf


def table(gain: float | None = None) -> Iterator[str]:
    """Yield the lines of the table."""
    found = results()
    ends = {n: statistics.mean(r["curve"][-1]["shapes-clip"]["gain"][0] for r in runs) for n, runs in found.items()}
    if gain is None:  # what the policy gradient reached: how many samples does each method need for as much?
        gain = max(ends.get("flow-grpo", 0.0), 0.005)
    yield (
        f"| method | seeds | reward gain | strict gain | layouts kept | distance | samples | seconds | samples to "
        f"{gain:+.3f} | peak MB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, runs in found.items():
        last = [r["curve"][-1] for r in runs]
        kept = [p["shapes"]["kept"] for p in last if p["shapes"]["kept"] is not None]
        reach = [needed(r, gain) for r in runs]
        hit = [r for r in reach if math.isfinite(r)]
        samples = f"{statistics.mean(hit):.0f} ({len(hit)}/{len(reach)})" if hit else f"never (0/{len(reach)})"
        yield (
            f"| {LABELS[name]} | {len(runs)} | {spread([p['shapes-clip']['gain'][0] for p in last])} | "
            f"{spread([p['shapes']['gain'][0] for p in last])} | "
            f"{f'{statistics.mean(kept):.0%}' if kept else '-'} | {statistics.mean(p['drift'] for p in last):.4f} | "
            f"{statistics.mean(p['samples'] for p in last):.0f} | {statistics.mean(p['seconds'] for p in last):.0f} | "
            f"{samples} | {statistics.mean(r['peak_bytes'] for r in runs) / 1e6:.0f} |"
        )


def plot() -> None:
    """Draw reward against samples and seconds, and the strict judge against reward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = results()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.8))
    colours = plt.get_cmap("tab10").colors
    for (name, runs), colour in zip(found.items(), colours, strict=False):
        style = "-" if name in GRADIENT else "--"
        looks = list(zip(*[r["curve"] for r in runs], strict=True))
        mean = {k: [statistics.mean(p[k] for p in look) for look in looks] for k in ("samples", "seconds")}
        reward, strict = (
            [statistics.mean(p[k]["gain"][0] for p in look) for look in looks] for k in ("shapes-clip", "shapes")
        )
        axes[0].plot(mean["samples"], reward, style, color=colour, label=LABELS[name])
        axes[1].plot(mean["seconds"], reward, style, color=colour)
        axes[2].plot(reward, strict, style, color=colour)
        axes[2].plot(reward[-1:], strict[-1:], "o", color=colour, ms=4)
    axes[0].set(xlabel="samples rolled out", ylabel="gain of shapes-clip, held-out prompts", xscale="symlog")
    axes[0].set_title("reward against samples")
    axes[1].set(xlabel="seconds of one core", title="reward against seconds")
    axes[2].set(xlabel="gain of shapes-clip", ylabel="gain of the strict judge", title="is the reward's gain real?")
    axes[2].axhline(0, color="#bbbbbb", lw=0.8, zorder=0)
    fig.legend(loc="lower center", ncol=5, frameon=False)
    fig.tight_layout(rect=(0, 0.13, 1, 1))
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(PLOT, dpi=110)


def main() -> None:
    """Read options, run what is missing, write the table and the plot."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="*", default=list(LABELS))
    p.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    p.add_argument("--seconds", type=float, default=30.0, help="of one core's own time, per run, looks not counted")
    p.add_argument("--looks", type=int, default=4)
    p.add_argument("--images", type=int, default=96, help="per look")
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    known = methods()
    for seed in args.seeds if not args.table else []:
        for name in args.methods:
            path = RESULTS / f"{name}-seed{seed}.json"
            if name not in known:
                print(f"{name}: not in this checkout, left out", flush=True)
            elif not done(path, configure(name, seed, args.images), args):
                result = one(name, seed, args.seconds, args.looks, args.images)
                path.write_text(json.dumps(result, default=str) + "\n")
                end = result["curve"][-1]
                print(f"{name} seed {seed}: {end['shapes-clip']['gain']} {end['shapes']['gain']}", flush=True)
    print("\n".join(table()))
    plot()


if __name__ == "__main__":
    main()
