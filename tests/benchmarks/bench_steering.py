"""What steering costs beyond sampling: one batch of systems against runs one by one, FK against best-of-N.

    flock /tmp/heavy.lock python tests/benchmarks/bench_steering.py [--prompts 8] [--particles 8] [--device cpu]

FK's overhead is its time less best-of-N's with as many samples, less what its extra decodes and its extra reward calls
take when each is timed alone, as a share of best-of-N's time. All are timed in turn, and the share is taken within each
turn: the median of the turns and its standard error are reported. Seconds are the process's own (CPU time, one thread),
which a busy machine disturbs less than the clock; on a GPU they would have to be the clock's. Tree search is counted:
network evaluations against states that a network can be asked about.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each repeat, taken in turn so that a slow minute hits all of them."""
    took: dict[str, list[float]] = {k: [] for k in runs}
    for turn in range(repeats + 1):  # the first warms up
        for name, run in runs.items():
            began = time.process_time()
            run()
            if turn:
                took[name].append(time.process_time() - began)
    return took


def looking(generator: Any, reward: Any, prompts: list[str], n: int) -> dict[str, Callable[[], Any]]:
    """Return functions that decode ``n`` states per prompt once, and that judge what was decoded."""
    texts = [p for p in prompts for _ in range(n)]
    cond = generator.encode(texts)
    x = torch.randn(len(texts), *generator.shape(cond), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        media = generator.decode(x, cond)

    def decode() -> Any:
        with torch.no_grad():
            return generator.decode(x, cond)

    def judge() -> Any:
        with torch.no_grad():
            return reward(media, texts)

    return {"decoding all": decode, "judging all": judge}


def beyond(took: dict[str, list[float]], fk: Any, best: Any, states: int) -> list[float]:
    """Return FK's share of best-of-N's time beyond its extra decodes and reward calls, turn by turn."""
    decodes, rewards = (getattr(fk, k) - getattr(best, k) for k in ("decodes", "rewards"))
    turns = zip(*(took[k] for k in ("fk, one batch", "best-of-n, one batch", "decoding all", "judging all")),
                strict=True)  # fmt: skip
    return [(f - b - (decodes * d + rewards * j) / states) / b for f, b, d, j in turns]


def particles(generator: Any, reward: Any, prompts: list[str], k: int, steps: int, repeats: int) -> dict[str, Any]:
    """Time FK in one batch and prompt by prompt, best-of-N, and the decoder and the judge alone."""
    from flowalign.methods.best_of_n import BestOfN
    from flowalign.methods.fk_steering import FKSteering
    from flowalign.steer import steer

    fk, best = FKSteering(particles=k, scale=5.0), BestOfN(n=k, per_round=k)
    spent: dict[str, Any] = {}

    def run(name: str, method: Any, which: list[str]) -> None:
        spent[name] = steer(generator, method, reward, which, steps=steps).ledger

    turns = in_turn(
        {
            "fk, one batch": lambda: run("fk", fk, prompts),
            "fk, prompt by prompt": lambda: [run("one", fk, [p]) for p in prompts],
            "best-of-n, one batch": lambda: run("bon", best, prompts),
            **looking(generator, reward, prompts, k),
        },
        repeats,
    )
    assert spent["fk"].evaluations == spent["bon"].evaluations
    shares = beyond(turns, spent["fk"], spent["bon"], k * len(prompts))
    took = {name: statistics.median(seconds) for name, seconds in turns.items()}
    return took | {
        "speed-up of one batch": took["fk, prompt by prompt"] / took["fk, one batch"],
        "network evaluations of each": spent["fk"].evaluations,
        "decodes of fk and best-of-n": [spent["fk"].decodes, spent["bon"].decodes],
        "rewards of fk and best-of-n": [spent["fk"].rewards, spent["bon"].rewards],
        "fk over best-of-n, in all": took["fk, one batch"] / took["best-of-n, one batch"] - 1,
        "fk over best-of-n, beyond extra decodes and rewards": statistics.median(shares),
        # of a median: 1.25 times that of the mean
        "its standard error": 1.25 * statistics.stdev(shares) / len(shares) ** 0.5,
        "turn by turn": shares,
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
