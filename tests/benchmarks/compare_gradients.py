"""Reward gradients against policy gradients on the demo model: one JSON per (method, seed), one table, one plot.

    python -m tests.benchmarks.compare_gradients --seconds 10 --seeds 0 1 2     runs what is missing, then both
    python -m tests.benchmarks.compare_gradients --table                        only the table and the plot
    python -m tests.benchmarks.compare_gradients --trials srpo ipro             learning rates of further methods

Every method trains all weights of ``shapes`` on the small open_clip model ``shapes-clip``, from the same prompts, for
the same seconds of one core's own time (a busy machine does not count). The base has room to improve in two of the four
categories, count and mixed, so training and looks are on those alone. Looks are on held-out prompts with the same
noises: the reward it was trained on, the strict judge, layouts among correct pictures (diversity), the velocity's
distance to the base. Samples are those rolled out for training; peak bytes are those alive in one iteration, with
gradients and the optimiser's moments, without the weights.

A method's learning rate is its own. Where ``rates.json`` has none, short trials with a seed of their own choose it on
the SELECT prompts: the largest gain of the reward among rates that do not cost the strict judge two standard errors;
figures are reported on the REPORT prompts. The three methods that sample a tilt aim at the same one, exp(100 r).
Flow-GRPO is the slowest, and goes on for three times as long, so that there is a gain of the policy gradient to hold
the samples of the others against; what is compared at equal seconds is its state after the first third.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.compare_credit import EARLY
from tests.benchmarks.gradients_table import LABELS, RESULTS, draw, table

STEPS, SCALE = 10, 100.0
TAPED, STEPWISE, POLICY = (1e-4, 2e-4), (2e-4, 5e-4), (3e-4, 1e-3)  # rates tried: ends of what short trials bore
CATEGORIES = ("count", "mixed")
LONGER = {"flow-grpo": 3}
TRIAL = {"seed": 100, "seconds": 5.0, "images": 64}


def methods() -> dict[str, dict[str, Any]]:
    """Return the settings of every method: those of its demo preset, and what makes the variant.

    Those that have no row in the table are for ``--trials``, by which their presets were chosen.
    """
    grown = {"groups": 16, "size": 1, "batch": 16, "accumulate": 0}
    steps = {"groups": 16, "size": 1, "batch": 80}
    groups = {"groups": 4, "size": 8}
    table: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[float, ...]]] = {
        "draft-1": ({"name": "draft", "mode": "last", "depth": 1}, grown, TAPED),
        "draft-3": ({"name": "draft", "mode": "last", "depth": 3}, grown, TAPED),
        "draft-full": ({"name": "draft", "mode": "full", "depth": 3}, grown, TAPED),
        "draft-lv": ({"name": "draft", "mode": "last", "depth": 1, "repeats": 2}, grown, TAPED),
        "refl": ({"name": "draft", "mode": "refl", "depth": 3}, grown, TAPED),
        "alignprop": ({"name": "draft", "mode": "random", "depth": 3, "eta": 1.0}, grown, TAPED),
        "adjoint-matching": ({"name": "adjoint-matching", "scale": SCALE, "late": 3, "early": 2}, steps, STEPWISE),
        "rtb": ({"name": "rtb", "scale": SCALE}, groups | {"batch": 8}, STEPWISE),
        "nabla-db": ({"name": "nabla-db", "scale": SCALE, "fraction": 0.5}, steps, STEPWISE),
        "flow-grpo": ({"name": "flow-grpo", "kl": 0.02, **EARLY}, groups | {"batch": 96}, POLICY),
    }
    table |= {n: ({"name": n}, {}, TAPED) for n in ("srpo", "instruct-video", "ipro", "ctrl-u", "r0")}
    table["forward-looking"] = ({"name": "forward-looking", "scale": SCALE}, {}, STEPWISE)
    return {k: {"method": m, "fit": f, "rates": r} for k, (m, f, r) in table.items()}


def configure(name: str, seed: int, images: int, lr: float, batch: int = 96) -> Any:
    """Return the run's configuration; ``images`` are per look, over both categories."""
    from flowalign.config import compose

    own = methods()[name]
    few = name == "r0"  # a few-step generator
    fit = {**own["fit"], "steps": 4 if few else STEPS, "iterations": 10**6, "seed": seed, "weight_decay": 0.0, "lr": lr}
    data = {
        "pipeline": "shapes-turbo" if few else "shapes", "evaluation": {"every": 1, "check": images, "batch": batch},
        "method": own["method"], "reward": "shapes-clip", "fit": fit, "trackers": [], "device": "cpu",
    }  # fmt: skip
    return replace(compose(data, None, "demo", name), ema=None)  # so few steps that an average would lag behind


@cache
def asked(which: str, every: bool = False) -> list[Any]:
    """Return the prompts of the categories with room; evenly many of each for training."""
    from flowalign.build import world_prompts

    kinds = [[p for p in world_prompts("shapes", which) if p.meta["category"] == c] for c in CATEGORIES]
    most = max(map(len, kinds)) if every else 0
    return [p for k in kinds for p in k * max(1, round(most / len(k)))]


def world() -> str:
    """Return a digest of the demo model's weights: results of other weights are made again."""
    from flowalign.pipelines import worlds

    folder = Path(worlds.__file__).parent / "weights" / "shapes" / "transformer"
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def opened(config: Any, which: str) -> tuple[Any, Any, Any, Any]:
    """Return job, recipe, policy and parameters, training on the train prompts, looked at on those of ``which``."""
    from flowalign.build import build
    from flowalign.prepare import prepare
    from flowalign.source import Prompts

    torch.manual_seed(config.fit.seed)
    job = build(config)
    job.source = Prompts(asked("train", every=True), config.fit.seed)
    job.check = replace(job.check, prompts=asked(which), images=config.evaluation.check // len(CATEGORIES))
    recipe = config.method.recipe(job.pipeline.times(config.fit.steps))
    roles = tuple(dict.fromkeys((*recipe.roles, "reference")))
    policy, parameters = prepare(
        job.pipeline, config.lora, roles, old=recipe.old, ledger=job.scorer.ledger, context=job.context
    )
    return job, recipe, policy, parameters


def one(name: str, config: Any, which: str, seconds: float, looks: int) -> dict[str, Any]:
    """Train one method with one seed and look at it on the way."""
    from flowalign.config import to_dict
    from flowalign.fit import fit

    job, recipe, policy, parameters = opened(config, which)
    base = first_look(job, policy, which)
    out: dict[str, Any] = {"method": name, "seed": config.fit.seed, "seconds": seconds, "world": world()}
    curve = [point(job, policy, base, base, {"seconds": 0.0, "samples": 0, "evaluations": 0, "gradients": 0})]
    spent, iterations, began = 0.0, 0, time.process_time()
    stream = fit(job.pipeline, job.scorer, job.source, recipe, config.fit, policy=policy, parameters=parameters)
    for _ in stream:
        iterations += 1
        spent += time.process_time() - began
        if spent >= seconds * len(curve) / looks:
            used = {"seconds": spent, "samples": iterations * config.fit.groups * config.fit.size}
            used |= {"evaluations": policy.ledger.evaluations, "gradients": policy.ledger.gradients}
            curve.append(point(job, policy, base, look(job, policy), used))
            if len(curve) > looks:
                break
        began = time.process_time()
    stream.close()
    out |= {"iterations": iterations, "curve": curve, "config": to_dict(config)}
    if config.fit.seed == 0:  # bytes do not depend on the seed
        out["peak_bytes"] = peak(job, recipe, config, policy, parameters)
    return out


BASES: dict[tuple[str, str, int], Any] = {}


def first_look(job: Any, policy: Any, which: str) -> Any:
    """Return what the base makes of the exam; every run of a command sees the same, so it is judged once."""
    key = (job.config.pipeline, which, job.check.images)
    if key not in BASES:
        BASES[key] = look(job, policy)
    return BASES[key]


def look(job: Any, policy: Any) -> Any:
    """Judge the present weights, in bfloat16 for its speed; the ledger of the training does not hear of it."""
    from flowalign.evaluate import examine
    from flowalign.ledger import Ledger
    from flowalign.policy import Policy
    from flowalign.precision import run_context

    context = run_context("bf16", torch.device("cpu"), gradients=False)
    quiet = Policy(job.judged, policy.roles, Ledger(), None, context)
    return examine(job.judged, quiet, job.watch, job.check, layouts=job.layouts)


def point(job: Any, policy: Any, base: Any, after: Any, used: dict[str, float]) -> dict[str, Any]:
    """Return what one look saw, over both categories, rounded to what its noise bears."""
    from flowalign.evaluate import compare, drift

    def pooled(outcome: Any) -> Any:
        return replace(outcome, category=["all"] * len(outcome.row))

    seen: dict[str, Any] = {k: round(v, 2) for k, v in used.items()}
    for name in base.scores:
        c = compare(pooled(base), pooled(after), name)["all"]
        values = {"before": c.before, "after": c.after, "gain": c.gain, "layouts": c.layouts}
        seen[name] = {k: None if v is None else [round(x, 5) for x in v] for k, v in values.items()} | {"kept": c.kept}
    if used["samples"]:
        prompts = [job.check.prompts[int(base.row[i])] for i in base.shown[:32]]
        texts, meta = [p.text for p in prompts], [p.meta for p in prompts]
        seen["drift"] = drift(job.judged, policy, texts, meta, base.x0[: len(texts)], "current", 0)
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


# -- learning rates --------------------------------------------------------------------------------------------------
def rate(name: str) -> float:
    """Return the method's learning rate; try the candidates where they were not tried on these weights."""
    path = RESULTS / "rates.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("world") != world() or known["trial"] != TRIAL:
        known = {"world": world(), "trial": TRIAL, "rates": {}}
    tried = known["rates"].setdefault(name, {})
    for lr in (r for r in methods()[name]["rates"] if f"{r:g}" not in tried):
        config = configure(name, int(TRIAL["seed"]), int(TRIAL["images"]), lr)
        found = one(name, config, "select", TRIAL["seconds"] * (2 if name in LONGER else 1), 1)
        end = found["curve"][-1]
        tried[f"{lr:g}"] = {k: end[k]["gain"] for k in ("shapes-clip", "shapes")} | {"samples": end["samples"]}
        path.write_text(json.dumps(known, indent=1) + "\n")
        print(f"trial: {name} at {lr:g}: {tried[f'{lr:g}']}", flush=True)
    return chosen(tried)


def chosen(tried: dict[str, dict[str, Any]]) -> float:
    """Return the rate of the largest gain of the reward among those that the strict judge bears; else the least."""
    borne = {k: v for k, v in tried.items() if v["shapes"][0] > -2 * v["shapes"][1]}
    return float(max(borne, key=lambda k: borne[k]["shapes-clip"][0])) if borne else min(map(float, tried))


def done(path: Path, config: Any, seconds: float, looks: int) -> bool:
    """Return whether a result is there and of these very settings and weights; others are made again."""
    from flowalign.config import to_dict

    if not path.exists():
        return False
    found = json.loads(path.read_text())
    same = found["config"] == json.loads(json.dumps(to_dict(config), default=str)) and found["world"] == world()
    return same and found["seconds"] == seconds and len(found["curve"]) == looks + 1


def run(names: Sequence[str], seeds: Sequence[int], seconds: float, looks: int, images: int) -> None:
    """Run what is missing."""
    for seed in seeds:
        for name in names:
            path, longer = RESULTS / f"{name}-seed{seed}.json", LONGER.get(name, 1)
            config = configure(name, seed, images, rate(name))
            if not done(path, config, seconds * longer, looks * longer):
                result = one(name, config, "report", seconds * longer, looks * longer)
                path.write_text(json.dumps(result, default=str) + "\n")
                end = result["curve"][-1]
                print(f"{name} seed {seed}: {end['shapes-clip']['gain']} {end['shapes']['gain']}", flush=True)


def main() -> None:
    """Read options, run what is missing, write the table and the plot."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="*", default=list(LABELS))
    p.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    p.add_argument("--seconds", type=float, default=10.0, help="of one core's own time, per run, looks not counted")
    p.add_argument("--looks", type=int, default=2)
    p.add_argument("--images", type=int, default=96, help="per look")
    p.add_argument("--trials", nargs="*", default=[], help="try the learning rates of these and do nothing else")
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.trials:
        print({name: rate(name) for name in args.trials})
        return
    if not args.table:
        run(args.methods, args.seeds, args.seconds, args.looks, args.images)
    print("\n".join(table(args.seconds)))
    draw(args.seconds)


if __name__ == "__main__":
    main()
