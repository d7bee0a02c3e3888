"""Does a noise-aware reward prune better on `shapes`? ``python -m tests.benchmarks.compare_ttsnap [--prompts N]``

Students of the graded judge are trained on prompts of the training set. On prompts of the report set, held out: the
rank correlation within prompts between what a look at each level says and what becomes of the sample, and the reward of
the best of a prompt at equal network evaluations, over seeds, for best-of-N, TTSnap with the clean reward (the paper's
TTSp) and TTSnap with students. What training cost is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from flowalign.kernels import EulerMaruyama
from flowalign.ledger import Ledger
from flowalign.loading import load
from flowalign.methods.base import Task
from flowalign.methods.best_of_n import BestOfN
from flowalign.methods.noise_aware import Distil, Seen, Verifier
from flowalign.methods.particles import finish, roll, rows_of
from flowalign.methods.ttsnap import TTSnap, cost
from flowalign.pipelines.worlds import prompts as world_prompts
from flowalign.policy import Policy
from flowalign.potentials import Difference
from flowalign.rewards.shapes import ShapesJudge
from flowalign.scorer import Scorer
from flowalign.source import Prompt, make_draw
from flowalign.steer import steer
from flowalign.value_file import LatentValues
from flowalign.valuenet import word_ids

STEPS, LEVELS, KEEP, N, NAME = 10, (3, 6), (0.5, 0.5), 4, "shapes-graded"


def task(generator, reward, prompts: list[str], samples: int, seed: int) -> Task:
    """Return a bare task."""
    ledger = Ledger()
    scorer = Scorer(generator, {NAME: reward}, ledger=ledger)
    draw = make_draw([Prompt(p) for p in prompts], samples)
    judge = scorer.bind(generator.encode(draw.prompts, draw.meta), draw.prompts, draw.meta)
    return Task(generator, Policy(generator, ledger=ledger), judge, draw, generator.times(STEPS), seed)


def correlation(a: Tensor, b: Tensor) -> float:
    """Mean Spearman correlation over rows ``(P, N)``, ties averaged; rows without spread are left out."""

    def rank(v: Tensor) -> Tensor:
        return ((v[:, :, None] > v[:, None]).double() + 0.5 * (v[:, :, None] == v[:, None]).double()).sum(2)

    a, b = rank(a.double()), rank(b.double())
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    kept = (a.norm(dim=1) > 0) & (b.norm(dim=1) > 0)
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))[kept].mean())


def main() -> None:
    """Train, look, search."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=int, default=48)
    parser.add_argument("--each", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator, judge = load("shapes", guided=False), ShapesJudge("graded")
    training = list(world_prompts("train", "count"))
    held = list(world_prompts("report", "count"))
    g = torch.Generator().manual_seed(0)
    training = [training[i] for i in torch.randperm(len(training), generator=g)[: options.train]]
    held = [p for p in held if p.startswith(("three", "four"))]
    held = [held[i] for i in torch.randperm(len(held), generator=g)[: options.prompts]]
    with tempfile.TemporaryDirectory() as folder:
        students = {}
        for name, distil in {"residual": Distil(), "blind": Distil(residual=False)}.items():
            file = Path(folder) / f"{name}.safetensors"
            made = steer(
                generator, TTSnap(1, LEVELS, (1.0, 1.0), train=options.each, save=str(file), distil=distil), judge,
                training, steps=STEPS,
            )  # fmt: skip
            students[name] = file
            print(name, "trained for", json.dumps(made.ledger.state_dict()), flush=True)
        t = task(generator, judge, held, 1, 1)
        rows, seen = rows_of(t, per_sample=False), list[Seen]()
        with torch.no_grad():
            tree = roll(
                rows, EulerMaruyama(), rows.enter(24), value=Verifier(rows, seen=seen),
                potential=Difference(0.0, lambda k: k in LEVELS),
            )  # fmt: skip
            found = finish(rows, tree)
        truth, names = found.total.reshape(-1, 24), [held[r] for r in found.row.tolist()]
        for s in seen:
            says = {"clean": s.scores[NAME]}
            for name, file in students.items():
                aware = LatentValues.load(file)
                says[name] = aware(NAME, s.x0, s.t, word_ids(names)) + (s.scores[NAME] if aware.residual else 0.0)
            print(
                f"t = {s.t:.2f}",
                {n: round(correlation(v.reshape(-1, 24), truth), 3) for n, v in says.items()},
                flush=True,
            )
        n = int(N * STEPS / cost(STEPS, LEVELS, KEEP))
        searches = {"best-of-n": BestOfN(N, N), "ttsnap, clean": TTSnap(n, LEVELS, KEEP)}
        searches |= {f"ttsnap, {k}": TTSnap(n, LEVELS, KEEP, aware=str(f)) for k, f in students.items()}
        for name, method in searches.items():
            runs = [steer(generator, method, judge, held, steps=STEPS, seed=s) for s in range(options.seeds)]
            best = torch.stack([r.total for r in runs])
            error = float(best.mean(0).std() / len(held) ** 0.5)
            strict = sum(float(ShapesJudge()(r.media, held).mean()) for r in runs) / len(runs)
            spent = runs[0].ledger.evaluations / len(held)
            print(
                f"{name:18} graded {float(best.mean()):.4f} ± {error:.4f}  strict {strict:.3f}  {spent:.0f} evaluations"
            )


if __name__ == "__main__":
    main()
