"""Measure a shapes world and write what was found beside it: ``card.json``, ``card.md``, ``samples.png``.

Steps and guidance scale are chosen on the ``select`` prompts, everything else is measured there on other noises and
prompts: ``report`` (seen by the base, not used in alignment) and ``withheld`` (never seen). The best guidance of the
first number of steps is reported too: a world is aligned in few steps. Accuracy is the strict verdict; its standard
error √(p (1 - p) / n) is over pictures and leaves out the seed of training.

This room knows no judge: the caller hands in a function from pictures and prompts to verdicts and layouts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowalign.pipelines.worlds.diversity import effective, vendi
from flowalign.pipelines.worlds.scenes import CATEGORIES, SIZE
from flowalign.pipelines.worlds.splits import prompts

__all__ = ["Figures", "Setting", "Verdict", "choose", "features", "generate", "measure", "write_card"]

Verdict = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]  # pictures, prompts -> strict (B,), layouts (B,)


@dataclass(frozen=True)
class Setting:
    """How pictures are sampled."""

    steps: int
    guidance: float

    def __str__(self) -> str:
        return f"{self.steps} steps, guidance {self.guidance:g}"


@dataclass(frozen=True)
class Figures:
    """What one category came to: ``n`` pictures, strict accuracy ± s.e., effective layouts among correct, Vendi."""

    n: int
    accuracy: float
    error: float
    layouts: float
    vendi: float


def generate(
    pipe: Any, text: Sequence[str], *, steps: int = 10, guidance: float = 1.0, seed: int = 0, batch: int = 128
) -> Tensor:
    """Return pictures ``(B, 3, 32, 32)`` by the plain pipeline; the noise of picture i depends on seed, i alone."""
    denoiser = pipe.transformer if "transformer" in pipe.components else pipe.unet
    edge = SIZE // pipe.vae_scale_factor
    shape = (denoiser.config.in_channels, edge, edge)
    noise = torch.randn(len(text), *shape, generator=torch.Generator().manual_seed(seed))
    pipe.set_progress_bar_config(disable=True)
    out = []
    for i in range(0, len(text), batch):
        latents = noise[i : i + batch].to(pipe.device)
        images = pipe(
            prompt=list(text[i : i + batch]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
            latents=latents,
        ).images
        out.append(images.float().cpu().clamp(0, 1))
    return torch.cat(out)


def features(images: Tensor) -> Tensor:
    """Return what the Vendi score compares: pictures pooled to 8×8, less their own mean colour, ``(B, 192)``."""
    small = F.adaptive_avg_pool2d(images, 8)
    return (small - small.mean((2, 3), keepdim=True)).flatten(1)


def repeated(text: Sequence[str], n: int) -> list[str]:
    """Return ``n`` prompts that go through ``text`` evenly."""
    return [text[i * len(text) // n] for i in range(n)] if n < len(text) else [text[i % len(text)] for i in range(n)]


def measure(images: Tensor, text: Sequence[str], verdict: Verdict) -> Figures:
    """Return the figures of pictures of one category."""
    strict, codes = verdict(images, text)
    p, n = float(strict.float().mean()), len(images)
    good = codes[strict.bool()]
    return Figures(n, p, math.sqrt(p * (1 - p) / n), effective(good), vendi(features(images[:500])))


def choose(
    pipe: Any, settings: Sequence[Setting], verdict: Verdict, *, samples: int
) -> tuple[Setting, Setting, dict[str, dict[str, float]]]:
    """Return the best setting of all, the best with the first's steps, and the accuracies by setting.

    Best is the mean accuracy over categories on ``samples`` pictures each, ``select`` prompts.
    """
    table: dict[Setting, dict[str, float]] = {}
    for setting in settings:
        row = table[setting] = {}
        for k in CATEGORIES:
            text = repeated(prompts("select", k), samples)
            images = generate(pipe, text, steps=setting.steps, guidance=setting.guidance, seed=1)
            row[k] = measure(images, text, verdict).accuracy
    ranked = sorted(settings, key=lambda s: -sum(table[s].values()))
    fewest = next(s for s in ranked if s.steps == settings[0].steps)
    return ranked[0], fewest, {str(s): row for s, row in table.items()}


def write_card(
    pipe: Any, folder: Path, verdict: Verdict, *, guidance: Sequence[float] = (1.0, 1.5, 2.0, 3.0),
    samples: int = 1000, steps: Sequence[int] = (10,),
) -> dict[str, Any]:  # fmt: skip
    """Measure the pipeline and write its card into ``folder``; return what ``card.json`` holds.

    Args:
        pipe: a shapes world.
        folder: of the world.
        verdict: of pictures and prompts.
        guidance: scales tried with each number of steps.
        samples: pictures per category; a quarter of it where settings are tried and for withheld prompts.
        steps: numbers of steps tried; the first is the one that the world is aligned with.
    """
    few = max(samples // 4, 1)
    best, fewest, table = choose(pipe, [Setting(n, w) for n in steps for w in guidance], verdict, samples=few)
    reports = {str(s): _report(pipe, s, verdict, samples, few) for s in dict.fromkeys((fewest, best))}
    training = folder / "training.json"
    card = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "best": asdict(best),
        "scan_on_select": {"samples": few, **table},
        "reports": {k: figures for k, (figures, _) in reports.items()},
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in pipe.components.items() if _network(m)},
        "training": json.loads(training.read_text()) if training.exists() else None,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (folder / "card.md").write_text(_text(folder.name, card))
    _picture(reports[str(best)][1], folder / "samples.png")
    return card


def _report(pipe: Any, setting: Setting, verdict: Verdict, samples: int, few: int) -> tuple[dict[str, Any], Tensor]:
    """Return the figures of one setting on ``report`` and ``withheld`` prompts, and sixteen pictures a category."""
    found: dict[str, Any] = {**asdict(setting), "report": {}, "withheld": {}}
    shown, seconds = [], 0.0
    for i, k in enumerate(CATEGORIES):
        text = repeated(prompts("report", k), samples)
        start = time.process_time()
        images = generate(pipe, text, steps=setting.steps, guidance=setting.guidance, seed=2 + i)
        seconds += time.process_time() - start
        found["report"][k] = asdict(measure(images, text, verdict))
        shown.append(images[:: max(1, samples // 16)][:16])
        if unseen := prompts("withheld", k):
            text = repeated(unseen, few)
            images = generate(pipe, text, steps=setting.steps, guidance=setting.guidance, seed=12 + i)
            found["withheld"][k] = asdict(measure(images, text, verdict))
    found["cpu_seconds_per_sample"] = seconds / (samples * len(CATEGORIES))
    return found, torch.cat(shown)


def _network(component: Any) -> bool:
    return isinstance(component, torch.nn.Module)


def _text(name: str, card: dict[str, Any]) -> str:
    """Return the card as a page of Markdown."""
    lines = [f"# {name}", "", f"`{card['pipeline']}`, {card['scheduler']}.", ""]
    for setting, found in card["reports"].items():
        what = "the best on the select prompts" if setting == str(Setting(**card["best"])) else "the best of so few"
        lines += [
            f"{setting} ({what}), {1000 * found['cpu_seconds_per_sample']:.0f} ms of one CPU core a picture:",
            "",
            "| category | prompts | pictures | strict accuracy | layouts (effective) | Vendi (500) |",
            "|---|---|---|---|---|---|",
        ]
        for which in ("report", "withheld"):
            for k, f in found[which].items():
                accuracy = f"{f['accuracy']:.3f} ± {f['error']:.3f}"
                lines.append(f"| {k} | {which} | {f['n']} | {accuracy} | {f['layouts']:.1f} | {f['vendi']:.1f} |")
        lines.append("")
    scan = dict(card["scan_on_select"])
    lines += [f"Accuracy by steps and guidance, {scan.pop('samples')} pictures a category, select prompts:", ""]
    lines += ["| setting | " + " | ".join(CATEGORIES) + " |", "|---" * (1 + len(CATEGORIES)) + "|"]
    lines += [f"| {s} | " + " | ".join(f"{row[k]:.3f}" for k in CATEGORIES) + " |" for s, row in scan.items()]
    lines += ["", f"Training: `{json.dumps(card['training'])}`", "", "![samples](samples.png)", ""]
    return "\n".join(lines)


def _picture(images: Tensor, file: Path) -> None:
    from torchvision.utils import save_image

    save_image(F.interpolate(images, scale_factor=2), file, nrow=16)
