"""Credit assignment at equal compute: every GRPO-family method on one world, one trainer, one budget.

    python tests/benchmarks/compare_credit.py run   --world shapes --seeds 0 1 2 3 4 --out docs/results/credit/shapes
    python tests/benchmarks/compare_credit.py table --out docs/results/credit/shapes --figure docs/figures/credit.png

``run`` trains every row (a method with its settings) with every seed until *both* budgets are spent, network
evaluations of sampling and training as the ledger books them and seconds of training (by the clock; on a CPU those of
the process, with one thread, so that other work on the machine does not count). The policy is judged by the world's
strict reward on held-out prompts, at fixed parts of each budget. One JSON file per (row, seed);
what is there already is not done again, so the command can be stopped and repeated at any time. ``--tune`` tries
learning rates on seeds of its own first and ``run`` then takes each row's best. Settings are the methods' demo presets
without penalty, with the world's group size, steps and batch for all alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

TUNING = (100, 101)  # seeds that learning rates are chosen on, and no figure is reported from
PARTS = (0.25, 0.5, 0.75, 1.0)  # of each budget, at which the policy is judged

Settings = dict[str, Any]


@dataclass(frozen=True)
class World:
    """Where the comparison is made.

    Attributes:
        data: keys of a run's configuration.
        evaluations: budget of network evaluations.
        seconds: budget of the clock.
        images: held-out images per category.
        toy: settings of rows that differ from the demo presets, by row.
        rates: learning rates to tune over.
    """

    data: Settings
    evaluations: int
    seconds: float
    images: int
    toy: dict[str, Settings] = field(default_factory=dict)
    rates: tuple[float, ...] = ()


ROWS: dict[str, Settings] = {
    "flow-grpo": {"name": "flow-grpo", "kl": 0.0},
    "flow-sde": {"name": "flow-grpo", "kl": 0.0, "noise": 0.7, "noise_law": "flow", "window": None, "ratio": "per_dim",
                 "clip": 1e-3},
    "grpo-guard": {"name": "grpo-guard"},
    "dance-grpo": {"name": "dance-grpo"},
    "mix-grpo": {"name": "mix-grpo"},
    "flow-grpo-fast": {"name": "mix-grpo", "noise": 0.8, "noise_law": "cps", "width": 2, "strategy": "random",
                       "shared_noise": False},
    "dense-grpo": {"name": "dense-grpo"},
    "tp-grpo": {"name": "tp-grpo"},
    "g2rpo": {"name": "g2rpo"},
    "branch-grpo": {"name": "tree-grpo"},
    "branch-grpo-pruned": {"name": "tree-grpo", "prune_width": "extremes", "keep": 4},
    "dynamic-treerpo": {"name": "tree-grpo", "window": (0, 4), "growth": 1.0, "reach": 1.0, "supervised": 0.1},
    "euphonium": {"name": "euphonium"},
    "b2-diffurl": {"name": "b2-diffurl"},
    "ddpo": {"name": "ddpo"},
    "talk2move": {"name": "talk2move"},
}  # fmt: skip
SHORT = ("flow-grpo", "dense-grpo", "tp-grpo", "dance-grpo", "euphonium", "branch-grpo", "b2-diffurl")

CLIP: dict[str, Settings] = {row: {"clip": 1e-2} for row in ROWS}
WORLDS = {
    "toy": World(
        {
            "pipeline": "tests.benchmarks.credit_toy:pipeline", "reward": "tests.benchmarks.credit_toy:Over",
            "prompts": "tests/benchmarks/credit_toy.txt", "device": "cpu", "lora": None,
            "fit": {"groups": 4, "size": 16, "steps": 6, "batch": 96, "lr": 3e-3, "weight_decay": 0.0, "warmup": 0},
        },
        12_000, 1.0, 400,
        {
            **CLIP, "g2rpo": {"levels": (0, 1, 2, 3), "width": 16, "clip": 1e-2},
            "grpo-guard": {"clip": 1e-3}, "dense-grpo": {"clip": 1e-2, "rounds": 3},
            "branch-grpo": {"splits": (0, 1, 2, 3), "clip": 1e-2},
            "branch-grpo-pruned": {"splits": (0, 1, 2, 3), "clip": 1e-2},
            "dynamic-treerpo": {"splits": (0, 1, 2, 3), "clip": 1e-2},
            "euphonium": {"clip": 1e-2, "width": 16, "scale": 0.02}, "b2-diffurl": {"clip": 1e-2, "stages": 20},
            "talk2move": {"exits": (2, 3, 4), "clip": 1e-2},
        },
        (3e-3, 1e-2, 3e-2),
    ),
    "shapes": World(
        {"pipeline": "shapes", "reward": "shapes", "fit": {"groups": 8, "size": 16, "steps": 10, "batch": 192}},
        300_000, 600.0, 100, rates=(1e-4, 2e-4, 4e-4),
    ),
}  # fmt: skip


# -- one run ---------------------------------------------------------------------------------------------------------
def configuration(world: World, row: str, seed: int, rate: float | None, device: str) -> Any:
    """Return the configuration of a run."""
    from flowalign.config import compose

    method = {**ROWS[row], **world.toy.get(row, {})}
    fit = {**world.data.get("fit", {}), "seed": seed, "iterations": 10**9, **({"lr": rate} if rate else {})}
    data = {"device": device, **world.data, "method": method, "fit": fit, "trackers": []}
    data["evaluation"] = {**data.get("evaluation", {}), "images": world.images}
    return compose(data, None, where=row)


def one(world: World, row: str, seed: int, rate: float | None, device: str = "cpu") -> dict[str, Any]:
    """Train until both budgets are spent; return the curve."""
    import torch

    from flowalign.build import build
    from flowalign.evaluate import examine
    from flowalign.fit import fit
    from flowalign.ledger import Ledger
    from flowalign.policy import Policy
    from flowalign.prepare import prepare

    torch.manual_seed(seed)
    config = configuration(world, row, seed, rate, device)
    job = build(config)
    recipe = config.method.recipe(job.pipeline.times(config.fit.steps))
    roles = tuple(dict.fromkeys((*recipe.roles, "reference")))
    policy, parameters = prepare(job.pipeline, config.lora, roles, old=recipe.old, ema=config.ema, context=job.context)
    other = Policy(job.judged, policy.roles, Ledger(), None, job.context)
    look = lambda role: examine(job.judged, other, job.judge, job.exam, role=role, layouts=job.layouts)  # noqa: E731
    base, role = look("reference"), "current" if config.ema is None else "ema"
    out: dict[str, Any] = {
        "row": row, "seed": seed, "lr": config.fit.lr, "world": config.pipeline, "device": device,
        "budgets": {"evaluations": world.evaluations, "seconds": world.seconds}, "method": ROWS[row],
        "curve": [point(base, base, 0, 0, 0.0, "start")],
    }  # fmt: skip
    stream = fit(job.pipeline, job.scorer, job.source, recipe, config.fit, policy=policy, parameters=parameters)
    clock = time.process_time if config.device == "cpu" else time.perf_counter
    for i, evaluations, seconds, why in until(stream, job.scorer, world, clock):
        out["curve"].append(point(base, look(role), i, evaluations, seconds, why))
    return out


def until(
    stream: Iterator[dict[str, float]], scorer: Any, world: World, clock: Callable[[], float]
) -> Iterator[tuple[int, int, float, str]]:
    """Yield (iteration, evaluations, seconds, which budget) whenever a part of a budget has been spent."""
    waiting = {"evaluations": list(PARTS), "seconds": list(PARTS)}
    budget = {"evaluations": world.evaluations, "seconds": world.seconds}
    seconds = 0.0
    while any(waiting.values()):
        began = clock()
        metrics = next(stream)
        seconds += clock() - began
        spent = {"evaluations": scorer.ledger.evaluations, "seconds": seconds}
        for unit, parts in waiting.items():
            while parts and spent[unit] >= parts[0] * budget[unit]:
                yield int(metrics["iteration"]), spent["evaluations"], seconds, f"{unit}:{parts.pop(0):g}"


def point(base: Any, now: Any, iteration: int, evaluations: int, seconds: float, why: str) -> dict[str, Any]:
    """Return one place of a curve."""
    from flowalign.evaluate import compare, mean_se
    from flowalign.monitor import spread

    parts = compare(base, now)
    kept = [p.kept for p in parts.values() if p.kept is not None]
    return {
        "why": why, "iteration": iteration, "evaluations": evaluations, "seconds": seconds,
        "accuracy": mean_se(now.judged), "gain": mean_se(now.judged - base.judged), "spread": spread(now),
        "layouts_kept": sum(kept) / len(kept) if kept else None,
        "by_category": {k: [p.after[0], p.gain[0], p.gain[1]] for k, p in parts.items()},
    }  # fmt: skip


# -- the grid --------------------------------------------------------------------------------------------------------
def best_rate(out: Path, row: str, world: World) -> float | None:
    """Return the learning rate with the best mean curve in a row's tuning runs; None where there are none."""
    tried = {}
    for rate in world.rates:
        files = [out / "tuning" / f"{row}-lr{rate:g}-seed{s}.json" for s in TUNING]
        if all(f.is_file() for f in files):
            found = [json.loads(f.read_text()) for f in files]
            tried[rate] = mean([at(x, "evaluations", p)["accuracy"][0] for x in found for p in PARTS])[0]
    return max(tried, key=lambda r: tried[r]) if tried else None


def grid(args: argparse.Namespace, world: World) -> None:
    """Do what is not there yet, seed by seed, so that a stopped grid is a smaller one and not a lopsided one."""
    todo: list[tuple[Path, str, int, float | None]] = []
    if args.tune:
        for seed in TUNING:
            for row in args.rows:
                todo += [
                    (args.out / "tuning" / f"{row}-lr{r:g}-seed{seed}.json", row, seed, r) for r in world.rates
                ]  # fmt: skip
    else:
        for seed in args.seeds:
            todo += [(args.out / f"{row}-seed{seed}.json", row, seed, None) for row in args.rows]
    began, warm = time.perf_counter(), False
    for path, row, seed, rate in todo:
        if path.is_file():
            continue
        if not warm:  # what a process does once, imports and first calls, is no method's cost
            one(replace(world, evaluations=1, seconds=0.0, images=1), row, seed, rate, args.device)
            warm = True
        if args.minutes is not None and time.perf_counter() - began > 60 * args.minutes:
            print("out of time; repeat the command to go on", flush=True)
            return
        found = one(world, row, seed, rate or best_rate(args.out, row, world), args.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(temporary, path)
        end = at(found, "evaluations", 1.0)
        print(f"{path.name:42} lr {found['lr']:g}  {end['accuracy'][0]:.3f} ({end['gain'][0]:+.3f})  "
              f"{found['curve'][-1]['seconds']:.0f} s", flush=True)  # fmt: skip


# -- table and plot --------------------------------------------------------------------------------------------------
def at(result: dict[str, Any], unit: str, part: float) -> dict[str, Any]:
    """Return the point at a part of a budget."""
    return next(p for p in result["curve"] if p["why"] == f"{unit}:{part:g}")


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error over seeds; NaN for one seed."""
    m = sum(values) / len(values)
    if len(values) < 2:
        return m, math.nan
    return m, math.sqrt(sum((v - m) ** 2 for v in values) / (len(values) - 1) / len(values))


def read(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return results by row, in the order of ``ROWS``."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        files = sorted(out.glob(f"{row}-seed*.json"))
        if files:
            found[row] = [json.loads(f.read_text()) for f in files]
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> str:
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
        cells = [_points(mean([at(x, unit, 1.0)["gain"][0] for x in runs])) for unit in ("evaluations", "seconds")]
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
    ("dense-grpo", "flow-sde", "DenseGRPO over Flow-GRPO (the same SDE)"),
    ("dense-grpo", "flow-grpo", "DenseGRPO over Flow-GRPO (as in the demo)"),
    ("tp-grpo", "flow-grpo", "TP-GRPO over Flow-GRPO"),
    ("branch-grpo", "dance-grpo", "BranchGRPO over DanceGRPO"),
    ("euphonium", "dance-grpo", "Euphonium over DanceGRPO"),
)


def claims(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the published comparisons, seed by seed at equal evaluations, and how soon one reaches the other's end."""
    lines = ["| claim | difference, points | speed: evaluations to the rival's end |", "|---|---|---|"]
    for a, b, what in PAIRS:
        if a not in results or b not in results:
            continue
        rivals = {x["seed"]: x for x in results[b]}
        both = [(x, rivals[x["seed"]]) for x in results[a] if x["seed"] in rivals]
        if not both:
            continue
        gap = [at(x, "evaluations", 1.0)["gain"][0] - at(y, "evaluations", 1.0)["gain"][0] for x, y in both]
        goal = mean([at(y, "evaluations", 1.0)["gain"][0] for _, y in both])[0]
        speed = reach(results[b], goal) / reach(results[a], goal)
        said = "never" if speed == 0 else f"{speed:.2f}×"
        lines.append(f"| {what} | {_points(mean(gap))} | {said} |")
    return "\n".join(lines)


def reach(runs: list[dict[str, Any]], goal: float) -> float:
    """Return the evaluations at which the mean curve first has a gain; infinite if it never does."""
    before = (0.0, 0.0)
    for part in PARTS:
        y = mean([at(x, "evaluations", part)["gain"][0] for x in runs])[0]
        x = mean([at(x, "evaluations", part)["evaluations"] for x in runs])[0]
        if y >= goal:
            return before[0] + (x - before[0]) * (goal - before[1]) / max(y - before[1], 1e-12)
        before = (x, y)
    return math.inf


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot accuracy against evaluations and seconds, with standard errors over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for ax, unit in zip(axes, ("evaluations", "seconds"), strict=True):
        for i, (row, runs) in enumerate(results.items()):
            points = [[x["curve"][0] for x in runs], *([at(x, unit, p) for x in runs] for p in PARTS)]
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


def main() -> None:
    """Read options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["run", "table"])
    p.add_argument("--world", default="shapes", choices=list(WORLDS))
    p.add_argument("--rows", nargs="*", help="all; 'short' for " + " ".join(SHORT))
    p.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    p.add_argument("--evaluations", type=int, help="budget of network evaluations")
    p.add_argument("--seconds", type=float, help="budget of the clock")
    p.add_argument("--images", type=int, help="held-out images per category and look")
    p.add_argument("--minutes", type=float, help="begin no further run after so long")
    p.add_argument("--tune", action="store_true", help="try learning rates on seeds of their own")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--figure", type=Path)
    args = p.parse_args()
    import torch

    torch.set_num_threads(1)
    if args.what == "table":
        results = read(args.out)
        print(table(results), claims(results), sep="\n\n")
        if args.figure is not None:
            draw(results, args.figure)
        return
    args.rows = list(SHORT) if args.rows == ["short"] else (args.rows or list(ROWS))
    strangers = set(args.rows) - set(ROWS)
    if strangers:
        p.error(f"no rows {sorted(strangers)}; there are {', '.join(ROWS)}.")
    world = WORLDS[args.world]
    given = {k: getattr(args, k) for k in ("evaluations", "seconds", "images") if getattr(args, k) is not None}
    grid(args, replace(world, **given))


if __name__ == "__main__":
    main()
