"""Measure the conditional worlds and train the inverse-dynamics model: ``python -m tests.benchmarks.worlds --help``.

Generators and judges meet here, outside both. Each card lies beside its world: card.json, card.md, samples.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

DYNAMICS = Path(__file__).parents[2] / "rewards" / "weights" / "inverse_dynamics"


def share(right: Tensor) -> dict[str, float]:
    """Share of ones, its standard error √(p (1 - p) / n), n."""
    p, n = float(right.float().mean()), len(right)
    return {"mean": round(p, 4), "error": round(math.sqrt(p * (1 - p) / n), 4), "n": n}


def average(x: Tensor) -> dict[str, float]:
    return {"mean": round(float(x.mean()), 3), "error": round(float(x.std() / len(x) ** 0.5), 3), "n": len(x)}


def moves(g: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    """Moves and paths with their actions."""
    from flowalign.pipelines.worlds import video

    table = torch.tensor([x for x in video.compositions("base") if x[0] < 16])
    batch = video.draw(g, n, names=table[torch.randint(len(table), (n,), generator=g)])
    return batch.video, batch.actions()


def dynamics(folder: Path, steps: int) -> dict:
    from flowalign.rewards.dynamics_training import accuracy, degrade, still, train_dynamics
    from flowalign.rewards.idm import InverseDynamicsConfig

    start = time.process_time()
    model = train_dynamics(moves, InverseDynamicsConfig(actions=5, size=16, width=16), steps=steps)
    seconds = time.process_time() - start
    model.save(folder)
    g = torch.Generator().manual_seed(1)
    video, actions = moves(g, 2000)
    held, kept = still(video, actions, g, 4)
    found = {
        "drawn": accuracy(model, video, actions),
        "with still pairs": accuracy(model, held, kept),
        "noise .05, gain .85 to 1.15": accuracy(model, degrade(video, g), actions),
        "pairs": actions.numel(), "cpu_seconds": round(seconds, 1), "steps": steps,
    }  # fmt: skip
    (folder / "card.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def edit(pipe, samples: int, steps: int) -> tuple[dict, Tensor]:
    from flowalign.pipelines.worlds import edit as world
    from flowalign.rewards.shapes_edit import ShapesEdit, categories

    strict, graded, out = ShapesEdit(), ShapesEdit("graded"), {}
    for split in ("report", "withheld"):
        batch = world.draw(torch.Generator().manual_seed(3 if split == "report" else 4), samples, split)
        start = time.perf_counter()
        images = world.sample(pipe, batch, steps=steps)
        out["seconds_per_sample"] = round((time.perf_counter() - start) / samples, 4)
        kind, meta = categories(batch.prompts), batch.meta()
        right, part = strict(images, batch.prompts, meta), graded(images, batch.prompts, meta)
        seen = strict.findings(batch.source, images, batch.prompts)
        out[split] = {"strict": share(right), "graded": average(part), "others kept": share(seen.others)}
        for k in ("move", "turn", "resize"):
            rows = torch.tensor([i for i, x in enumerate(kind) if x == k])
            out[split][k] = share(right[rows])
        if split == "report":
            picture = torch.stack([batch.source[:24], images[:24]], 1).flatten(0, 1)
    return out, picture


def video(pipe, samples: int, steps: int, guidance: float) -> tuple[dict, Tensor]:
    from flowalign.pipelines.worlds import video as world
    from flowalign.rewards.idm import ActionAgreement
    from flowalign.rewards.shapes_video import ShapesVideo

    judge, agree, out = ShapesVideo(), ActionAgreement(), {"guidance": guidance}
    for split in ("report", "withheld"):
        batch = world.draw(torch.Generator().manual_seed(3), samples, split)
        start = time.perf_counter()
        media = torch.cat([
            world.sample(pipe, batch.prompts[i : i + 128], steps=steps, guidance=guidance, seed=i)
            for i in range(0, samples, 128)
        ])  # fmt: skip
        out["seconds_per_sample"] = round((time.perf_counter() - start) / samples, 4)
        seen = judge.findings(media, batch.prompts)
        group = world.GROUP[batch.motion]
        out[split] = {
            "strict": share(seen.right), "mass conserved": share(seen.matter <= 1), "shape": share(seen.shape == 0),
            "smooth": share(seen.smooth <= 1), "law": share(seen.law <= 0),
            **{k: share(seen.right[group == i]) for i, k in enumerate(world.CATEGORIES)},
        }  # fmt: skip
        told = (group < 2).nonzero()[:, 0]
        meta = [{"actions": a} for a in batch.actions()[told]]
        out[split]["action agreement"] = average(agree(media[told], [batch.prompts[i] for i in told.tolist()], meta))
        if split == "report":
            picture = media[:10].flatten(0, 1)
    return out, picture


def tones(pipe, samples: int, steps: int) -> tuple[dict, Tensor | None]:
    from flowalign.pipelines.worlds import tones as world
    from flowalign.rewards.audio_signal import SISDR, LogSpectralDistance

    batch = world.draw(torch.Generator().manual_seed(3), samples)
    start = time.perf_counter()
    audio = world.sample(pipe, batch, steps=steps)
    out: dict = {"seconds_per_sample": round((time.perf_counter() - start) / samples, 4)}
    for name, judge in (("si-sdr", SISDR()), ("log-spectral", LogSpectralDistance())):
        before, after = (judge(x, batch.prompts, batch.meta()) for x in (batch.noisy, audio))
        out[name] = {"noisy": average(before), "denoised": average(after), "gain": average(after - before)}
    return out, None


def write(folder: Path, name: str, found: dict, picture: Tensor | None, row: int) -> None:
    (folder / "card.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [f"# {name}", "", "| | " + "value |", "|---|---|"]
    for key, value in found.items():
        for inner, v in value.items() if isinstance(value, dict) else [("", value)]:
            text = f"{v['mean']} ± {v['error']} (n = {v['n']})" if isinstance(v, dict) and "mean" in v else str(v)
            lines.append(f"| {key} {inner} | {text} |")
    (folder / "card.md").write_text("\n".join(lines) + "\n")
    if picture is not None:
        from torchvision.utils import make_grid, save_image

        grid = make_grid(picture.clamp(0, 1), nrow=row, padding=1, pad_value=1.0)
        save_image(grid.repeat_interleave(3, 1).repeat_interleave(3, 2), folder / "samples.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.worlds", description=__doc__)
    parser.add_argument("name", choices=["dynamics", "shapes-edit", "shapes-video", "tones"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--training-steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.name == "dynamics":
        print(json.dumps(dynamics(options.folder or DYNAMICS, options.training_steps), indent=1))
        return
    from diffusers import DiffusionPipeline

    from flowalign.pipelines.worlds.store import WEIGHTS

    folder = options.folder or WEIGHTS / options.name
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if options.name == "shapes-edit":
        found, picture = edit(pipe, options.samples, options.steps)
    elif options.name == "shapes-video":
        found, picture = video(pipe, options.samples, options.steps, options.guidance)
    else:
        found, picture = tones(pipe, options.samples, options.steps)
    found = {"sampler": f"FlowMatchEuler, {options.steps} steps", **found}
    write(folder, options.name, found, picture, 9 if options.name == "shapes-video" else 12)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
