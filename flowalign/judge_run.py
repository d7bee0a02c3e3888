"""``flowalign evaluate``: judge a run's result once more, from its saved files, or a base model by itself.

flowalign evaluate runs/first                  the saved result, on the exam of its run: does it reproduce?
flowalign evaluate --base --pipeline shapes    a base model by category; before.pt can be reused by further runs
flowalign evaluate --models A B --rewards ...  several models, prompts and rewards side by side (:mod:`flowalign.panel`)
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from flowalign.config import Evaluation, RunConfig, Scalar, default
from flowalign.evaluate import Outcome, compare, examine, mean_se
from flowalign.folder import Folder

__all__ = ["BaseOptions", "again", "base", "main"]

USAGE = """usage: flowalign evaluate FOLDER
       flowalign evaluate --base [--pipeline NAME] [--reward NAME] [--output FOLDER] [--evaluation.images N] ...
       flowalign evaluate --models MODEL ... --rewards SPEC [--prompts FILE] [--images N] [--output FOLDER] ...

Models are demo worlds, folders, hub ids or runs; all are judged by all rewards on the same prompts and noises, with
95 % intervals, paired differences to the first, and a gallery. flowalign evaluate --models --help lists every option.

FOLDER is that of a training run: its result is loaded from the saved files and judged on the same prompts and noises.
"""


@dataclass(frozen=True)
class BaseOptions:
    """Judging a base model.

    Attributes:
        pipeline: a demo world, a folder, a hub id, or your module:function.
        reward: what to judge by, off the demo worlds.
        prompts: what to ask for, where evaluation.prompts does not say.
        call: arguments of every call of the pipeline.
        output: folder for before.pt and summary.json.
        device: where.
        precision: of the network.
        evaluation: prompts, images, steps (a demo world's own, or 10), guidance.
    """

    pipeline: str = "shapes"
    reward: str = "shapes"
    prompts: str | None = None
    call: dict[str, Scalar] = field(default_factory=dict)
    output: Path = Path("runs/base")
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    evaluation: Evaluation = field(default_factory=Evaluation)


def main(args: list[str]) -> None:
    """Run the command."""
    from flowalign.arguments import flag, parse
    from flowalign.cli import say

    if not args or args[0] in ("-h", "--help"):
        say(USAGE)
        return
    if any(a == "--models" or a.startswith("--models=") for a in args):
        from flowalign.panel import PanelOptions, run, table

        options = parse(PanelOptions, _without_bare(args), PanelOptions(), "flowalign evaluate --models")
        say(f"{table(run(options))}\n\n{options.output}/gallery.html")
        return
    if flag(args, "--base"):
        found = base(parse(BaseOptions, args, BaseOptions(), "flowalign evaluate --base"))
    elif len(args) == 1:
        found = again(Folder(Path(args[0])))
    else:
        raise ValueError(f"evaluate takes one folder, or --base with options; got {args}.")
    say(json.dumps(found["accuracy"], indent=2))


def _without_bare(args: list[str]) -> list[str]:
    """Return the arguments without a ``--models`` that names none: only help was asked for."""
    return [a for i, a in enumerate(args) if a != "--models" or not args[i + 1 : i + 2] or args[i + 1][0] != "-"]


def base(options: BaseOptions) -> dict[str, Any]:
    """Judge a base model and keep the outcome for later runs."""
    from flowalign.build import build
    from flowalign.policy import Policy

    o = options
    if o.output.is_dir() and any(o.output.iterdir()):
        raise ValueError(f"{o.output} is not empty: choose another folder with --output; nothing was overwritten.")
    config = replace(
        default("diffusion-nft"), pipeline=o.pipeline, reward=o.reward, prompts=o.prompts, call=o.call, device=o.device,
        precision=o.precision, evaluation=o.evaluation,
    )  # fmt: skip
    job = build(config)
    began = time.perf_counter()
    outcome = examine(job.judged, Policy(job.judged, context=job.frozen), job.judge, job.exam, layouts=job.layouts)
    folder = Folder(o.output)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.remember("before.pt", lambda: outcome.state_dict() | {"mark": job.mark})
    accuracy = {
        c: {"images": len(outcome.of(c)), "mean": mean_se(outcome.judged[outcome.of(c)])} for c in job.exam.categories
    }
    found = {"accuracy": accuracy, "seconds": {"evaluate_before": time.perf_counter() - began}}
    folder.write("summary.json", json.dumps(found, indent=2) + "\n")
    return found


def again(folder: Folder) -> dict[str, Any]:
    """Judge the saved result of a run on the run's own exam.

    Raises:
        ValueError: for a folder without a finished run.
    """
    state = folder.recall("before.pt") if folder.exists else None
    if state is None or not (folder.path / "result").is_dir():
        raise ValueError(f"{folder.path} holds no run with a result and an evaluation of its base.")
    config = folder.config()
    outcome = _judge_result(config, folder.path / "result")
    return {"accuracy": {k: v.to_dict() for k, v in compare(Outcome.recall(state), outcome).items()}}


def _judge_result(config: RunConfig, result: Path) -> Outcome:
    """Load the base or the saved pipeline, put the saved LoRA on, and judge."""
    from flowalign.build import build
    from flowalign.pipelines.adapter import Adapter
    from flowalign.policy import Policy

    whole = (result / "model_index.json").is_file()
    job = build(replace(config, device=config.device) if not whole else _with_pipeline(config, result))
    if not whole:
        if not isinstance(job.judged, Adapter):
            raise ValueError(
                "only diffusers pipelines can be loaded from a result; this run's was a class of your own."
            )
        job.judged.load_lora(result)
    with torch.no_grad():
        return examine(job.judged, Policy(job.judged, context=job.frozen), job.judge, job.exam, layouts=job.layouts)


def _with_pipeline(config: RunConfig, result: Path) -> RunConfig:
    """Return the configuration with the saved pipeline in place of the base, and all else as it was for the base."""
    from flowalign.facts import resolve_world

    return replace(resolve_world(config), pipeline=str(result))
