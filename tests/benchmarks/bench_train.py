"""Ratios of one run: seconds by phase, what trees and windows save against what they should, batches against a loop.

    python tests/benchmarks/bench_train.py [--groups 2] [--iterations 1] [--what phases savings batches rollouts]

    phases      seconds of an iteration by phase: encode, rollout, decode, reward, credit, update
    savings     a method and its counterpart with independent rollouts: ratio of seconds over ratio of evaluations,
                of the rollout and of the update; 1 is the theoretical saving. Beside it the ratio to be expected where
                a call costs something besides its evaluations, ``a calls + b evaluations``, with a and b measured in
                the same run; the optimiser's own step is counted apart
    batches     seconds of the update at the method's batch against one step at a time
    rollouts    samples per second against the plain pipeline call

On a CPU the clock is that of the process, with one thread, so that other work on the machine counts for little; things
to be compared are done in turns, and the fastest of a few is taken.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.compare_credit import EARLY  # noqa: E402

METHODS = (
    "flow-grpo", "dance-grpo", "mix-grpo", "grpo-guard", "dense-grpo", "tp-grpo", "g2rpo", "tree-grpo", "euphonium",
    "talk2move", "ddpo", "b2-diffurl", "rlcm", "diffusion-nft",
)  # fmt: skip


class Stopwatch:
    """Exclusive seconds by phase: a phase inside another one is not counted twice.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.spent, self.stack, self.last = clock, dict[str, float](), ["other"], clock()

    def turn(self) -> None:
        """Book the time since the last turn on the phase that is open."""
        now = self.clock()
        self.spent[self.stack[-1]] = self.spent.get(self.stack[-1], 0.0) + now - self.last
        self.last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book a block."""
        self.turn()
        self.stack.append(name)
        try:
            yield
        finally:
            self.turn()
            self.stack.pop()

    def around(self, owner: Any, attribute: str, name: str) -> Any:
        """Return a patch that books every call of a function."""
        inner = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return inner(*args, **kwargs)

        return patch.object(owner, attribute, timed)


class Bench:
    """One method on the demo world, ready to do single iterations.

    Args:
        method: name.
        groups: prompts per iteration.
        device: where.
        change: recipe → recipe, to take a part away.
        **settings: of the method.
    """

    def __init__(
        self, method: str, groups: int, device: str, change: Callable[[Any], Any] | None = None, **settings: Any
    ) -> None:
        from flowalign.build import build
        from flowalign.collect import Collector
        from flowalign.config import default
        from flowalign.prepare import prepare
        from flowalign.trainer import Trainer

        config = default(method)
        fit = replace(config.fit, groups=groups, iterations=10**6)
        self.config = replace(
            config, method=replace(config.method, **settings), device=device, trackers=(), fit=fit, ema=None
        )
        self.job = build(self.config)
        recipe = self.config.method.recipe(self.job.pipeline.times(fit.steps))  # type: ignore[attr-defined]
        self.recipe = recipe if change is None else change(recipe)
        self.policy, parameters = prepare(
            self.job.pipeline, None, self.recipe.roles, old=self.recipe.old, context=self.job.context,
            ledger=self.job.scorer.ledger,
        )  # fmt: skip
        self.trainer = Trainer(self.policy, parameters, self.recipe, self.job.source, fit, None)
        self.collector = Collector(self.job.pipeline, self.job.scorer, self.policy, self.recipe, fit.steps, 0)
        self.clock = time.process_time if device == "cpu" else _synchronised

    def iteration(self) -> tuple[dict[str, float], dict[str, int], dict[str, int]]:
        """Do one iteration by the training loop; return seconds, evaluations and calls by phase."""
        loop = import_module("flowalign.fit")  # the package's attribute of that name is the function
        from flowalign.collect import Collector
        from flowalign.scorer import Bound, Scorer
        from flowalign.trainer import Trainer

        watch, counts, calls = Stopwatch(self.clock), dict[str, int](), dict[str, int]()
        ledger, kind = self.policy.ledger, type(self.recipe.credit)
        inner = type(self.policy).posterior

        def counted(policy: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            counts[watch.stack[-1]] = counts.get(watch.stack[-1], 0) + len(x)
            calls[watch.stack[-1]] = calls.get(watch.stack[-1], 0) + 1
            return inner(policy, x, *args, **kwargs)

        parts = [
            (type(self.job.pipeline), "encode", "encode"), (Collector, "sample", "rollout"),
            (Bound, "media", "decode"), (Scorer, "judge", "reward"), (Trainer, "backward", "update"),
            (Trainer, "step", "step"),
        ]  # fmt: skip
        with patch.object(type(self.policy), "posterior", counted):
            patches = [watch.around(*p) for p in parts]
            patches += [watch.around(kind, "__call__", "credit")] if self.recipe.credit is not None else []
            for p in patches:
                p.start()
            try:
                loop._iterate(self.trainer, self.collector)
                watch.turn()
            finally:
                for p in patches:
                    p.stop()
        self.trainer.iteration += 1
        assert ledger is self.job.scorer.ledger
        return watch.spent, counts, calls

    def costs(self, sizes: tuple[int, int] = (1, 32), repeats: int = 4) -> dict[str, tuple[float, float]]:
        """Return seconds (of a call, of an evaluation) of the rollout and of the update: a + b n, from two n."""
        draw = self.job.source.draw(0, 1, 2)
        judge = self.collector.bind(draw)
        noise = torch.randn(1, *self.job.pipeline.shape(judge.cond))
        best: dict[tuple[str, int], float] = {}
        for _ in range(repeats):
            for n in sizes:
                x, cond = noise.repeat(n, *[1] * (noise.ndim - 1)), judge.cond[torch.zeros(n, dtype=torch.long)]
                t = torch.full((n,), 0.5, dtype=torch.float64)
                for phase in ("rollout", "update"):
                    began = self.clock()
                    with torch.set_grad_enabled(phase == "update"):
                        out = self.policy.posterior(x, t, cond).velocity
                    if phase == "update":
                        out.square().sum().backward()
                    best[phase, n] = min(best.get((phase, n), 1e9), self.clock() - began)
        for p in self.trainer.every:
            p.grad = None
        each = {p: (best[p, sizes[1]] - best[p, sizes[0]]) / (sizes[1] - sizes[0]) for p in ("rollout", "update")}
        return {p: (best[p, sizes[0]] - sizes[0] * b, b) for p, b in each.items()}


def _synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def phases(method: str, args: argparse.Namespace) -> dict[str, float]:
    """Return seconds per iteration by phase of the demo's settings; the first iteration warms up and is left out."""
    bench = Bench(method, args.groups, args.device)
    runs = [bench.iteration()[0] for _ in range(args.iterations + 1)][1:]
    names = ("encode", "rollout", "decode", "reward", "credit", "update", "step", "other")
    return {n: sum(r.get(n, 0.0) for r in runs) / len(runs) for n in names}


def independent(recipe: Any) -> Any:
    """Return a recipe whose samples share nothing and train at every step."""
    from flowalign.credit import Group

    return replace(recipe, select=None, roots=lambda n: n, shared_noise=False, credit=Group(), learners=(), thin=None)


def savings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return achieved and theoretical savings of methods that share or skip work.

    The counterparts have the same kernel and the same number of samples, each with a start and a chain of its own.
    """
    everywhere = {"width": 9, "period": 10**6}
    pairs = {
        "tree (binary splits at 0, 1, 2, 3)": (("tree-grpo", None, {}), ("tree-grpo", independent, {})),
        "tree (splits at 2, 4, 6, 8)": (
            ("tree-grpo", None, {"splits": (2, 4, 6, 8)}), ("tree-grpo", independent, {}),
        ),
        "window (MixGRPO, 3 of 9 steps)": (("mix-grpo", None, {}), ("mix-grpo", independent, everywhere)),
        "window (Flow-GRPO, 3 of 9 steps)": (
            ("flow-grpo", None, EARLY | {"kl": 0.0}), ("flow-grpo", None, EARLY | {"kl": 0.0, "window": (0, 9)}),
        ),
        "one stochastic step (G2RPO at step 3)": (
            ("g2rpo", None, {"levels": (3,), "strides": (1,)}),
            ("flow-grpo", None, EARLY | {"kl": 0.0, "window": (0, 9)}),
        ),
    }  # fmt: skip
    out: dict[str, dict[str, Any]] = {}
    for name, (ours, theirs) in pairs.items():
        if args.only not in name:
            continue
        a, b = (Bench(m, args.groups, args.device, change, **settings) for m, change, settings in (ours, theirs))
        best: dict[tuple[int, str], float] = {}
        counts: list[dict[str, int]] = [{}, {}]
        calls: list[dict[str, int]] = [{}, {}]
        cost = a.costs()
        for _ in range(args.iterations + 2):
            for i, bench in enumerate((a, b)):
                spent, counts[i], calls[i] = bench.iteration()
                for phase in ("rollout", "update", "step"):
                    best[i, phase] = min(best.get((i, phase), 1e9), spent[phase])
        row: dict[str, Any] = {
            f"{p}: milliseconds of a call, of an evaluation": [1e3 * c for c in cost[p]] for p in cost
        }
        row["step: seconds"] = [best[0, "step"], best[1, "step"]]
        for phase in ("rollout", "update"):
            theory, found = counts[1][phase] / counts[0][phase], best[1, phase] / best[0, phase]
            made = [calls[i][phase] * cost[phase][0] + counts[i][phase] * cost[phase][1] for i in (0, 1)]
            row |= {f"{phase}: evaluations": theory, f"{phase}: seconds": found, f"{phase}: achieved": found / theory}
            row[f"{phase}: calls"] = [calls[0][phase], calls[1][phase]]
            row |= {
                f"{phase}: calls counted": made[1] / made[0],
                f"{phase}: of that achieved": found * made[0] / made[1],
            }
        out[name] = row
    return out


def batches(args: argparse.Namespace, steps: int = 96) -> dict[str, float]:
    """Return seconds of one pass over the same transitions in the method's batch, and one step at a time."""
    from flowalign.collect import collect
    from flowalign.minibatch import Minibatch, minibatches

    bench = Bench("flow-grpo", args.groups, args.device, **EARLY | {"kl": 0.0})
    draw = bench.job.source.draw(0, args.groups, bench.config.fit.size)
    experience = collect(bench.collector, draw, 0)
    data = minibatches(bench.recipe, bench.collector, experience, draw, bench.config.fit, 0, 0)[0].data
    data = data[torch.arange(min(steps, len(data)))]
    seconds = {}
    for size in (len(data), 16, 1):
        found = []
        for _ in range(2):
            began = bench.clock()
            for i in range(0, len(data), size):
                part = data[torch.arange(i, min(i + size, len(data)))]
                bench.trainer.backward(Minibatch(part, experience.cond), len(part) / len(data), False)
            bench.trainer.step()
            found.append(bench.clock() - began)
        seconds[size] = min(found)
    return {f"batch {k}: seconds for {len(data)} steps": v for k, v in seconds.items()} | {
        "one by one / in one batch": seconds[1] / seconds[len(data)]
    }


def rollouts(device: str, repeats: int = 2, batch: int = 64, steps: int = 10) -> dict[str, float]:
    """Return samples per second of our ODE rollout and of the plain call, alternating, fastest of a few."""
    from diffusers import DiffusionPipeline

    from flowalign import load
    from flowalign.collect import enter
    from flowalign.kernels import EulerMaruyama
    from flowalign.noise import Noise
    from flowalign.pipelines.worlds import path
    from flowalign.policy import Policy
    from flowalign.rollout import rollout

    clock = time.process_time if device == "cpu" else _synchronised
    generator = load("shapes", device=device)
    pipe = DiffusionPipeline.from_pretrained(path("shapes")).to(device)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["three cyan circles"] * batch
    ours, plain = [], []
    for _ in range(repeats):
        began = clock()
        with torch.no_grad():
            cond = generator.encode(prompts[:1])
            times, row = generator.times(steps), torch.zeros(batch, dtype=torch.long)
            noise = Noise(0)
            start = enter(generator, cond, row, noise, float(times[0]))
            x = rollout(Policy(generator), EulerMaruyama(), times, start, cond, noise=noise, n_rows=1).leaves.x
            generator.decode(x, cond[row]).sum().item()
        ours.append(clock() - began)
        began = clock()
        pipe(prompts, num_inference_steps=steps, guidance_scale=1.0, output_type="pt").images.sum().item()
        plain.append(clock() - began)
    return {"ours": batch / min(ours), "plain": batch / min(plain), "ratio of times": min(ours) / min(plain)}


def main() -> None:
    """Print JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--iterations", type=int, default=1)
    p.add_argument("--groups", type=int, default=2)
    p.add_argument("--device", default="cpu")
    p.add_argument("--methods", nargs="*", default=list(METHODS))
    p.add_argument("--only", default="", help="savings whose name holds this")
    p.add_argument("--what", nargs="*", default=["phases", "savings", "batches", "rollouts"])
    args = p.parse_args()
    torch.set_num_threads(1)
    out: dict[str, Any] = {"groups": args.groups, "device": args.device}
    if "phases" in args.what:
        out["seconds per iteration"] = {m: phases(m, args) for m in args.methods}
    if "savings" in args.what:
        out["savings"] = savings(args)
    if "batches" in args.what:
        out["update"] = batches(args)
    if "rollouts" in args.what:
        out["rollouts per second"] = rollouts(args.device)
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
