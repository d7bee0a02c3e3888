"""``flowalign evaluate --models A B ...``: prompts × models × rewards, with confidence intervals and a gallery.

Every model makes the same prompts from the same noises, so that differences to the first model are paired, image by
image. Intervals are 95 %, over prompts (:mod:`flowalign.intervals`). Written: ``summary.json``, ``scores.csv`` with one
line per image and model, and ``gallery.html``, one file to look at, with nothing outside it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from flowalign.config import Scalar
from flowalign.evaluate import Exam, Outcome, examine
from flowalign.facts import WORLDS, resolve_world, world_prompts
from flowalign.folder import Folder
from flowalign.intervals import interval
from flowalign.media_files import data_uri, picture
from flowalign.opening import open_pipeline, open_rewards, pick_device
from flowalign.policy import Policy
from flowalign.precision import run_context
from flowalign.prompts import read_prompts
from flowalign.protocols import Pipeline
from flowalign.scorer import Scorer
from flowalign.source import Prompt

__all__ = ["PanelOptions", "figures", "open_model", "run", "table"]

TEMPLATE = Path(__file__).parent / "templates" / "gallery.html"
ALL = "all"


@dataclass(frozen=True)
class PanelOptions:
    """Several models judged by several rewards on the same prompts and noises.

    Attributes:
        models: each a demo world, a folder written by save_pretrained, a hub id, your module:function, or the folder of
            a training run; NAME=MODEL gives it a name. Differences are to the first.
        rewards: name[@weights], with commas.
        prompts: a file, world:set or a datasets id; the held-out set of the first model's demo world when None.
        images: per category of prompts, or in all where prompts name no category.
        steps: sampling steps.
        guidance: whether the pipelines' own guidance rule is on.
        call: arguments of every call of the pipelines.
        seed: of the noises.
        batch: images at a time.
        shown: images of a category in the gallery.
        output: folder, new or empty.
        device: where.
        precision: of the networks.
    """

    models: tuple[str, ...] = ("shapes",)
    rewards: str = "shapes"
    prompts: str | None = None
    images: int = 200
    steps: int = 10
    guidance: bool = True
    call: dict[str, Scalar] = field(default_factory=dict)
    seed: int = 20261121
    batch: int = 100
    shown: int = 16
    output: Path = Path("runs/panel")
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


def run(options: PanelOptions) -> dict[str, Any]:
    """Sample and judge every model, write the files, and return the summary.

    Raises:
        ValueError: for whatever does not exist, models that share a name, a folder that is not empty, or models of
            different media.
    """
    o = options
    models = _named(o.models)
    if o.output.is_dir() and any(o.output.iterdir()):
        raise ValueError(f"{o.output} is not empty: choose another folder with --output; nothing was overwritten.")
    exam, device = Exam(_prompts(o, models), o.images, o.steps, o.batch, o.seed, o.shown), pick_device(o.device)
    judges = open_rewards(o.rewards, device)
    outcomes: dict[str, Outcome] = {}
    for name, spec in models.items():
        generator = open_model(spec, o, device)
        outcomes[name] = _judge(name, generator, Scorer(generator, judges), exam, o, device)
    summary = {
        "models": models, "rewards": o.rewards, "prompts": len(exam.rows().unique()), "images": len(exam.rows()),
        "steps": o.steps, "seed": o.seed, "figures": figures(outcomes),
    }  # fmt: skip
    folder = Folder(o.output)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
    folder.write("scores.csv", _csv(outcomes, exam))
    folder.write("gallery.html", _gallery(outcomes, exam, summary))
    return summary


def _judge(
    name: str, generator: Pipeline, scorer: Scorer, exam: Exam, o: PanelOptions, device: torch.device
) -> Outcome:
    from flowalign.progress import Bars

    policy = Policy(generator, context=run_context(o.precision, device))
    with Bars(True).bar(len(exam.rows()), name) as tick:
        return examine(generator, policy, scorer, exam, progress=tick)


def _named(models: tuple[str, ...]) -> dict[str, str]:
    """Return name → model; a name is what stands before ``=``, or the last part of a path."""
    found: dict[str, str] = {}
    for given in models:
        head, equals, tail = given.partition("=")
        name, spec = (head, tail) if equals else (given.rstrip("/").rpartition("/")[2] or given, given)
        if not spec or not name or name in found:
            raise ValueError(
                f"two models are called {name!r}, or one has no name: write NAME=MODEL; got {list(models)}."
            )
        found[name] = spec
    if not found:
        raise ValueError("name at least one model: flowalign evaluate --models shapes runs/first ...")
    return found


def _prompts(o: PanelOptions, models: Mapping[str, str]) -> list[Prompt]:
    first = next(iter(models.values()))
    world = Folder(Path(first)).config().pipeline if Folder(Path(first)).exists else first
    if o.prompts is None and world not in WORLDS:
        raise ValueError(f"{world!r} is no demo world with prompts of its own: give --prompts.")
    return read_prompts(o.prompts or f"{world}:{WORLDS[world].report}", world_prompts)


def open_model(spec: str, o: PanelOptions, device: torch.device) -> Pipeline:
    """Return a generator by name, or the result of a run: its base with the LoRA, or the saved pipeline.

    Raises:
        ValueError: for a run without a result, or whose generator was a class of your own.
    """
    folder = Folder(Path(spec))
    if not folder.exists:
        return open_pipeline(spec, o.call, [o.guidance], device)[0]
    from flowalign.pipelines.adapter import Adapter

    config, result = resolve_world(folder.config()), folder.path / "result"
    if not result.is_dir():
        raise ValueError(f"the run in {folder.path} has no result yet: let it end, or resume it.")
    whole = (result / "model_index.json").is_file()
    name, call = str(result) if whole else config.pipeline, {**config.call, **o.call}
    generator = open_pipeline(name, call, [o.guidance], device)[0]
    if not whole:
        if not isinstance(generator, Adapter):
            raise ValueError(f"only diffusers pipelines can be loaded from a result; that of {folder.path} is not one.")
        generator.load_lora(result)
    return generator


# -- figures ---------------------------------------------------------------------------------------------------------
def figures(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Return reward → model → category → mean, its 95 % half-width, and the paired difference to the first model."""
    base = next(iter(outcomes.values()))
    kinds = list(dict.fromkeys(base.category))
    where = {ALL: torch.arange(len(base.row)), **({c: base.of(c) for c in kinds} if len(kinds) > 1 else {})}
    return {
        reward: {
            model: {
                kind: _figure(out.scores[reward][i], None if out is base else base.scores[reward][i], base.row[i])
                for kind, i in where.items()
            }
            for model, out in outcomes.items()
        }
        for reward in base.scores
    }


def _figure(scores: torch.Tensor, base: torch.Tensor | None, row: torch.Tensor) -> dict[str, Any]:
    cluster = row if len(row.unique()) > 1 else None  # one prompt: the interval is over its images
    mean, half = _known(*interval(scores, cluster))
    found: dict[str, Any] = {"images": len(scores), "mean": mean, "half": half}
    if base is not None:
        found["difference"], found["difference_half"] = _known(*interval(scores - base, cluster))
    return found


def _known(mean: float, half: float) -> tuple[float, float | None]:
    """Return None for the half-width of a single image, of which JSON knows no NaN."""
    return mean, None if math.isnan(half) else half


def table(summary: Mapping[str, Any]) -> str:
    """Return the figures as text: a block per reward, a line per model, a pair of columns per category."""
    out = [f"{summary['images']} images of {summary['prompts']} prompts per model; mean ± 95 % interval over prompts"]
    for reward, models in summary["figures"].items():
        kinds = list(next(iter(models.values())))
        out.append(f"\n{reward}\n{'':18}" + "".join(f"{k:>18}" for k in kinds))
        for model, found in models.items():
            out.append(f"{model:18}" + "".join(f"{_pm(found[k]['mean'], found[k]['half']):>18}" for k in kinds))
            if "difference" in found[kinds[0]]:
                gains = [_pm(found[k]["difference"], found[k]["difference_half"], "+") for k in kinds]
                out.append(f"{'  difference':18}" + "".join(f"{g:>18}" for g in gains))
    return "\n".join(out)


def _pm(mean: float, half: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.3f} ± {'?' if half is None else format(half, '.3f')}"


def _csv(outcomes: Mapping[str, Outcome], exam: Exam) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rewards = list(next(iter(outcomes.values())).scores)
    writer.writerow(["model", "image", "category", "prompt", *rewards])
    for model, out in outcomes.items():
        for i, (row, kind) in enumerate(zip(out.row.tolist(), out.category, strict=True)):
            scores = [f"{float(out.scores[r][i]):.6g}" for r in rewards]
            writer.writerow([model, i, kind, exam.prompts[row].text, *scores])
    return text.getvalue()


# -- gallery ---------------------------------------------------------------------------------------------------------
def _gallery(outcomes: Mapping[str, Outcome], exam: Exam, summary: Mapping[str, Any]) -> str:
    import jinja2

    first = next(iter(outcomes.values()))
    visual = first.pictures.ndim >= 4
    rows: dict[str, dict[int, dict[str, list[dict[str, Any]]]]] = {}
    for model, out in outcomes.items():
        for k, i in enumerate(out.shown) if visual else ():
            row = int(out.row[i])
            cells = rows.setdefault(out.category[i], {}).setdefault(row, {})
            scores = {r: float(s[i]) for r, s in out.scores.items()}
            cells.setdefault(model, []).append({"src": data_uri(picture(out.pictures[k])), "scores": scores})
    env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters["pm"] = _pm
    return env.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        s=summary,
        kinds=list(next(iter(next(iter(summary["figures"].values())).values()))),
        sheets=[
            (kind, [(exam.prompts[row].text, list(cells.values())) for row, cells in by_row.items()])
            for kind, by_row in rows.items()
        ],
    )
