"""How much of a recipe's gradient is signal, before minutes are spent on training with it.

    python tests/benchmarks/gradient_signal.py measure --method diffusion-nft --set fit.updates=1 --out /tmp/signal/nft
    python tests/benchmarks/gradient_signal.py measure --out /tmp/signal/grpo --set method.noise=.4 method.window=[1,3]
    python tests/benchmarks/gradient_signal.py table /tmp/signal --against nft

``measure`` takes the gradients of independent iterations at the base's weights and makes no step. Where one iteration's
gradient is signal plus noise with |signal|² = s² E|noise|², the cosine of two of them has the mean s² / (1 + s²). That
of policy gradients is about .01, and a minute tells it from nothing, but hardly two recipes from each other. ``table``
therefore also gives the cosine of each mean gradient with that of a recipe whose signal is strong, as DiffusionNFT's
is: the noises of the two are independent. Its square grows with the iterations while it is small, so ``per 100 s``,
square over seconds, ranks recipes. It says nothing of one that is right in another direction.

What decided Flow-GRPO's demo (shapes, 22 November 2026, mixed scenes three to one, one thread; CPS noise, six steps of
shift 2, whose times are 1, .91, .8, .67, .5, .29, 0, and "steps 1-3" are the second and the third; 45 to 110 s each, by
the throwaway script that became this file):

    recipe                                          s an iteration   cosine with DiffusionNFT's   per 100 s
    diffusion-nft itself, another seed, two updates      2.3                  .78                   1.02
    noise .8, steps 0-3, std group (21 November)         4.5                  .06                   .005
    the same, std batch                                  4.5                  .08                   .011
    the same, std batch, shared starts                   3.5                  .09                   .014
    shared, batch, noise .25                             3.4                  .19                   .033
    shared, batch, noise .4, two runs                    3.5, 3.6             .39, .28              .14, .15
    shared, batch, noise .5                              3.4                  .16                   .026
    noise .4 without shared starts                       4.1                  .13                   .033
    shared, batch, noise .4, graded reward               3.5                  .40                   .15
    the flow's SDE, a = .7, all steps                    6.5                  .06                   .007
    the same, shared starts                              5.4                  .04                   .004
    shared, batch, steps 1-3, noise .3, .4, .5           2.2-2.5              .26, .25, .38         .14, .14, .13
    the flow's SDE on steps 1-3, shared, a = .7, 1       2.3, 2.4             .11, .03              .029, .002
    step 0 alone, shared, noise .8                       2.0                  .00                   .000
    step 1 alone                                         2.0                  .17                   .059
    step 2 alone, noise .4, .5, .7, .8                   1.4-1.5              .31, .33, .37, .32    .21, .24, .30, .21
    step 2 alone, noise .6, two runs                     1.3, 1.5             .44, .36              .42, .28
    step 3 alone, noise .8                               1.1                  .15                   .046
    steps 2-4, noise .4                                  2.1                  .17                   .062
    five steps, the second alone, noise .4, .6, .8       1.4-1.5              .31, .36, .34         .21, .28, .25
    four steps, the second alone, noise .4, .6, .8       1.1                  .20, .28, .23         .08, .17, .11
    ten steps, 2-5, noise .4                             3.7                  .30                   .20
    steps 1-3, noise .4, 4 groups of 32; 16 of 8         2.3                  .28; .19              .17; .08

Runs of one recipe differ by a factor of 1.5. The noise of all other steps is what drowns the rest: what the caption
asks for is decided between t = .9 and .7.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.trial_recipes import options  # noqa: E402


def cosine(gradients: Tensor) -> tuple[float, float]:
    """Return the mean cosine of two different rows of ``(n, D)``, and its standard error by leaving out a row each."""
    n = len(gradients)
    unit = gradients / gradients.norm(dim=1, keepdim=True).clamp_min(1e-30)
    products = (unit @ unit.T).double()
    products.fill_diagonal_(0)
    total = products.sum()
    left = (total - 2 * products.sum(1)) / ((n - 1) * (n - 2))
    return float(total / (n * (n - 1))), float(((left - left.mean()) ** 2).sum().mul((n - 1) / n).sqrt())


def gradients(config: Any) -> tuple[Tensor, float]:
    """Return the gradients ``(n, D)`` of a run that makes no step, and the seconds that one takes."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from flowalign.build import build
    from flowalign.fit import fit
    from flowalign.prepare import prepare

    job = build(config)
    recipe = config.method.recipe(job.pipeline.times(config.fit.steps))
    policy, parameters = prepare(
        job.pipeline, config.lora, tuple(dict.fromkeys((*recipe.roles, "reference"))), old=recipe.old, ema=config.ema,
        ledger=job.scorer.ledger, context=job.context, frozen=job.frozen,
    )  # fmt: skip
    rows: list[Tensor] = []

    def take(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Keep the gradient and leave the optimiser nothing to do."""
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        rows.append(torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights]))
        for p in weights:
            p.grad = None

    hook, began = register_optimizer_step_pre_hook(take), time.process_time()
    try:
        for _ in fit(job.pipeline, job.scorer, job.source, recipe, config.fit, policy=policy, parameters=parameters):
            if len(rows) == 1:  # the first one pays for what is made once
                began = time.process_time()
    finally:
        hook.remove()
    if len(rows) < 3:
        raise ValueError(f"{len(rows)} gradients have no standard error; give it more --seconds.")
    return torch.stack(rows).float(), (time.process_time() - began) / (len(rows) - 1)


def measure(args: argparse.Namespace) -> None:
    """Measure one recipe."""
    from flowalign.config import compose

    torch.set_num_threads(1)
    data: dict[str, Any] = {"pipeline": "shapes", "reward": "shapes", "precision": "bf16"} | options(args.set)
    fit = data.get("fit", {}) | {"iterations": 10**6, "max_seconds": args.seconds, "seed": args.seed}
    data |= {"fit": fit | {"accumulate": 0, "max_grad_norm": 1e30}, "trackers": []}
    data["method"] = {"name": args.method, **data.get("method", {})}
    found, seconds = gradients(compose(data, None, args.preset, "signal"))
    mean, error = cosine(found)
    told = {"iterations": len(found), "seconds": seconds, "cosine": mean, "error": error}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"mean": found.mean(0)}, args.out.with_suffix(".safetensors"))
    args.out.with_suffix(".json").write_text(json.dumps(told | {"method": args.method, "set": args.set}, indent=1))
    print(f"{args.out.name}: {len(found)} iterations of {seconds:.2f} s, cosine of two {mean:+.4f} ± {error:.4f}")


def table(args: argparse.Namespace) -> None:
    """Print all that was measured in a folder."""
    other = load_file(args.folder / f"{args.against}.safetensors")["mean"]
    print(f"{'recipe':32}{'n':>5}{'s each':>8}{'cosine of two':>20}{'with ' + args.against:>16}{'per 100 s':>11}")
    for path in sorted(args.folder.glob("*.json")):
        told = json.loads(path.read_text())
        mean = load_file(path.with_suffix(".safetensors"))["mean"]
        c = float(torch.cosine_similarity(mean, other, dim=0))
        spent = told["iterations"] * told["seconds"]
        two = f"{told['cosine']:+.4f} ± {told['error']:.4f}"
        rate = 100 * c * abs(c) / spent
        print(f"{path.stem:32}{told['iterations']:5}{told['seconds']:8.2f}{two:>20}{c:+16.3f}{rate:+11.4f}")


def main() -> None:
    """Read options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True)
    m = commands.add_parser("measure", help="one recipe")
    m.add_argument("--method", default="flow-grpo")
    m.add_argument("--preset", default="demo")
    m.add_argument("--set", nargs="*", default=[], help="key=value of the configuration")
    m.add_argument("--seconds", type=float, default=60.0)
    m.add_argument("--seed", type=int, default=0)
    m.add_argument("--out", type=Path, required=True, help="file, without a suffix")
    m.set_defaults(run=measure)
    t = commands.add_parser("table", help="all in a folder")
    t.add_argument("folder", type=Path)
    t.add_argument("--against", required=True, help="recipe whose mean gradient is the measure")
    t.set_defaults(run=table)
    args = p.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
