"""What steering costs beyond sampling: one batch of systems against runs one by one, FK against best-of-N.

    flock /tmp/heavy.lock python tests/benchmarks/bench_steering.py [--prompts 8] [--particles 8] [--device cpu]

FK's overhead is its time less best-of-N's with as many samples, less what its extra decodes and reward calls take when
they are timed alone, as a share of best-of-N's time. Seconds are the process's own (CPU time, one thread),
which a busy machine disturbs less than the clock; on a GPU they would have to be the clock's. Tree search is counted:
network evaluations against states that a network can be asked about.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def fastest(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the seconds of each, the fastest of a few, taken in turn so that a slow minute hits all of them."""
    took: dict[str, list[float]] = {k: [] for k in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.process_time()
            run()
            took[name].append(time.process_time() - began)
    return {k: min(v) for k, v in took.items()}


def looking(generator: Any, reward: Any, prompts: list[str], n: int) -> Callable[[], Any]:
    """Return a function that decodes and judges ``n`` states per prompt once."""
    texts = [p for p in prompts for _ in range(n)]
    cond = generator.encode(texts)
    x = torch.randn(len(texts), *generator.shape(cond), generator=torch.Generator().manual_seed(0))

    def look() -> Any:
        with torch.no_grad():
            return reward(generator.decode(x, cond), texts)

    return look


def particles(generator: Any, reward: Any, prompts: list[str], k: int, steps: int, repeats: int) -> dict[str, float]:
    """Time FK in one batch and prompt by prompt, best-of-N, and the judge alone."""
    from flowalign.methods.best_of_n import BestOfN
    from flowalign.methods.fk_steering import FKSteering
    from flowalign.steer import steer

    fk, best = FKSteering(particles=k, scale=5.0), BestOfN(n=k, per_round=k)
    spent: dict[str, Any] = {}

    def run(name: str, method: Any, which: list[str]) -> None:
        spent[name] = steer(generator, method, reward, which, steps=steps).ledger

    took = fastest(
        {
            "fk, one batch": lambda: run("fk", fk, prompts),
            "fk, prompt by prompt": lambda: [run("one", fk, [p]) for p in prompts],
            "best-of-n, one batch": lambda: run("bon", best, prompts),
            "a look": looking(generator, reward, prompts, k),
        },
        repeats,
    )
    states = k * len(prompts)
    extra = (spent["fk"].rewards - spent["bon"].rewards) / states
    assert spent["fk"].evaluations == spent["bon"].evaluations
    beyond = took["fk, one batch"] - took["best-of-n, one batch"] - extra * took["a look"]
    return took | {
        "speed-up of one batch": took["fk, prompt by prompt"] / took["fk, one batch"],
        "network evaluations of each": spent["fk"].evaluations,
        "decodes of fk and best-of-n": [spent["fk"].decodes, spent["bon"].decodes],
        "fk over best-of-n, in all": took["fk, one batch"] / took["best-of-n, one batch"] - 1,
        "fk over best-of-n, beyond extra decodes and rewards": beyond / took["best-of-n, one batch"],
    }


def tree(generator: Any, reward: Any, prompts: list[str], rounds: int, steps: int) -> dict[str, float]:
    """Count the evaluations of a tree search and the states that it visited."""
    from flowalign.methods.dts import DTS
    from flowalign.steer import steer

    method = DTS(rounds=rounds, select="uct", scale=5.0, widen=1.0, power=0.5, report=rounds)
    began = time.process_time()
    found = steer(generator, method, reward, prompts, steps=steps, keep=True)
    took = time.process_time() - began
    assert found.trajectory is not None
    inner = sum(len(found.trajectory.at(k)) for k in range(steps))
    assert found.ledger.evaluations == inner, "a node was evaluated twice, or not at all"
    return {
        "network evaluations": found.ledger.evaluations,
        "states that can be evaluated": inner,
        "of as many independent rollouts": rounds * steps * len(prompts),
        "seconds": took,
    }


def main() -> None:
    """Print JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=8)
    p.add_argument("--particles", type=int, default=8)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--rounds", type=int, default=16)
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    torch.set_num_threads(1)
    from flowalign.build import open_pipeline, open_reward, world_prompts

    device = torch.device(args.device)
    generator = open_pipeline("shapes", {}, [False], device)[0]
    reward = open_reward("shapes?aspect=graded", args.device)
    prompts = [q.text for q in world_prompts("shapes", "select")[: args.prompts]]
    out = {
        "particles": particles(generator, reward, prompts, args.particles, args.steps, args.repeats),
        "tree": tree(generator, reward, prompts, args.rounds, args.steps),
    }
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
