"""Make and measure worlds: ``python -m flowalign.pipelines.worlds list | make NAME | card NAME``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowalign.pipelines.worlds import WORLDS, find
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
    card = commands.add_parser("card", help="measure a world and write card.json, card.md and samples.png beside it")
    card.add_argument("name", choices=WORLDS)
    card.add_argument("--folder", type=Path)
    card.add_argument("--samples", type=int, default=1000, help="per category")
    card.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    card.add_argument("--steps", type=int, default=10)
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
    card(options.folder or WEIGHTS / options.name, options.guidance, options.samples, options.steps)


def card(folder: Path, guidance: Sequence[float], samples: int, steps: int) -> None:
    """Measure the shapes world in ``folder``. A command may join generators and judges; their packages may not."""
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


if __name__ == "__main__":
    main()
