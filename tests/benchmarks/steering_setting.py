"""What ``compare_steering`` runs on: the shipped `shapes`, prompts that it finds hard, TTSnap's students.

All of it is made once, kept in the folder of the runs, and found again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.steering_contenders import LEVELS

ROOT = Path(__file__).resolve().parents[2]
REWARDS = {"graded": "shapes?aspect=graded", "clip": "shapes-clip"}


def check_model(folder: Path) -> None:
    """Note which weights the runs of a folder are of, and refuse to mix them."""
    path = ROOT / "pipelines/worlds/weights/shapes/transformer/diffusion_pytorch_model.safetensors"
    mark, note = hashlib.sha256(path.read_bytes()).hexdigest()[:16], folder / "weights.txt"
    if note.is_file() and note.read_text().strip() != mark:
        raise SystemExit(f"{folder} holds runs of other weights of shapes: choose another --output.")
    note.write_text(mark + "\n")


def five_objects() -> list[str]:
    """Return the captions of five objects of two kinds, in a fixed random order."""
    from flowalign.rewards.objects import HUES, SHAPES

    numbers = (("two", "three"), ("three", "two"))
    every = [
        f"{n} {a} {s}s and {m} {b} {u}s"
        for a, b, s, u, (n, m) in product(HUES, HUES, SHAPES, SHAPES, numbers)
        if a != b and s != u
    ]
    random.Random(0).shuffle(every)
    return every


def hard_prompts(generator: Any, args: argparse.Namespace) -> dict[str, list[str]]:
    """Return prompts of low base success to report on, others to tune on, and some to train students on; kept.

    A few images sort out the easy ones; of the rest, fresh images tell the rate.
    """
    path = args.output / "prompts.json"
    if path.is_file():
        return json.loads(path.read_text())
    every, found, rates = five_objects(), {}, {}
    for i, name in enumerate(("report", "tune")):
        texts = every[i * args.looked : (i + 1) * args.looked]
        first = success(generator, texts, 4, args.steps, 10_000)
        left = [t for t in texts if first[t] <= 0.25]
        rates[name] = success(generator, left, args.images, args.steps, 10_001)
        found[name] = [t for t, r in rates[name].items() if r <= args.most][: args.prompts]
    found["train"] = every[2 * args.looked : 2 * args.looked + 24]
    (args.output / "base.json").write_text(json.dumps(rates, indent=1) + "\n")
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def success(generator: Any, texts: list[str], images: int, steps: int, seed: int) -> dict[str, float]:
    """Return the share of images of each prompt that the strict judge passes."""
    from flowalign.build import open_reward
    from flowalign.methods.best_of_n import BestOfN
    from flowalign.steer import steer

    strict, out = open_reward("shapes"), {}
    for i in range(0, len(texts), 16):
        part = texts[i : i + 16]
        found = steer(generator, BestOfN(1, images), strict, part, samples=images, steps=steps, seed=seed)
        out |= {t: float(found.total[found.row == r].mean()) for r, t in enumerate(part)}
    return out


def student(generator: Any, kind: str, prompts: list[str], args: argparse.Namespace) -> Path:
    """Return the file of TTSnap's noise-aware reward, trained on prompts of its own; its cost lies beside it."""
    from flowalign.build import open_reward
    from flowalign.ledger import Ledger
    from flowalign.methods.ttsnap import TTSnap
    from flowalign.steer import steer

    path = args.output / f"student-{kind}.safetensors"
    if not path.is_file():
        ledger = Ledger(time.process_time)
        method = TTSnap(1, LEVELS, (1.0, 1.0), train=args.train, save=str(path))
        steer(generator, method, open_reward(REWARDS[kind]), prompts, steps=args.steps, ledger=ledger)
        path.with_suffix(".json").write_text(json.dumps(ledger.state_dict()) + "\n")
    return path


def opened(args: argparse.Namespace) -> tuple[Any, dict[str, list[str]]]:
    """Return the generator and the prompts."""
    from flowalign.build import open_pipeline

    generator = open_pipeline("shapes", {}, [False], torch.device("cpu"))[0]
    check_model(args.output)
    prompts = hard_prompts(generator, args)
    if not prompts["report"]:
        raise SystemExit("no prompt has a base success that low: raise --looked or --most, take fewer --steps")
    return generator, prompts
