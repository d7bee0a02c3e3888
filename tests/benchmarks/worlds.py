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
from torch.nn import functional as F

DYNAMICS = Path(__file__).parents[2] / "rewards" / "weights" / "inverse_dynamics"


def share(right: Tensor) -> dict[str, float]:
    """Share of ones, its standard error √(p (1 - p) / n), n."""
    p, n = float(right.float().mean()), len(right)
    return {"mean": round(p, 4), "error": round(math.sqrt(p * (1 - p) / n), 4), "n": n}


def average(x: Tensor) -> dict[str, float]:
    return {"mean": round(float(x.mean()), 3), "error": round(float(x.std() / len(x) ** 0.5), 3), "n": len(x)}


def moves(g: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    """Moves and paths with their actions."""
    from flowalign.pipelines.worlds import motions

    table = torch.tensor([x for x in motions.compositions("base") if x[0] < 16])
    batch = motions.draw(g, n, names=table[torch.randint(len(table), (n,), generator=g)])
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


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """(B,) dB of pictures in [0, 1]."""
    return -10 * (images.clamp(0, 1) - truth).square().mean((1, 2, 3)).log10()


def paired(batches: list, kinds: list[str], kind: str, samples: int):
    """The first ``samples`` rows of one kind out of drawn batches of edits, as one batch."""
    from flowalign.pipelines.worlds.edit import EditBatch

    rows = [torch.tensor([i for i, x in enumerate(k) if x == kind]) for k in kinds]
    cat = lambda name: torch.cat([getattr(b, name)[r] for b, r in zip(batches, rows, strict=True)])[:samples]  # noqa: E731
    words = [b.prompts[i] for b, r in zip(batches, rows, strict=True) for i in r.tolist()][:samples]
    return EditBatch(cat("source"), cat("target"), words, cat("edit"), batches[0].before, batches[0].after)


def edit(pipe, samples: int, steps: int) -> tuple[dict, Tensor]:
    """Strict and graded verdicts of each kind of edit, ``samples`` of each; a copy of the source would get 0."""
    from flowalign.pipelines.worlds import edit as world
    from flowalign.rewards.shapes_edit import CATEGORIES, ShapesEdit, categories

    strict, graded, out, seconds, rows = ShapesEdit(), ShapesEdit("graded"), {}, 0.0, 0
    for split in ("report", "withheld"):
        g = torch.Generator().manual_seed(3 if split == "report" else 4)
        batches = [world.draw(g, 500, split) for _ in range(samples * 16 // 1000 + 1)]  # a turn is one edit in six
        kinds = [categories(b.prompts) for b in batches]
        out[split], shown = {}, []
        for kind in CATEGORIES:
            batch = paired(batches, kinds, kind, samples)
            start = time.process_time()
            images = torch.cat([world.sample(pipe, part, steps=steps, seed=i) for i, part in enumerate(parts(batch))])
            seconds, rows = seconds + time.process_time() - start, rows + len(images)
            meta = batch.meta()
            seen = strict.findings(batch.source, images, batch.prompts)
            out[split][kind] = {
                "strict": share(strict(images, batch.prompts, meta)),
                "graded": average(graded(images, batch.prompts, meta)),
                "edit achieved": share(seen.achieved), "object kept": share(seen.kept),
                "others kept": share(seen.others),
            }  # fmt: skip
            shown.append(torch.stack([batch.source[:8], images[:8], batch.target[:8]], 1).flatten(0, 1))
        if split == "report":
            picture = torch.cat(shown)
    return {"seconds per sample (one core)": round(seconds / rows, 4), **out}, picture


def parts(batch, size: int = 125) -> list:
    """A batch of edits cut into smaller ones."""
    from dataclasses import replace

    return [
        replace(batch, **{k: getattr(batch, k)[i : i + size] for k in ("source", "target", "prompts", "edit")})
        for i in range(0, len(batch.prompts), size)
    ]


def superres(pipe, samples: int, steps: int) -> tuple[dict, Tensor]:
    """The strict judge and the PSNR of the model, beside bicubic and bilinear enlargement, ``samples`` per category."""
    from flowalign.pipelines.worlds import scenes
    from flowalign.pipelines.worlds import superres as world
    from flowalign.pipelines.worlds.cards import repeated
    from flowalign.pipelines.worlds.splits import prompts
    from flowalign.rewards.shapes import verdicts

    out, shown, seconds, rows = {}, [], 0.0, 0
    for split in ("report", "withheld"):
        out[split] = {}
        for k in scenes.CATEGORIES:
            if not (text := prompts(split, k)):
                continue
            n = samples if split == "report" else samples // 4
            captions = tuple(map(scenes.parse, repeated(text, n)))
            batches = [
                world.draw(torch.Generator().manual_seed(7 + i), len(captions[i : i + 125]), captions[i : i + 125])
                for i in range(0, n, 125)
            ]
            start = time.process_time()
            images = torch.cat([world.sample(pipe, b, steps=steps, seed=i) for i, b in enumerate(batches)])
            seconds, rows = seconds + time.process_time() - start, rows + n
            low, high = (torch.cat([getattr(b, name) for b in batches]) for name in ("low", "high"))
            bicubic = F.interpolate(low, scale_factor=world.FACTOR, mode="bicubic", align_corners=False).clamp(0, 1)
            words = [p for b in batches for p in b.prompts]
            ways = {"model": images, "bicubic": bicubic, "bilinear": world.enlarge(low)}
            out[split][k] = {
                **{f"strict, {name}": share(verdicts(x, words)["strict"]) for name, x in ways.items()},
                **{f"PSNR, {name}": average(psnr(x, high)) for name, x in ways.items()},
                "strict, the truth": share(verdicts(high, words)["strict"]),
            }
            if split == "report":
                shown.append(torch.stack([bicubic[:6], images[:6], high[:6]], 1).flatten(0, 1))
    return {"seconds per sample (one core)": round(seconds / rows, 4), **out}, torch.cat(shown)


def video(pipe, samples: int, steps: int, guidance: float) -> tuple[dict, Tensor]:
    """The physics judge on ``samples`` of each kind of motion, and the actions that inverse dynamics reads."""
    from flowalign.pipelines.worlds import motions
    from flowalign.pipelines.worlds import video as world
    from flowalign.rewards.idm import ActionAgreement
    from flowalign.rewards.shapes_video import ShapesVideo

    judge, agree, seconds, rows, shown = ShapesVideo(), ActionAgreement(), 0.0, 0, []
    out: dict = {"guidance": guidance}
    for split in ("report", "withheld"):
        n = samples if split == "report" else samples // 4
        every = torch.tensor(motions.compositions(split))
        out[split] = {}
        for i, k in enumerate(motions.CATEGORIES):
            table = every[motions.GROUP[every[:, 0]] == i]
            batch = motions.draw(torch.Generator().manual_seed(3 + i), n, names=table[torch.arange(n) % len(table)])
            start = time.process_time()
            media = torch.cat([
                world.sample(pipe, batch.prompts[j:k], batch.video[j:k, 0], steps=steps, guidance=guidance, seed=j)
                for j, k in ((j, j + 125) for j in range(0, n, 125))
            ])  # fmt: skip
            seconds, rows = seconds + time.process_time() - start, rows + n
            seen = judge.findings(media, batch.prompts)
            out[split][k] = {
                "strict": share(seen.right), "matter kept": share(seen.matter <= 1), "shape": share(seen.shape == 0),
                "smooth": share(seen.smooth <= 1), "law": share(seen.law <= 0),
            }  # fmt: skip
            if k in ("move", "path"):
                meta = [{"actions": a} for a in batch.actions()]
                out[split][k]["action agreement"] = average(agree(media, batch.prompts, meta))
            if split == "report":
                shown.append(media[:2].flatten(0, 1))
    return {"seconds per sample (one core)": round(seconds / rows, 4), **out}, torch.cat(shown)


def spectrogram(audio: Tensor) -> Tensor:
    """(B, 3, 65, T) pictures of audio (B, 1, L): 80 dB from black to white, low frequencies at the bottom."""
    power = torch.stft(audio[:, 0], 128, 32, window=torch.hann_window(128), return_complex=True).abs().square()
    return ((10 * power.clamp_min(1e-8).log10() + 50) / 80).clamp(0, 1).flip(1)[:, None].expand(-1, 3, -1, -1)


def tones(pipe, samples: int, steps: int) -> tuple[dict, Tensor]:
    """SI-SDR and log-spectral distance before and after; noisy, denoised and clean spectrograms."""
    from flowalign.pipelines.worlds import tones as world
    from flowalign.rewards.audio_signal import SISDR, LogSpectralDistance

    batch = world.draw(torch.Generator().manual_seed(3), samples)
    start = time.process_time()
    audio = world.sample(pipe, batch, steps=steps)
    out: dict = {"seconds per sample (one core)": round((time.process_time() - start) / samples, 4)}
    for name, judge in (("si-sdr", SISDR()), ("log-spectral", LogSpectralDistance())):
        before, after = (judge(x, batch.prompts, batch.meta()) for x in (batch.noisy, audio))
        out[name] = {"noisy": average(before), "denoised": average(after), "gain": average(after - before)}
    return out, torch.stack([spectrogram(x[:6]) for x in (batch.noisy, audio, batch.clean)], 1).flatten(0, 1)


def lines(found: dict, path: str = "") -> list[str]:
    """The rows of a card's table, however deep the figures lie."""
    out = []
    for key, value in found.items():
        name = f"{path} · {key}" if path else key
        if isinstance(value, dict) and "mean" in value:
            out.append(f"| {name} | {value['mean']} ± {value['error']} (n = {value['n']}) |")
        else:
            out += lines(value, name) if isinstance(value, dict) else [f"| {name} | {value} |"]
    return out


def write(folder: Path, name: str, found: dict, picture: Tensor | None, row: int) -> None:
    (folder / "card.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "card.md").write_text("\n".join([f"# {name}", "", "| figure | value |", "|---|---|", *lines(found), ""]))
    if picture is not None:
        from torchvision.utils import make_grid, save_image

        grid = make_grid(picture.clamp(0, 1), nrow=row, padding=1, pad_value=1.0)
        save_image(grid.repeat_interleave(3, 1).repeat_interleave(3, 2), folder / "samples.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.worlds", description=__doc__)
    parser.add_argument("name", choices=["dynamics", "shapes-edit", "shapes-sr", "shapes-video", "tones"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--samples", type=int, default=1000, help="of every category")
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
    if options.name in ("shapes-edit", "shapes-sr"):
        measure = edit if options.name == "shapes-edit" else superres
        found, picture = measure(pipe, options.samples, options.steps)
    elif options.name == "shapes-video":
        found, picture = video(pipe, options.samples, options.steps, options.guidance)
    else:
        found, picture = tones(pipe, options.samples, options.steps)
    shift = pipe.scheduler.config.shift
    found = {"sampler": f"FlowMatchEuler, {options.steps} steps, shift {shift:g}", **found}
    write(folder, options.name, found, picture, {"shapes-video": 9, "tones": 6}.get(options.name, 12))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
