"""Credit assignment at equal compute: every GRPO-family method on one world, one trainer, one budget.

    python tests/benchmarks/compare_credit.py run   --world shapes --seeds 0 1 2 3 4 --out docs/results/credit/shapes
    python tests/benchmarks/compare_credit.py table --out docs/results/credit/shapes --figure docs/figures/credit.png

``run`` trains every row (a method with its settings) with every seed until *both* budgets are spent, network
evaluations of sampling and training as the ledger books them and seconds of training (by the clock; on a CPU those of
the process, with one thread, so that other work on the machine does not count). The policy is judged by the world's
strict reward on held-out prompts, at fixed parts of each budget, all of them on the same images. One JSON file per
(row, seed); what is there already is not done again, so the command can be stopped and repeated at any time, one piece
at a time if the machine is shared:

    for s in 0 1 2; do for r in flow-grpo tp-grpo; do
        flock /tmp/heavy.lock python tests/benchmarks/compare_credit.py run --rows $r --seeds $s --out ...; done; done

``--tune`` first tries learning rates, on seeds of its own and, on the shapes world, on the prompts that recipes are
chosen on; ``run`` then takes each row's best. Settings are the methods' demo presets without penalty, with the world's
group size, steps, batch and optimiser for all alike.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.credit_table import at, claims, draw, mean, parts, reach, read, table  # noqa: E402

__all__ = ["EARLY", "at", "claims", "configuration", "draw", "mean", "one", "parts", "reach", "read", "table"]

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
        parts: of each budget, at which the policy is judged.
        categories: of prompts that it is judged on; all when empty.
        trial: keys of the evaluation while learning rates are tried.
        warm: whether a process first does an iteration that is thrown away, so that imports count for no method.
        rows: what there is to compare; all of ``ROWS`` when empty.
        sampler: of the pictures that are judged: the ode, or the consistency steps of a few-step model.
        walk: learning rate of a row that takes one optimiser step an iteration; with n steps it is walk / √n, so that
            all rows' weights make the same random walk an iteration. None for the presets' rates.
    """

    data: Settings
    evaluations: int
    seconds: float
    images: int
    toy: dict[str, Settings] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    parts: tuple[float, ...] = PARTS
    categories: tuple[str, ...] = ()
    trial: Settings = field(default_factory=dict)
    warm: bool = True
    rows: tuple[str, ...] = ()
    sampler: str = "ode"
    walk: float | None = None


EARLY: Settings = {"noise": 0.8, "noise_law": "cps", "window": (0, 3), "ratio": "mse", "std": "group",
                   "shared_noise": False}  # fmt: skip
"""Flow-GRPO as in the demo of 21 November 2026, with which all comparisons were made: noise on the first steps."""

ROWS: dict[str, Settings] = {
    "flow-grpo": {"name": "flow-grpo", "kl": 0.0, **EARLY},
    "permuted": {"name": "flow-grpo", "kl": 0.0, **EARLY, "permute": True},
    "flow-sde": {"name": "flow-grpo", "kl": 0.0, "noise": 0.7, "noise_law": "flow", "window": None, "ratio": "per_dim",
                 "std": "group", "shared_noise": False, "clip": 1e-3},
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
    "tree-grpo": {"name": "tree-grpo", "window": (0, 4), "backup": "edges"},
    "dynamic-treerpo": {"name": "tree-grpo", "window": (0, 4), "slide": 10, "growth": 1.0, "reach": 1.0,
                        "supervised": 0.01},
    "euphonium": {"name": "euphonium"},
    "b2-diffurl": {"name": "b2-diffurl"},
    "ddpo": {"name": "ddpo"},
    "talk2move": {"name": "talk2move"},
}  # fmt: skip
FEW_STEPS: dict[str, Settings] = {
    "rlcm": {"name": "rlcm"},
    "rlcm-rebel": {"name": "rlcm", "loss": "rebel", "eta": 1.0},
}
"""Rows of a consistency model."""
SHORT = (
    "flow-grpo", "permuted", "tp-grpo", "flow-sde", "dense-grpo", "dance-grpo", "branch-grpo", "euphonium", "ddpo",
    "b2-diffurl",
)  # fmt: skip

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
            "tree-grpo": {"splits": (0, 1, 2, 3), "clip": 1e-2},
            "dynamic-treerpo": {"splits": (0, 1, 2, 3), "clip": 1e-2},
            "euphonium": {"clip": 1e-2, "width": 16, "scale": 0.02}, "b2-diffurl": {"clip": 1e-2, "stages": 20},
            "talk2move": {"exits": (2, 3, 4), "clip": 1e-2},
        },
        (3e-3, 1e-2, 3e-2),
    ),
    "shapes": World(
        {
            "pipeline": "shapes", "reward": "shapes", "precision": "bf16", "prompts": "shapes:count",
            "fit": {"groups": 8, "size": 16, "steps": 10, "batch": 192, "betas": (0.9, 0.99), "weight_decay": 0.0,
                    "warmup": 5},
        },
        300_000, 600.0, 400, rates=(1e-4, 3e-4), parts=(0.5, 1.0), categories=("count",),
        trial={"prompts": "shapes:select"}, warm=False,
    ),
    "shapes-short": World(
        {
            "pipeline": "shapes", "reward": "shapes", "precision": "bf16", "prompts": "shapes:count7",
            "fit": {"groups": 8, "size": 16, "steps": 6, "batch": 192, "betas": (0.9, 0.99), "weight_decay": 0.0,
                    "warmup": 5},
            "evaluation": {"steps": 6},
        },
        30_000, 120.0, 600, {"dense-grpo": {"rounds": 3}, "b2-diffurl": {"stages": 20}}, rates=(1e-4, 3e-4),
        parts=(1.0,), categories=("count",), trial={"prompts": "shapes:select"}, warm=False, walk=4.2e-4,
    ),
    "turbo": World(
        {
            "pipeline": "shapes-turbo", "reward": "shapes", "precision": "bf16",
            "fit": {"groups": 8, "size": 16, "steps": 4, "batch": 128, "betas": (0.9, 0.99), "weight_decay": 0.0,
                    "warmup": 5},
        },
        15_000, 90.0, 1000, rates=(2e-4, 5e-4), parts=(1.0,), categories=("count",),
        trial={"prompts": "shapes-turbo:select"}, warm=False, rows=tuple(FEW_STEPS), sampler="consistency",
    ),
}  # fmt: skip


STEPS_AN_ITERATION = {
    "flow-grpo": 2, "permuted": 2, "tp-grpo": 3, "flow-sde": 4, "dense-grpo": 4, "dance-grpo": 2, "euphonium": 2,
    "branch-grpo": 2, "branch-grpo-pruned": 2, "tree-grpo": 2, "dynamic-treerpo": 2, "ddpo": 4, "b2-diffurl": 1,
    "mix-grpo": 2, "flow-grpo-fast": 2, "grpo-guard": 4, "g2rpo": 1, "talk2move": 2,
}  # fmt: skip
"""Optimiser steps of a row's iteration on ``shapes-short``: trained transitions over the batch of 192, rounded up."""


# -- one run ---------------------------------------------------------------------------------------------------------
def configuration(world: World, row: str, seed: int, rate: float | None, device: str) -> Any:
    """Return the configuration of a run."""
    from flowalign.config import compose

    method = {**(ROWS | FEW_STEPS)[row], **world.toy.get(row, {})}
    if rate is None and world.walk is not None:
        rate = world.walk / STEPS_AN_ITERATION[row] ** 0.5
    fit = {**world.data.get("fit", {}), "seed": seed, "iterations": 10**9, **({"lr": rate} if rate else {})}
    data = {"device": device, **world.data, "permute": method.pop("permute", False), "method": method, "fit": fit}
    if method["name"] == "flow-grpo":
        data |= {"ema": 0.9, "fit": {"lr": 3.5e-4, **fit}}  # the other settings of EARLY's demo
    data["trackers"] = []
    data["evaluation"] = {**data.get("evaluation", {}), "images": world.images}
    return compose(data, None, where=row)


def one(
    world: World, row: str, seed: int, rate: float | None, device: str = "cpu", out: Path | None = None
) -> dict[str, Any]:
    """Train until both budgets are spent; return the curve.

    Args:
        world: where.
        row: which.
        seed: of the training.
        rate: learning rate; the preset's when None.
        device: where.
        out: folder that keeps the base's verdict, which is the same for all runs; None to judge it anew.
    """
    import torch

    from flowalign.build import build
    from flowalign.evaluate import Outcome, category, examine
    from flowalign.fit import fit
    from flowalign.kernels import Ancestral, EulerMaruyama
    from flowalign.laws import Consistency
    from flowalign.ledger import Ledger
    from flowalign.policy import Policy
    from flowalign.prepare import prepare

    torch.manual_seed(seed)
    config = configuration(world, row, seed, rate, device)
    job = build(config)
    recipe = config.method.recipe(job.pipeline.times(config.fit.steps))
    roles = tuple(dict.fromkeys((*recipe.roles, "reference")))
    policy, parameters = prepare(
        job.pipeline, config.lora, roles, old=recipe.old, ema=config.ema, context=job.context, frozen=job.frozen
    )
    other = Policy(job.judged, policy.roles, Ledger(), None, job.frozen)
    asked = [p for p in job.exam.prompts if not world.categories or category(p) in world.categories]
    exam = replace(job.exam, prompts=asked)
    kernel = Ancestral(Consistency()) if world.sampler == "consistency" else EulerMaruyama()

    def look(role: str) -> Outcome:
        return examine(job.judged, other, job.judge, exam, role=role, kernel=kernel, layouts=job.layouts)

    base, role = judged(out, exam, parameters, lambda: look("reference")), "current" if config.ema is None else "ema"
    found: dict[str, Any] = {
        "row": row, "seed": seed, "lr": config.fit.lr, "world": config.pipeline, "device": device,
        "precision": config.precision, "method": (ROWS | FEW_STEPS)[row], "weights": digest(parameters),
        "budgets": {"evaluations": world.evaluations, "seconds": world.seconds},
        "curve": [point(base, base, 0, 0, 0.0, "start")],
    }  # fmt: skip
    stream = fit(job.pipeline, job.scorer, job.source, recipe, config.fit, policy=policy, parameters=parameters)
    clock = time.process_time if config.device == "cpu" else time.perf_counter
    seen: tuple[int, Any] = (0, base)
    found["training"] = []  # (evaluations, seconds, mean reward of the iteration's samples)
    for i, evaluations, seconds, why in until(stream, job.scorer, world, clock, found["training"]):
        if seen[0] != i:
            seen = (i, look(role))
        found["curve"].append(point(base, seen[1], i, evaluations, seconds, why))
    return found


def digest(parameters: Any) -> str:
    """Return a name of the weights that a run starts from."""
    import torch

    flat = torch.cat([p.detach().float().flatten().cpu() for p in parameters])
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:12]


def judged(out: Path | None, exam: Any, parameters: Any, look: Callable[[], Any]) -> Any:
    """Return the verdict on the base, kept beside the results: runs of one folder are paired with the same one."""
    import torch

    from flowalign.exam import Outcome

    if out is None:
        return look()
    path = out / "runs" / f"base-{digest(parameters)}-{exam.mark['prompts']:x}-{exam.images}-{exam.steps}.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        torch.save(look().state_dict(), temporary)
        os.replace(temporary, path)
    return Outcome.recall(torch.load(path, weights_only=True))


def until(
    stream: Iterator[dict[str, float]],
    scorer: Any,
    world: World,
    clock: Callable[[], float],
    training: list[tuple[int, float, float]],
) -> Iterator[tuple[int, int, float, str]]:
    """Yield (iteration, evaluations, seconds, which budget) whenever a part of a budget has been spent."""
    waiting = {"evaluations": list(world.parts), "seconds": list(world.parts)}
    budget = {"evaluations": world.evaluations, "seconds": world.seconds}
    seconds = 0.0
    while any(waiting.values()):
        began = clock()
        metrics = next(stream)
        seconds += clock() - began
        spent = {"evaluations": scorer.ledger.evaluations, "seconds": seconds}
        training.append((spent["evaluations"], round(seconds, 2), round(metrics["reward"], 4)))
        for unit, left in waiting.items():
            while left and spent[unit] >= left[0] * budget[unit]:
                yield int(metrics["iteration"]), spent["evaluations"], seconds, f"{unit}:{left.pop(0):g}"


def point(base: Any, now: Any, iteration: int, evaluations: int, seconds: float, why: str) -> dict[str, Any]:
    """Return one place of a curve."""
    from flowalign.evaluate import compare, mean_se
    from flowalign.monitor import spread

    by_category = compare(base, now)
    kept = [p.kept for p in by_category.values() if p.kept is not None]
    return {
        "why": why, "iteration": iteration, "evaluations": evaluations, "seconds": seconds,
        "accuracy": mean_se(now.judged), "gain": mean_se(now.judged - base.judged), "spread": spread(now),
        "layouts_kept": sum(kept) / len(kept) if kept else None,
        "by_category": {k: [p.after[0], p.gain[0], p.gain[1]] for k, p in by_category.items()},
        "right": "".join("01"[int(v > 0.5)] for v in now.judged.tolist()),
    }  # fmt: skip


# -- the grid --------------------------------------------------------------------------------------------------------
def best_rate(out: Path, row: str, world: World) -> float | None:
    """Return the learning rate with the best mean curve in a row's tuning runs; None where there are none."""
    tried = {}
    for rate in world.rates:
        files = [f for s in TUNING if (f := out / "tuning" / f"{row}-lr{rate:g}-seed{s}.json").is_file()]
        if files:
            found = [json.loads(f.read_text()) for f in files]
            tried[rate] = mean([p["gain"][0] for x in found for p in x["curve"][1:]])[0]
    return max(tried, key=lambda r: tried[r]) if tried else None


def grid(args: argparse.Namespace, world: World) -> None:
    """Do what is not there yet, seed by seed, so that a stopped grid is a smaller one and not a lopsided one."""
    todo: list[tuple[Path, str, int, float | None]] = []
    if args.tune:
        data = {**world.data, "evaluation": {**world.data.get("evaluation", {}), **world.trial}}
        world = replace(world, data=data)
        for seed in TUNING if args.trials is None else TUNING[: args.trials]:
            for row in args.rows:
                todo += [
                    (args.out / "tuning" / f"{row}-lr{r:g}-seed{seed}.json", row, seed, r) for r in world.rates
                ]  # fmt: skip
    else:
        for seed in args.seeds:
            todo += [(args.out / f"{row}-seed{seed}.json", row, seed, None) for row in args.rows]
    began, warm = time.perf_counter(), not world.warm
    for path, row, seed, rate in todo:
        if path.is_file():
            continue
        if not warm:  # what a process does once, imports and first calls, is no method's cost
            one(replace(world, evaluations=1, seconds=0.0, images=1), row, seed, rate, args.device)
            warm = True
        if args.minutes is not None and time.perf_counter() - began > 60 * args.minutes:
            print("out of time; repeat the command to go on", flush=True)
            return
        found = one(world, row, seed, rate or best_rate(args.out, row, world), args.device, args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(temporary, path)
        end = found["curve"][-1]
        print(
            f"{path.name:42} lr {found['lr']:g}  {end['accuracy'][0]:.3f} ({end['gain'][0]:+.3f}±{end['gain'][1]:.3f}) "
            f" {end['iteration']} iterations, {end['evaluations']} evaluations, {end['seconds']:.0f} s",
            flush=True,
        )


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
    p.add_argument("--trials", type=int, help="seeds of each learning rate that is tried; all when not given")
    p.add_argument("--rates", nargs="*", type=float, help="learning rates to try")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--figure", type=Path)
    args = p.parse_args()
    import torch

    torch.set_num_threads(1)
    if args.what == "table":
        results = read(args.out, ROWS | FEW_STEPS)
        print(table(results), claims(results), sep="\n\n")
        if args.figure is not None:
            draw(results, args.figure)
        return
    world = WORLDS[args.world]
    known = world.rows or tuple(ROWS)
    args.rows = list(SHORT) if args.rows == ["short"] else (args.rows or list(known))
    strangers = set(args.rows) - set(known)
    if strangers:
        p.error(f"no rows {sorted(strangers)} on {args.world}; there are {', '.join(known)}.")
    given = {k: getattr(args, k) for k in ("evaluations", "seconds", "images") if getattr(args, k) is not None}
    if args.rates:
        given["rates"] = tuple(args.rates)
    grid(args, replace(world, **given))


if __name__ == "__main__":
    main()
