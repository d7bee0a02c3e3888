"""``summary.json``: what a run came to, at what cost, with which software."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowalign.config import flatten, to_dict
from flowalign.evaluate import Outcome, compare

if TYPE_CHECKING:
    from flowalign.run import Run

__all__ = ["commit", "summarise", "versions"]

PACKAGES = ("flowalign", "torch", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch")


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def commit() -> str | None:
    """Return the commit of the source tree, with ``+`` where it was changed; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        name = _git(here, "rev-parse", "HEAD")
        return name + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def summarise(run: Run, before: Outcome, after: Outcome | None, status: str) -> dict[str, Any]:
    """Write ``summary.json`` and return it."""
    from flowalign.monitor import marks, measure_drift

    config, ledger = run.job.config, run.policy.ledger
    lines = run.folder.lines("metrics.jsonl")
    spent = run.folder.spent()
    asked, clock = int(spent.pop("evaluation_network_evaluations", 0)), spent.pop("clock", 0.0)
    summary: dict[str, Any] = {
        "status": status,
        "method": config.method.name,
        "pipeline": config.pipeline,
        "reward": config.reward,
        "judge": next(iter(before.scores)),
        "iterations": int(lines[-1]["iteration"]) if lines else 0,
        "evaluations": ledger.evaluations,
        "gradients": ledger.gradients,
        "decodes": ledger.decodes,
        "rewards": ledger.rewards,
        "seconds": {**ledger.phases, **spent},
        "trained_seconds": ledger.seconds,
        "clock_seconds": clock,
        "evaluation_network_evaluations": asked,
        "seed": config.fit.seed,
        "versions": versions(),
        "commit": commit(),
        "prompts": {str(i): p.text for i, p in enumerate(run.job.exam.prompts)},
        "config": flatten(to_dict(run.job.resolved)),
        "hacking": marks(run.folder.lines("checks.jsonl")),
    }
    if after is not None:
        summary["drift"] = measure_drift(run, run.job.exam, before, run.role)
        summary["accuracy"] = {k: v.to_dict() for k, v in compare(before, after).items()}
        rest = [s for s in before.scores if s != summary["judge"]]
        summary["held_out"] = {s: {k: v.to_dict() for k, v in compare(before, after, s).items()} for s in rest}
    text = json.dumps(summary, indent=2)
    run.folder.write("summary.json", text + "\n")
    return json.loads(text)
