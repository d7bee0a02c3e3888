"""Make and measure worlds: ``python -m flowalign.pipelines.worlds list | make | card | ship | clip``.

A command may join generators and judges; their packages may not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowalign.pipelines.worlds import WORLDS, find, store
from flowalign.pipelines.worlds.store import WEIGHTS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flowalign.pipelines.worlds", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the worlds")
    make = commands.add_parser("make", help="train a world; a run that was cut off goes on where it stopped")
    make.add_argument("name", choices=WORLDS)
    make.add_argument("--device", default="cpu")
    make.add_argument("--out", type=Path, help="folder of the pipeline; the shipped one by default")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--shorten", type=float, default=1.0, help="fraction of the steps to do, to try things out")
    make.add_argument("--fresh", action="store_true", help="do not resume")
    make.add_argument("--threads", type=int, default=1)
    clip = commands.add_parser("clip", help="train the small CLIP reward and measure how it agrees with the judge")
    clip.add_argument("--steps", type=int, default=1500, help="0: keep its weights, measure the agreement anew")
    clip.add_argument("--samples", type=int, default=512, help="pictures of `shapes` per category for the agreement")
    ship = commands.add_parser("ship", help="copy a measured world among the shipped ones, in half precision")
    ship.add_argument("name", choices=WORLDS)
    ship.add_argument("folder", type=Path)
    card = commands.add_parser("card", help="measure a world and write card.json, card.md and samples.png beside it")
    card.add_argument("name", choices=WORLDS)
    card.add_argument("--folder", type=Path)
    card.add_argument("--samples", type=int, default=1000, help="per category")
    card.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    card.add_argument("--steps", type=int, nargs="+", default=[10], help="the first: what it is aligned with")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    options = _parser().parse_args(arguments)
    if options.command == "list":
        for name in WORLDS:
            shipped = "shipped" if (WEIGHTS / name / "model_index.json").is_file() else "not made yet"
            sys.stdout.write(f"{name:14} {shipped:14} {find(name).summary}\n")
        return
    if options.command == "make":
        from flowalign.pipelines.worlds.train import train

        torch.set_num_threads(options.threads)
        train(
            find(options.name),
            options.out or WEIGHTS / options.name,
            seed=options.seed,
            device=options.device,
            resume=not options.fresh,
            shorten=options.shorten,
        )
        return
    if options.command == "ship":
        sys.stdout.write(f"{store.ship(options.folder, options.name)}\n")
        return
    if options.command == "clip":
        clip(options.steps, options.samples)
        return
    card(options.folder or WEIGHTS / options.name, options.guidance, options.samples, options.steps)


def card(folder: Path, guidance: Sequence[float], samples: int, steps: Sequence[int]) -> None:
    """Measure the shapes world in ``folder``."""
    from diffusers import DiffusionPipeline

    from flowalign.pipelines.worlds.cards import write_card
    from flowalign.pipelines.worlds.diversity import cells
    from flowalign.rewards.objects import find_objects
    from flowalign.rewards.shapes import verdicts

    def verdict(images: Tensor, text: Sequence[str]) -> tuple[Tensor, Tensor]:
        objects = find_objects(images)
        return verdicts(images, text)["strict"], cells(objects.centre, objects.row, len(images))

    torch.set_num_threads(1)
    pipe = DiffusionPipeline.from_pretrained(folder)
    write_card(pipe, folder, verdict, guidance=guidance, samples=samples, steps=steps)
    sys.stdout.write((folder / "card.md").read_text())


def clip(steps: int, samples: int) -> None:
    """Train the CLIP reward on drawn scenes, for 0 steps leave it; measure it on pictures of `shapes`."""
    from flowalign.rewards.shapes_clip import WEIGHTS as FOLDER

    torch.set_num_threads(1)
    if steps:
        train_clip(steps)
    file = FOLDER / "config.json"
    found = {"pictures_per_category": samples, **agreement(samples)}
    file.write_text(json.dumps({**json.loads(file.read_text()), "agreement": found}, indent=1) + "\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def train_clip(steps: int) -> None:
    """Train the CLIP reward on drawn scenes and write it."""
    from flowalign.pipelines.worlds import shapes, splits
    from flowalign.rewards.shapes_clip import WEIGHTS as FOLDER
    from flowalign.rewards.shapes_clip import fit_clip, save_clip

    def batches(g: torch.Generator) -> tuple[Tensor, list[str]]:
        images, index = shapes.draw(g, 64, shapes.HARDER)
        return images, [str(splits.base()[int(i)]) for i in index]

    start, model, loss = time.perf_counter(), torch.nn.Module(), 0.0
    for step, loss, net in fit_clip(batches, steps):
        model = net
        sys.stderr.write(f"\rclip {step}/{steps} loss {loss:.3f}")
    seconds = round(time.perf_counter() - start, 1)
    save_clip(model, FOLDER, {"steps": steps, "batch": 64, "seconds": seconds, "loss": loss})


def agreement(samples: int) -> dict[str, dict[str, float]]:
    """Return how the CLIP reward agrees with the judge on ``samples`` pictures of each category, report prompts."""
    from diffusers import DiffusionPipeline

    from flowalign.pipelines.worlds import cards, path, prompts, scenes
    from flowalign.rewards.shapes import verdicts
    from flowalign.rewards.shapes_clip import ShapesClip

    judge, pipe, found = ShapesClip(), DiffusionPipeline.from_pretrained(path("shapes")), {}
    for k in scenes.CATEGORIES:
        text = cards.repeated(prompts("report", k), samples)
        images = cards.generate(pipe, text, seed=5)
        seen, scores = verdicts(images, text), judge(images, text)
        found[k] = {
            "auc_of_strict": round(area_under_curve(scores, seen["strict"].bool()), 3),
            "correlation_with_graded": round(float(torch.corrcoef(torch.stack([scores, seen["graded"]]))[0, 1]), 3),
        }
    return found


def area_under_curve(scores: Tensor, good: Tensor) -> float:
    """Return the chance that a good sample outscores a bad one, ties half; NaN if one kind is missing."""
    gap = scores[good][:, None] - scores[~good][None, :]
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())


if __name__ == "__main__":
    main()
