"""Seconds per iteration by phase, and rollouts per second against the plain pipeline call on the same model.

python tests/benchmarks/bench_train.py [--iterations 3] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def phases(method: str, iterations: int, device: str) -> dict[str, float]:
    """Return seconds per iteration by phase of the demo's settings; the first iteration warms up and is left out."""
    from flowalign.build import build
    from flowalign.config import default
    from flowalign.fit import fit
    from flowalign.prepare import prepare

    config = default(method)
    config = replace(config, device=device, trackers=(), fit=replace(config.fit, iterations=iterations + 1))
    job = build(config)
    recipe = config.method.recipe(job.pipeline.times(config.fit.steps))
    policy, parameters = prepare(job.pipeline, None, recipe.roles, old=recipe.old, ema=config.ema, context=job.context)
    marks = []
    for _ in fit(job.pipeline, job.scorer, job.source, recipe, config.fit, policy=policy, parameters=parameters):
        marks.append(dict(policy.ledger.phases))
    return {k: (marks[-1][k] - marks[0][k]) / iterations for k in marks[0]}


def rollouts(device: str, repeats: int = 3, batch: int = 128, steps: int = 10) -> dict[str, float]:
    """Return samples per second of our ODE rollout and of the plain call, alternating, fastest of a few."""
    from diffusers import DiffusionPipeline

    from flowalign import load
    from flowalign.collect import enter
    from flowalign.kernels import EulerMaruyama
    from flowalign.noise import Noise
    from flowalign.pipelines.worlds import path
    from flowalign.policy import Policy
    from flowalign.rollout import rollout

    generator = load("shapes", device=device)
    pipe = DiffusionPipeline.from_pretrained(path("shapes")).to(device)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["three cyan circles"] * batch
    ours, plain = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        with torch.no_grad():
            cond = generator.encode(prompts[:1])
            times, row = generator.times(steps), torch.zeros(batch, dtype=torch.long)
            noise = Noise(0)
            start = enter(generator, cond, row, noise, float(times[0]))
            x = rollout(Policy(generator), EulerMaruyama(), times, start, cond, noise=noise, n_rows=1).leaves.x
            generator.decode(x, cond[row]).sum().item()
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        pipe(prompts, num_inference_steps=steps, guidance_scale=1.0, output_type="pt").images.sum().item()
        plain.append(time.perf_counter() - began)
    return {"ours": batch / min(ours), "plain": batch / min(plain), "ratio of times": min(ours) / min(plain)}


def main() -> None:
    """Print JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--iterations", type=int, default=3)
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    torch.set_num_threads(1)
    out = {"rollouts per second": rollouts(args.device)}
    for method in ("flow-grpo", "diffusion-nft"):
        out[f"{method}: seconds per iteration"] = phases(method, args.iterations, args.device)
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
