"""Uncertainty-guided noise on `shapes-sr` against even noise of the same mean level.

    flock /tmp/heavy.lock python -m tests.benchmarks.compare_upsr [--folder WEIGHTS] [--pictures 200]

Low-resolution pictures of drawn scenes are made sharp by the trained pipeline, each by every variant from the same
noises. PSNR against the picture that was made small, and the strict judge of the caption; gains of the map over even
noise are paired picture by picture, with their standard error. Below them stand full noise at the same start, plain
sampling from pure noise, and the first guess alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from flowalign.loading import load
from flowalign.methods.upsr import UPSR
from flowalign.pipelines.worlds import store, superres
from flowalign.rewards.shapes import ShapesJudge
from flowalign.source import Prompt
from flowalign.steer import steer


def variants(psi: float, floor: float) -> dict[str, UPSR]:
    """Return the map and its rivals, at three starts of the ODE, and in the noise of every step."""
    out = {}
    for name, where in {f"ODE from {t:g}": {"start": t} for t in (0.4, 0.6, 0.8)}.items():
        out[f"{name}, map"] = UPSR(psi, floor, **where)
        out[f"{name}, even"] = UPSR(psi, floor, even=True, **where)
        out[f"{name}, full"] = UPSR(psi, 1.0, **where)
    for noise in (0.4, 0.7):
        out[f"SDE a = {noise}, map"] = UPSR(psi, floor, 1.0, noise)
        out[f"SDE a = {noise}, even"] = UPSR(psi, floor, 1.0, noise, even=True)
        out[f"SDE a = {noise}, full"] = UPSR(psi, 1.0, 1.0, noise)
    return out


def scores(media: Tensor, pairs: superres.PairBatch) -> dict[str, Tensor]:
    """Return PSNR in dB and the strict verdict of each picture."""
    error = ((media.clamp(0, 1) - pairs.high) ** 2).flatten(1).mean(1).clamp_min(1e-10)
    return {"psnr": -10 * error.log10(), "strict": ShapesJudge()(media, pairs.prompts).float()}


def told(v: Tensor) -> str:
    """Return mean ± standard error."""
    return f"{float(v.mean()):+.3f} ± {float(v.std() / len(v) ** 0.5):.3f}"


def main() -> None:
    """Print a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default=store.WEIGHTS / "shapes-sr")
    p.add_argument("--pictures", type=int, default=200)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--psi", type=float, default=0.5, help="in units of the latents")
    p.add_argument("--floor", type=float, default=0.4)
    p.add_argument("--json", type=Path, default=None)
    args = p.parse_args()
    torch.set_num_threads(1)
    call = {"height": 32, "width": 32, "max_sequence_length": superres.TOKENS}
    generator = load(str(args.folder), call)
    pairs = superres.draw(torch.Generator().manual_seed(7), args.pictures)
    prompts = [Prompt(t, m) for t, m in zip(pairs.prompts, pairs.meta(), strict=True)]
    found: dict[str, dict[str, Tensor]] = {}
    for name, method in variants(args.psi, args.floor).items():
        made = steer(generator, method, ShapesJudge("graded"), prompts, steps=args.steps, seed=0, chunk=100)
        found[name] = scores(made.media, pairs)
        line = f"| {name} | {told(found[name]['psnr'])} | {told(found[name]['strict'])} |"
        if name.endswith("even"):
            rival = found[name.replace("even", "map")]
            line += " map - even: " + ", ".join(f"{k} {told(rival[k] - found[name][k])}" for k in rival)
        print(line, flush=True)
    whole = {"enlarged": superres.enlarge(pairs.low), "plain sampling": superres.sample(
        generator.pipe, pairs, steps=args.steps
    )}  # fmt: skip
    for name, media in whole.items():
        found[name] = scores(media, pairs)
        print(f"| {name} | {told(found[name]['psnr'])} | {told(found[name]['strict'])} |", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({n: {k: v.tolist() for k, v in s.items()} for n, s in found.items()}) + "\n")


if __name__ == "__main__":
    main()
