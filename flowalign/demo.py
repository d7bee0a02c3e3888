"""``flowalign demo``: two methods side by side on the little world, and one that is hacked, in eight minutes.

    1   the base model is judged once, while the other core shows what goes wrong: reward gradients of the small CLIP
        model, without a penalty, raise its score and cost the strict judge's verdict and the layouts
    2   Flow-GRPO and DiffusionNFT train at the same time, one core each, until the time that is left is used up
    3   both are judged on the same prompts and noises as the base; a table, and one report of all three

Every run is an ordinary ``flowalign train`` in a process of its own, with a folder that can be looked at, resumed or
compared; nothing here is special but the clock.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowalign.facts import WORLDS
from flowalign.folder import Folder
from flowalign.precision import quicker

__all__ = ["DemoOptions", "run", "verdict"]

MINUTES = {"quick": 0.5, "short": 8.0, "full": 12.0}
GAIN, OTHER_GAIN, FULL_GAIN, KEPT, HARM = 0.10, 0.04, 0.25, 0.80, -0.03


@dataclass(frozen=True)
class DemoOptions:
    """The demo.

    Attributes:
        full: twelve minutes instead of eight, for gains of 25 points.
        quick: half a minute, to see that everything runs; the figures mean nothing.
        seed: of the training.
        output: folder of all runs.
        control: a further run whose rewards are permuted inside their groups and teach nothing; takes longer.
        minutes: total time, in place of 8 or 12.
        images: held-out images per category.
        precision: of the networks, fp32 or bf16; when empty, whichever this machine multiplies faster in.
        options: further options for every run, in one string: --options="--pipeline my:pipeline --reward my:Reward".
    """

    full: bool = False
    quick: bool = False
    seed: int = 0
    output: Path = Path("runs/demo")
    control: bool = False
    minutes: float | None = None
    images: int = 1000
    options: str = ""
    precision: str = ""

    @property
    def total(self) -> float:
        """Seconds in all."""
        kind = "quick" if self.quick else "full" if self.full else "short"
        return 60.0 * (self.minutes or MINUTES[kind])


@dataclass
class Child:
    """A training run in a process of its own."""

    name: str
    folder: Folder
    process: subprocess.Popen[bytes]
    seconds: float
    first: float | None = None

    @classmethod
    def start(cls, name: str, method: str, options: DemoOptions, seconds: float, *more: str) -> Child:
        """Start ``flowalign train`` with one thread."""
        folder = Folder(options.output / name)
        command = [sys.executable, "-m", "flowalign", "train", method, "--output", str(folder.path), "--quiet"]
        command += ["--max-wall", f"{seconds:.0f}", "--seed", str(options.seed), "--iterations", "1000000"]
        command += ["--precision", options.precision]
        command += [*more, *shlex.split(options.options)]
        log = (options.output / f"{name}.log").open("wb")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return cls(name, folder, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env), seconds)

    def state(self) -> tuple[float, str]:
        """Return the seconds of training by the clock so far, and a word on it."""
        lines = self.folder.lines("metrics.jsonl")
        if not lines:
            return 0.0, "starting"
        self.first = self.first or time.perf_counter()
        spent = time.perf_counter() - self.first
        word = f"iteration {len(lines)}, reward {lines[-1].get('reward', float('nan')):.3f}"
        return min(spent, self.seconds), word if spent < self.seconds + 10 else "judging"

    def check(self) -> None:
        """Raise if the process has failed.

        Raises:
            RuntimeError: with the end of its log.
        """
        if self.process.poll() not in (None, 0):
            log = self.folder.path.parent / f"{self.name}.log"
            tail = log.read_text(errors="replace")[-1500:]
            raise RuntimeError(f"the run {self.name} failed with code {self.process.returncode}; {log} ends:\n{tail}")


def run(options: DemoOptions, progress: bool = True) -> dict[str, Any]:
    """Do the demo and return its verdict.

    Raises:
        ValueError: if the folder holds a demo already.
        RuntimeError: if one of the runs fails.
    """
    from flowalign.cli import say

    began = time.perf_counter()
    if options.output.is_dir() and any(options.output.iterdir()):
        raise ValueError(
            f"{options.output} is not empty: choose another folder with --output or delete it; nothing was overwritten."
        )
    options = replace(options, precision=options.precision or quicker())
    options.output.mkdir(parents=True, exist_ok=True)
    judged, more = _base(options, progress)
    # the runs start, judge their small exam, are judged, and write reports outside the time they train in
    left = options.total - (time.perf_counter() - began) - 1.2 * judged - 30
    seconds = max(left, 5.0)
    # a longer run of the noisier gradient goes as far in smaller steps, and its random walk is shorter
    calm = ["--fit.lr", "2e-4"] if options.full and not options.options else []
    runs = [
        Child.start("flow-grpo", "flow-grpo", options, seconds, *more, *calm),
        Child.start("diffusion-nft", "diffusion-nft", options, seconds, *more),
    ]
    wait(runs, progress)
    labels = ["Flow-GRPO", "DiffusionNFT", _hack(options)[0]]
    folders = [*(r.folder for r in runs), Folder(options.output / "hacked")]
    if options.control:
        control = Child.start("control", "diffusion-nft", options, seconds, *more, "--permute")
        wait([control], progress)
        folders.append(control.folder)
        labels.append("control: permuted rewards")
    summaries = {n: f.summary() for n, f in zip(labels, folders, strict=True)}
    found = verdict(summaries, _focus(folders[0], next(iter(summaries.values()))["accuracy"]), options.full)
    found["seconds"] = time.perf_counter() - began
    (options.output / "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    path = _report(options, folders, labels, found)
    say(_table(labels, found) + f"\n\n{path}")
    return found


def _hack(options: DemoOptions) -> list[str]:
    """Return label, method and options of the run that shows what goes wrong.

    A strict verdict is hard to hack and the small CLIP score is easy. Somebody's own reward may have no gradient: there
    it is DiffusionNFT without its penalty.
    """
    if options.options:
        return ["DiffusionNFT, no penalty", "diffusion-nft", "--preset", "hacked"]
    return ["DRaFT on shapes-clip, no penalty", "draft", "--preset", "hacked", "--reward", "shapes-clip",
            "--prompts", "shapes:focus7"]  # fmt: skip


def _base(options: DemoOptions, progress: bool) -> tuple[float, list[str]]:
    """Judge the base once, beside the run that shows hacking; return the seconds it took and options that reuse it."""
    share = options.total / 7
    steps = ["--evaluation.steps", "10"]  # of all alike, whatever each method trains with
    every = [
        "--evaluation.every",
        "8" if not options.full else "25",
        "--evaluation.images",
        str(options.images),
        *steps,
    ]
    few = ["--evaluation.every", "8", "--evaluation.images", str(max(2, options.images // 5)), *steps]
    _, method, *how = _hack(options)
    hacked = Child.start("hacked", method, options, share, *how, *few)
    base = Folder(options.output / "base")
    command = [sys.executable, "-m", "flowalign", "evaluate", "--base", "--output", str(base.path), *every[2:]]
    command += ["--precision", options.precision]
    log = (options.output / "base.log").open("wb")
    command += shlex.split(options.options)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    judge = Child("base", base, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env), 0.0)
    wait([hacked, judge], progress)
    seconds = float(base.summary()["seconds"]["evaluate_before"])
    return seconds, [*every, "--evaluation.base", str(base.path / "before.pt")]


def wait(children: Sequence[Child], progress: bool) -> None:
    """Show bars until all are done; one that fails ends the others.

    Raises:
        RuntimeError: see :meth:`Child.check`.
    """
    from tqdm.auto import tqdm

    bars = {
        c.name: tqdm(total=round(c.seconds) or None, desc=f"{c.name:16}", disable=not progress, position=i, leave=True,
                     bar_format="{desc} {bar:30} {n:.0f}/{total_fmt} s  {postfix}")
        for i, c in enumerate(children)
    }  # fmt: skip
    try:
        while any(c.process.poll() is None for c in children):
            for c in children:
                c.check()
                _move(bars[c.name], c)
            time.sleep(0.5)
        for c in children:
            c.check()
    except BaseException:
        for c in children:
            if c.process.poll() is None:
                c.process.terminate()
        raise
    finally:
        for bar in bars.values():
            bar.close()


def _move(bar: Any, child: Child) -> None:
    if child.process.poll() is not None:
        bar.set_postfix_str("done", refresh=False)
    elif child.seconds:
        bar.n, word = child.state()
        bar.set_postfix_str(word, refresh=False)
    else:
        bar.set_postfix_str("judging", refresh=False)
    bar.refresh()


# -- what came of it -------------------------------------------------------------------------------------------------
def verdict(summaries: dict[str, dict[str, Any]], focus: str, full: bool = False) -> dict[str, Any]:
    """Hold the figures of the two methods against what the demo promises.

    Args:
        summaries: by name; the two methods first.
        focus: the rewarded category, which was fixed before any figure was seen.
        full: whether the promises of the full demo hold.

    Returns:
        Per run the gain, its standard error and the layouts kept; ``promises``: what is asked → whether it holds.
    """
    figures = {name: _figures(s, focus) for name, s in summaries.items()}
    two = sorted(list(figures.values())[:2], key=lambda f: -f["gain"][0])
    need = FULL_GAIN if full else GAIN
    promises = {
        f"the better gains {100 * need:.0f} points and five standard errors": two[0]["gain"][0] >= need
        and two[0]["gain"][0] > 5 * two[0]["gain"][1],
        f"the other gains {100 * OTHER_GAIN:.0f} points": two[1]["gain"][0] >= OTHER_GAIN,
        f"both keep {KEPT:.0%} of the layouts": all((f["layouts_kept"] or 0) >= KEPT for f in two),
        f"no other category falls by more than {-100 * HARM:.0f} points": all(f["worst_other"] >= HARM for f in two),
    }
    return {"focus": focus, "runs": figures, "promises": promises}


def _focus(folder: Folder, categories: Iterable[str]) -> str:
    """Return the category that the training prompts dwell on: the demo world's focus, or the first one elsewhere."""
    facts = WORLDS.get(folder.config().pipeline)
    return next(iter(categories)) if facts is None else facts.focus


def _figures(summary: dict[str, Any], focus: str) -> dict[str, Any]:
    accuracy = summary["accuracy"]
    return {
        "gain": accuracy[focus]["gain"],
        "layouts_kept": accuracy[focus]["layouts_kept"],
        "worst_other": min((v["gain"][0] for c, v in accuracy.items() if c != focus), default=0.0),
        "drift": summary["drift"],
        "trained_seconds": summary["trained_seconds"],
        "evaluations": summary["evaluations"],
    }


def _table(labels: Sequence[str], found: dict[str, Any]) -> str:
    head = (
        f"\n{'':28}{'gain on ' + found['focus']:>18}{'± s.e.':>8}{'layouts kept':>14}{'worst other':>13}{'seconds':>9}"
    )
    lines = [head]
    for label in labels:
        f = found["runs"][label]
        kept = "-" if f["layouts_kept"] is None else f"{f['layouts_kept']:.0%}"
        lines.append(
            f"{label:28}{100 * f['gain'][0]:+18.1f}{100 * f['gain'][1]:8.1f}{kept:>14}{100 * f['worst_other']:+13.1f}"
            f"{f['trained_seconds']:9.0f}"
        )
    lines += [""] + [f"  {'yes' if ok else 'NO ':3}  {what}" for what, ok in found["promises"].items()]
    return "\n".join([*lines, f"\n{found['seconds']:.0f} s in all"])


def _report(options: DemoOptions, folders: Sequence[Folder], labels: Sequence[str], found: dict[str, Any]) -> Path:
    from flowalign.report import write_report

    notes = ["", "", "Must not be followed: look at the layouts and at the other categories.", "Must not gain."]
    words = (
        "One little text-to-image model, fine-tuned by two methods on the verdict of a strict judge, and a third time "
        "with nothing that holds it to the base. The third one's own reward rises fast, and something that it was not "
        "asked for pays: fewer layouts, other categories, in some seeds the strict verdict itself."
    )
    return write_report(
        folders, options.output / "report.html", labels=labels, notes=notes[: len(folders)],
        title="The demo: alignment, with and without a penalty", words=words,
    )  # fmt: skip
