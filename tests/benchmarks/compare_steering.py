"""Searches of `shapes` side by side at equal network evaluations and at equal seconds; a run can be broken off.

    flock /tmp/heavy.lock python tests/benchmarks/compare_steering.py --output runs/compare [--seeds 5]

Prompts ask for five objects, one more than the model was trained on, and have a base success of at most .15 (of the
demo's own prompts hardly any has). The reward is the graded judge, or the open_clip score for methods that need its
gradient; the truth is the strict judge. Every method gives its best result by reward, which the strict judge then
judges. A gradient through the network counts as two evaluations. One JSON file per (reward, unit, method, seed) is
written as it is done and found again next time; the table and the figure are made of the files. Errors are those of the
mean over seeds; differences to best-of-N are paired by seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

GRADED, CLIP = "shapes?aspect=graded", "shapes-clip"


def contenders(reward: str, share: float, evaluations: int, steps: int) -> dict[str, Callable[[], Any]]:
    """Return the methods by name; ``share`` scales those whose cost is fixed beforehand.

    Those that can stop at any time get more rounds than they can use.
    """
    from flowalign.methods import METHODS, resolve
    from flowalign.methods.best_of_n import BestOfN
    from flowalign.methods.dts import DTS
    from flowalign.methods.fk_steering import FKSteering
    from flowalign.methods.svdd import SVDD

    n = max(2, round(share * evaluations / steps))
    scale = 10.0 if reward == GRADED else 100.0  # a tenth of the graded score, or a hundredth of a cosine, is a nat
    out: dict[str, Callable[[], Any]] = {
        "best-of-n": lambda: BestOfN(n=100_000, per_round=4),
        "fk": lambda: FKSteering(particles=n, scale=scale),
    }
    if reward == GRADED:
        out |= {
            "best-of-n, SDE": lambda: FKSteering(particles=n, scale=1e-9, threshold=0.0),  # FK without its weights
            "svdd": lambda: SVDD(children=max(2, round((share * evaluations - 1) / (steps - 1) - 0.5)), scale=scale),
            "dts": lambda: tree(DTS, "boltzmann", scale),
            "dts*": lambda: tree(DTS, "uct", scale),
        }
    else:
        # N K evaluations and N (K - 1) gradients
        das = max(2, round(share * evaluations / (steps + 2 * (steps - 1))))
        out["das"] = lambda: FKSteering(
            particles=das, scheme="ssp", scale=scale, twist=1.0, temper="geometric", gamma=0.05
        )
    if reward == GRADED and "ttsnap" in METHODS:
        out["ttsnap, clean reward"] = lambda: pruned(share * evaluations, steps)
    if reward == CLIP and "reno" in METHODS:
        out["reno"] = lambda: resolve("reno").presets()["demo"].method
    return out


def pruned(evaluations: float, steps: int) -> Any:
    """Return TTSnap without a noise-aware reward of its own (TTSp), halving the candidates twice."""
    from flowalign.methods.ttsnap import TTSnap, cost

    levels, keep = (round(0.3 * steps), round(0.6 * steps)), (0.5, 0.5)
    return TTSnap(n=int(evaluations / cost(steps, levels, keep)), levels=levels, keep=keep)


def tree(kind: Any, select: str, scale: float) -> Any:
    """Return a tree search that shares prefixes: with the usual C = 2, α = .8 it never would at this budget."""
    return kind(rounds=100_000, report=1, select=select, scale=scale, widen=1.0, power=0.5, explore=0.3)


def check_model(folder: Path) -> None:
    """Note which weights the runs of a folder are of, and refuse to mix them."""
    path = ROOT / "pipelines/worlds/weights/shapes/transformer/diffusion_pytorch_model.safetensors"
    mark, note = hashlib.sha256(path.read_bytes()).hexdigest()[:16], folder / "weights.txt"
    if note.is_file() and note.read_text().strip() != mark:
        raise SystemExit(f"{folder} holds runs of other weights of shapes: choose another --output.")
    note.write_text(mark + "\n")


def hard_prompts(generator: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return prompts whose base success is at most ``--most``, measured once and kept.

    A few images sort out the easy ones; of the rest, fresh images tell the rate.
    """
    path = args.output / "prompts.json"
    if path.is_file():
        return json.loads(path.read_text())
    texts = five_objects(args.looked)
    first = success(generator, texts, 4, args.steps, 10_000)
    left = [t for t in texts if first[t] <= max(0.0, 2 * args.most - 0.3)]
    rates = success(generator, left, args.images, args.steps, 10_001)
    (args.output / "base.json").write_text(json.dumps({"first": first, "rates": rates}, indent=1) + "\n")
    low = [{"prompt": t, "base": r} for t, r in rates.items() if r <= args.most][: args.prompts]
    path.write_text(json.dumps(low, indent=1) + "\n")
    return low


def five_objects(count: int) -> list[str]:
    """Return captions of five objects, one more than any that the model was trained on: the demo's hard prompts."""
    from flowalign.rewards.objects import HUES, SHAPES

    colours, shapes = list(HUES), list(SHAPES)
    out = []
    for i in range(count):
        a, b = colours[i % 6], colours[(i * 5 + 3 + 2 * (i // 6)) % 6]
        s, u = shapes[i % 3], shapes[(i + 1 + i // 6) % 3]
        n, m = (("two", "three"), ("three", "two"))[i % 2]
        out.append(f"{n} {a} {s}s and {m} {b} {u}s")
    return list(dict.fromkeys(t for t in out if t.split()[1] != t.split()[5]))


def success(generator: Any, texts: list[str], images: int, steps: int, seed: int) -> dict[str, float]:
    """Return the share of images of each prompt that the strict judge passes."""
    from flowalign.build import open_reward
    from flowalign.methods.best_of_n import BestOfN
    from flowalign.steer import steer

    strict, out = open_reward("shapes"), {}
    for i in range(0, len(texts), 16):
        part = texts[i : i + 16]
        method = BestOfN(1, images)
        found = steer(generator, method, strict, part, samples=images, steps=steps, seed=seed)
        out |= {t: float(found.total[found.row == r].mean()) for r, t in enumerate(part)}
    return out


def one(
    generator: Any, method: Any, reward: str, prompts: list[str], budget: str | None, steps: int, seed: int
) -> dict[str, Any]:
    """Run one search of all prompts and judge each prompt's best result strictly."""
    from flowalign.build import open_reward
    from flowalign.policy import Policy
    from flowalign.rewards.shapes import ShapesJudge
    from flowalign.steer import steer

    judge, began = open_reward(reward), time.process_time()
    found = steer(
        generator, method, judge, prompts, samples=1, steps=steps, budget=budget, seed=seed,
        policy=Policy(generator),
    )  # fmt: skip
    cpu = time.process_time() - began
    best = [int((found.row == r).nonzero().flatten()[0]) for r in range(len(prompts))]  # best first within each prompt
    truth = {k: ShapesJudge(k)(found.media[best], prompts).tolist() for k in ("strict", "graded")}
    return {
        "reward": found.total[best].tolist(), **truth, "ledger": found.ledger.state_dict(), "stopped": found.stopped,
        "seconds": found.ledger.seconds, "cpu": cpu, "partial": found.partial,
    }  # fmt: skip


def run_all(args: argparse.Namespace) -> None:
    """Run what is not there yet."""
    from flowalign.build import open_pipeline

    generator = open_pipeline("shapes", {}, [False], torch.device("cpu"))[0]
    check_model(args.output)
    prompts = [p["prompt"] for p in hard_prompts(generator, args)]
    if not prompts:
        raise SystemExit("no prompt has a base success that low: raise --looked or --most, take fewer --steps")
    total = args.evaluations * len(prompts)
    for seed in range(args.seeds):
        for reward in (
            (GRADED, CLIP) if (ROOT / "rewards/weights/shapes_clip/model.safetensors").is_file() else (GRADED,)
        ):
            for unit in args.units:
                for name in contenders(reward, 1.0, args.evaluations, args.steps):
                    path = file_of(args.output, reward, unit, name, seed)
                    if path.is_file() or (args.only and name not in args.only):
                        continue
                    budget, share = f"{total}nfe", 1.0
                    if unit == "seconds":
                        limit, mine = (mean_seconds(args.output, reward, k) for k in ("best-of-n", name))
                        if math.isnan(limit) or math.isnan(mine):
                            continue
                        budget, share = f"{limit:.2f}s", limit / mine
                    method = contenders(reward, share, args.evaluations, args.steps)[name]()
                    # a method of fixed cost has its size to keep to; cutting it off would leave it with nothing
                    fixed = name in ("fk", "svdd", "das", "best-of-n, SDE", "ttsnap, clean reward")
                    row = one(generator, method, reward, prompts, None if fixed else budget, args.steps, seed)
                    path.write_text(json.dumps({"method": name, "seed": seed, "unit": unit, **row}) + "\n")
                    done = statistics.mean(row["strict"])
                    print(f"{path.stem:32} strict {done:.3f} {row['seconds']:6.1f} s", flush=True)


def file_of(folder: Path, reward: str, unit: str, name: str, seed: int | str) -> Path:
    """Return the file of a run."""
    kind = "graded" if reward == GRADED else "clip"
    return folder / f"{kind}-{unit}-{re.sub('[^a-z]+', '', name.lower().replace('*', 'star'))}-{seed}.json"


def mean_seconds(folder: Path, reward: str, name: str) -> float:
    """Return what a method took on average at equal evaluations."""
    pattern = file_of(folder, reward, "nfe", name, "[0-9]*")
    files = folder.glob(pattern.name)
    took = [json.loads(f.read_text())["seconds"] for f in files]
    return statistics.mean(took) if took else math.nan


def read(folder: Path) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
    """Return the runs by (reward, unit) and method, ordered by seed."""
    out: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(p for k in ("graded", "clip") for p in folder.glob(f"{k}-*.json")):
        kind, unit = path.stem.split("-")[:2]
        row = json.loads(path.read_text())
        out.setdefault((kind, unit), {}).setdefault(row["method"], []).append(row)
    return {k: {m: sorted(r, key=lambda x: x["seed"]) for m, r in v.items()} for k, v in out.items()}


def mean_error(values: list[float]) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.mean(values), error


def table(folder: Path) -> str:
    """Return the comparison as a Markdown table."""
    lines = ["| reward, equal | method | seeds | strict | graded | reward | gain over best-of-N | nfe | cpu s |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (kind, unit), methods in sorted(read(folder).items()):
        rival = {r["seed"]: r for r in methods.get("best-of-n", [])}
        for name, rows in methods.items():
            cells = [mean_error([statistics.mean(r[k]) for r in rows]) for k in ("strict", "graded", "reward")]
            paired = [
                statistics.mean(r["strict"]) - statistics.mean(rival[r["seed"]]["strict"])
                for r in rows
                if r["seed"] in rival
            ]
            gain = mean_error(paired) if paired and name != "best-of-n" else None
            spent = statistics.mean(r["ledger"]["evaluations"] + 2 * r["ledger"]["gradients"] for r in rows)
            took = statistics.mean(r["cpu"] for r in rows)
            shown = [f"{m:.3f} ± {e:.3f}" for m, e in cells]
            against = "" if gain is None else f"{gain[0]:+.3f} ± {gain[1]:.3f}"
            columns = [f"{kind}, {unit}", name, str(len(rows)), *shown, against, f"{spent:.0f}", f"{took:.1f}"]
            lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def draw(folder: Path, path: Path) -> None:
    """Draw strict success with errors, one panel for each reward and unit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = sorted(read(folder).items())
    fig = Figure(figsize=(3.4 * len(data), 2.9), dpi=130, layout="constrained")
    FigureCanvasAgg(fig)
    for i, ((kind, unit), methods) in enumerate(data):
        ax = fig.add_subplot(1, len(data), i + 1)
        points = {m: mean_error([statistics.mean(r["strict"]) for r in rows]) for m, rows in methods.items()}
        order = sorted(points, key=lambda m: points[m][0])
        ax.errorbar(
            [points[m][0] for m in order],
            range(len(order)),
            xerr=[points[m][1] for m in order],
            fmt="o",
            color="#3b5bdb",
        )
        if "best-of-n" in points:
            ax.axvline(points["best-of-n"][0], color="#868e96", lw=1, ls="--")
        ax.set_yticks(range(len(order)), order, fontsize=8)
        ax.set_title(f"{kind} reward, equal {'evaluations' if unit == 'nfe' else unit}", fontsize=9, loc="left")
        ax.set_xlabel("strict success of the result", fontsize=8)
        ax.tick_params(labelsize=8)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, facecolor="white")


def main() -> None:
    """Run, print the table, draw the figure."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, default=Path("runs/compare-steering"))
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--evaluations", type=int, default=160, help="per prompt")
    p.add_argument("--prompts", type=int, default=8)
    p.add_argument("--looked", type=int, default=150, help="prompts whose base success is measured")
    p.add_argument("--images", type=int, default=20, help="of each that a first look leaves, for that")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--most", type=float, default=0.15, help="base success of the prompts")
    p.add_argument("--units", nargs="*", default=["nfe", "seconds"], choices=["nfe", "seconds"])
    p.add_argument("--only", nargs="*", default=[], help="methods")
    p.add_argument("--figure", type=Path, default=None)
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.table:
        run_all(args)
    print(table(args.output))
    if args.figure is not None:
        draw(args.output, args.figure)


if __name__ == "__main__":
    main()
