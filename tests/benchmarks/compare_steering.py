"""Searches of `shapes` side by side at equal network evaluations and at equal seconds; a run can be broken off.

    python tests/benchmarks/compare_steering.py tune   --output runs/compare      (settings, on prompts and seeds apart)
    python tests/benchmarks/compare_steering.py run    --output runs/compare --units nfe curve --seeds 0 1 2 3 4
    python tests/benchmarks/compare_steering.py run    --output runs/compare --units seconds   --seeds 0 1 2 3 4
    python tests/benchmarks/compare_steering.py table  --output runs/compare --figure docs/figures/compare_steering.png

Prompts ask for five objects, one more than the model was trained on, and have a base success of at most .15 (of the
demo's own prompts hardly any has). The reward is the graded judge, or the open_clip score; the truth is the strict
judge. Every method gives its best result by reward, which the strict judge then judges. A gradient through the network
counts as two evaluations. Seconds are those of the processor, one thread, so that other work on the machine counts for
nothing; ``seconds`` needs the ``nfe`` runs, which tell how long each method takes. ``curve`` repeats the anytime
searches at other budgets. One JSON file per (reward, unit, method, seed) is written as it is done and found again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import steering_table as report
from tests.benchmarks.steering_contenders import CHOSEN, Contender, contenders
from tests.benchmarks.steering_setting import REWARDS, opened, student

CURVE = (0.5, 2.0)  # budgets of the curves, in those of the comparison
CURVED = ("best-of-n", "dts*", "dts*, wide", "ttsnap")  # with the graded judge


def one(
    generator: Any, entry: Contender, kind: str, prompts: list[str], budget: str | None, steps: int, seed: int
) -> dict[str, Any]:
    """Run one search of all prompts and judge each prompt's best result strictly."""
    from flowalign.build import open_reward
    from flowalign.ledger import Ledger
    from flowalign.rewards.shapes import ShapesJudge
    from flowalign.steer import steer

    found = steer(
        generator, entry.method, open_reward(REWARDS[kind]), prompts, samples=entry.samples, steps=steps,
        budget=budget if entry.anytime else None, seed=seed, ledger=Ledger(time.process_time),
    )  # fmt: skip
    mine = [(found.row == r).nonzero().flatten() for r in range(len(prompts))]
    best = [int(i[found.total[i].argmax()]) for i in mine]
    truth = {k: ShapesJudge(k)(found.media[best], prompts).tolist() for k in ("strict", "graded")}
    return {
        "reward": found.total[best].tolist(), **truth, "seconds": found.ledger.seconds, "stopped": found.stopped,
        "ledger": {k: v for k, v in found.ledger.state_dict().items() if "/" not in k}, "partial": found.partial,
    }  # fmt: skip


def sized(trial: Callable[[float], float], folder: Path, kind: str, name: str, evaluations: int) -> float:
    """Return the evaluations per prompt for which a method takes best-of-N's mean seconds at equal evaluations.

    By the secant through what it took at equal evaluations and one trial; found once for all seeds and kept. nan where
    the runs at equal evaluations are not there.
    """
    path = folder / "sizes.json"
    sizes = json.loads(path.read_text()) if path.is_file() else {}
    limit, mine = (report.mean_seconds(folder, kind, k) for k in ("best-of-n", name))
    key = f"{kind}-{name}"
    if key not in sizes and not math.isnan(limit + mine):
        first = evaluations * limit / mine
        took = trial(first)
        slope = (mine - took) / (evaluations - first) if first != evaluations else mine / evaluations
        sizes[key] = first if slope <= 0 else max(first / 2, first + (limit - took) / slope)
        path.write_text(json.dumps(sizes, indent=1) + "\n")
    return sizes.get(key, math.nan)


def refit(args: argparse.Namespace) -> None:
    """Fit sizes again by the runs' own means, and drop the runs that took a twentieth more or less than they should."""
    path = args.output / "sizes.json"
    sizes = json.loads(path.read_text())
    for key, size in sizes.items():
        kind, name = key.split("-", 1)
        limit, mine, took = (
            report.mean_seconds(args.output, kind, n, unit)
            for n, unit in (("best-of-n", "nfe"), (name, "nfe"), (name, "seconds"))
        )
        if abs(took / limit - 1) > 0.05:
            real = [report.spent(args.output, kind, name, unit) for unit in ("nfe", "seconds")]
            sizes[key] = real[0] + (limit - mine) * (real[1] - real[0]) / (took - mine)
            for old in args.output.glob(report.file_of(args.output, kind, "seconds", name, "*").name):
                old.unlink()
            print(f"{key}: {took:.2f} s for {limit:.2f} s, {size:.1f} -> {sizes[key]:.1f} evaluations", flush=True)
    path.write_text(json.dumps(sizes, indent=1) + "\n")


@dataclass(frozen=True)
class Bench:
    """What all runs share.

    Attributes:
        generator: what is steered.
        prompts: to report on.
        students: TTSnap's noise-aware rewards by reward.
        args: of the command line.
    """

    generator: Any
    prompts: list[str]
    students: dict[str, Path]
    args: argparse.Namespace

    def entry(self, kind: str, name: str, each: float) -> Contender:
        """Return a method made for so many evaluations per prompt."""
        return contenders(kind, each, self.args.steps, CHOSEN[kind], self.students[kind])[name]

    def run(self, kind: str, unit: str, name: str, seed: int) -> dict[str, Any] | None:
        """Run one method at the budget of a unit; None where the runs that tell it are missing."""
        each = self.args.evaluations * (float(unit.removeprefix("nfe") or 1) if unit != "seconds" else 1.0)
        budget = f"{round(each * len(self.prompts))}nfe"
        go = lambda each, seed: one(  # noqa: E731
            self.generator, self.entry(kind, name, each), kind, self.prompts, budget, self.args.steps, seed
        )
        if unit == "seconds":
            budget = f"{report.mean_seconds(self.args.output, kind, 'best-of-n'):.3f}s"
            if name != "best-of-n" and not self.entry(kind, name, each).anytime:
                each = sized(lambda e: go(e, 1000)["seconds"], self.args.output, kind, name, self.args.evaluations)
            if "nan" in f"{budget}{each}":
                return None
        return {"method": name, "seed": seed, "unit": unit, "budget": budget, **go(each, seed)}


def run_all(args: argparse.Namespace) -> None:
    """Run what is not there yet."""
    generator, prompts = opened(args)
    students = {kind: student(generator, kind, prompts["train"], args) for kind in args.rewards}
    bench = Bench(generator, prompts["report"], students, args)
    units = [u for unit in args.units for u in ([f"nfe{f:g}" for f in CURVE] if unit == "curve" else [unit])]
    for seed, unit, kind in product(args.seeds, units, args.rewards):
        for name in contenders(kind, args.evaluations, args.steps, CHOSEN[kind], students[kind]):
            path = report.file_of(args.output, kind, unit, name, seed)
            curved = kind == "graded" and name in CURVED
            left_out = name == "dts*, wide" if unit in report.TITLES else not curved
            left_out = left_out or (args.methods and name not in args.methods)
            row = None if path.is_file() or left_out else bench.run(kind, unit, name, seed)
            if row is not None:
                path.write_text(json.dumps(row) + "\n")
                print(f"{path.stem:40} strict {statistics.mean(row['strict']):.3f} {row['seconds']:6.1f} s", flush=True)


def tune(args: argparse.Namespace) -> None:
    """Try settings on the tuning prompts, with a seed of their own; print reward and truth."""
    generator, prompts = opened(args)
    trials: dict[str, tuple[str, dict[str, list[float]]]] = {
        "scale": ("fk", {"scale": [0.3, 1.0, 3.0], "noise": [0.4, 0.7]}),
        "explore": ("dts*", {"explore": [0.3, 1.0, 3.0]}),
        "widen": ("dts*", {"widen": [1.0, 2.0], "power": [0.5, 0.8]}),
        "soft": ("dts", {"soft": [1.0, 3.0]}),
        "das": ("das", {"das": [0.3, 1.0]}),
        "reno": ("reno", {"climb": [1, 2], "lr": [5.0, 20.0]}),
    }
    path = args.output / "tuning.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    for kind, (name, grid) in product(args.rewards, trials.values()):
        start = CHOSEN[kind]
        for values in product(*grid.values()):
            given = {
                k: v
                if k in ("noise", "climb", "lr", "widen", "power")
                else v * getattr(start, "scale" if k == "das" else k)
                for k, v in zip(grid, values, strict=True)
            }
            entries = contenders(kind, args.evaluations, args.steps, replace(start, **given), Path("none"))
            if (
                name not in (args.methods or entries)
                or name not in entries
                or any(r["kind"] == kind and r["name"] == name and r["given"] == given for r in rows)
            ):
                continue
            budget = f"{args.evaluations * len(prompts['tune'])}nfe"
            run = one(generator, entries[name], kind, prompts["tune"], budget, args.steps, 100)
            means = {k: statistics.mean(run[k]) for k in ("reward", "strict", "graded")}
            rows.append({"kind": kind, "name": name, "given": given, **means, "seconds": run["seconds"]})
            path.write_text(json.dumps(rows, indent=1) + "\n")
            print(rows[-1], flush=True)


def main() -> None:
    """Run, print the table, draw the figure."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["tune", "run", "refit", "table"])
    p.add_argument("--output", type=Path, default=Path("runs/compare-steering"))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    p.add_argument("--evaluations", type=int, default=80, help="per prompt")
    p.add_argument("--prompts", type=int, default=6)
    p.add_argument("--looked", type=int, default=24, help="prompts whose base success is measured")
    p.add_argument("--images", type=int, default=24, help="of each that a first look leaves, for that")
    p.add_argument("--train", type=int, default=16, help="images of each of 24 prompts that a student is trained on")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--most", type=float, default=0.15, help="base success of the prompts")
    p.add_argument("--units", nargs="+", default=["nfe", "seconds"], choices=["nfe", "curve", "seconds"])
    p.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=list(REWARDS))
    p.add_argument("--methods", nargs="+", default=[], help="these alone")
    p.add_argument("--figure", type=Path, default=None)
    args = p.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    work: dict[str, Callable[[argparse.Namespace], None]] = {"tune": tune, "run": run_all, "refit": refit}
    if args.what in work:
        work[args.what](args)
    else:
        print(report.tables(args.output))
        if args.figure is not None:
            report.draw(args.output, args.figure)


if __name__ == "__main__":
    main()
