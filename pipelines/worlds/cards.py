"""Measure a shapes world and write what was found beside it: ``card.json``, ``card.md``, ``samples.png``.

The guidance scale is chosen on the ``select`` prompts, everything else is measured at that scale on other noises and
prompts: ``report`` (seen by the base, not used in alignment) and ``withheld`` (never seen). Accuracy is the strict
verdict; its standard error √(p (1 - p) / n) is over pictures and leaves out the seed of training.

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

__all__ = ["Figures", "Verdict", "choose_guidance", "features", "generate", "measure", "write_card"]

Verdict = Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]  # pictures, prompts -> strict (B,), layouts (B,)


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


def choose_guidance(
    pipe: Any, scales: Sequence[float], verdict: Verdict, *, steps: int, samples: int
) -> tuple[float, dict[str, dict[str, float]]]:
    """Return the scale of the best mean accuracy on the ``select`` prompts, and the accuracies by scale."""
    table: dict[str, dict[str, float]] = {}
    for scale in scales:
        row = {}
        for k in CATEGORIES:
            text = repeated(prompts("select", k), samples)
            row[k] = measure(generate(pipe, text, steps=steps, guidance=scale, seed=1), text, verdict).accuracy
        table[f"{scale:g}"] = row
    best = max(scales, key=lambda s: sum(table[f"{s:g}"].values()))
    return best, table


def write_card(
    pipe: Any,
    folder: Path,
    verdict: Verdict,
    *,
    guidance: Sequence[float] = (1.0, 1.5, 2.0, 3.0),
    samples: int = 1000,
    steps: int = 10,
) -> dict[str, Any]:
    """Measure the pipeline and write its card into ``folder``; return what ``card.json`` holds."""
    best, table = choose_guidance(pipe, guidance, verdict, steps=steps, samples=max(samples // 4, 1))
    report, withheld, shown, seconds = {}, {}, [], 0.0
    for i, k in enumerate(CATEGORIES):
        text = repeated(prompts("report", k), samples)
        start = time.process_time()
        images = generate(pipe, text, steps=steps, guidance=best, seed=2 + i)
        seconds += time.process_time() - start
        report[k] = asdict(measure(images, text, verdict))
        shown.append(images[:: max(1, samples // 16)][:16])
        if unseen := prompts("withheld", k):
            text = repeated(unseen, max(samples // 4, 1))
            images = generate(pipe, text, steps=steps, guidance=best, seed=12 + i)
            withheld[k] = asdict(measure(images, text, verdict))
    training = folder / "training.json"
    card = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "steps": steps,
        "guidance": best,
        "guidance_scan_on_select": {"samples": max(samples // 4, 1), **table},
        "report": report,
        "withheld": withheld,
        "cpu_seconds_per_sample": seconds / (samples * len(CATEGORIES)),
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in pipe.components.items() if _network(m)},
        "training": json.loads(training.read_text()) if training.exists() else None,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (folder / "card.md").write_text(_text(folder.name, card))
    _picture(torch.cat(shown), folder / "samples.png")
    return card


def _network(component: Any) -> bool:
    return isinstance(component, torch.nn.Module)


def _text(name: str, card: dict[str, Any]) -> str:
    """Return the card as a page of Markdown."""
    lines = [
        f"# {name}",
        "",
        f"`{card['pipeline']}`, {card['scheduler']}, {card['steps']} steps, guidance {card['guidance']:g} (the best on",
        f"the select prompts), {1000 * card['cpu_seconds_per_sample']:.0f} ms of one CPU core a picture.",
        "",
        "| category | prompts | pictures | strict accuracy | layouts (effective) | Vendi (500) |",
        "|---|---|---|---|---|---|",
    ]
    for which in ("report", "withheld"):
        for k, f in card[which].items():
            accuracy = f"{f['accuracy']:.3f} ± {f['error']:.3f}"
            lines.append(f"| {k} | {which} | {f['n']} | {accuracy} | {f['layouts']:.1f} | {f['vendi']:.1f} |")
    scan = card["guidance_scan_on_select"]
    lines += ["", f"Accuracy by guidance scale, {scan['samples']} pictures a category, select prompts:", ""]
    lines += ["| guidance | " + " | ".join(CATEGORIES) + " |", "|---" * (1 + len(CATEGORIES)) + "|"]
    lines += [
        f"| {s} | " + " | ".join(f"{row[k]:.3f}" for k in CATEGORIES) + " |"
        for s, row in scan.items()
        if s != "samples"
    ]
    lines += ["", f"Training: `{json.dumps(card['training'])}`", "", "![samples](samples.png)", ""]
    return "\n".join(lines)


def _picture(images: Tensor, file: Path) -> None:
    from torchvision.utils import save_image

    save_image(F.interpolate(images, scale_factor=2), file, nrow=16)
