"""``flowalign demo``: two methods side by side on the little world, and one that is let go, in eight minutes.

    1   the base model is judged once, while the other core shows what goes wrong: reward gradients of the small CLIP
        model without a penalty, in steps that are too large, cost layouts or the strict judge's verdict
    2   Flow-GRPO and DiffusionNFT train at the same time, one core each, until the time that is left is used up
    3   both are judged on the same prompts and noises as the base; a table, and one report of all three

Every run is an ordinary ``flowalign train`` in a process of its own, with a folder that can be looked at, resumed or
compared; nothing here is special but the clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowalign.demo_options import DemoOptions, check, of_base
from flowalign.demo_verdict import report, rewarded, table, verdict
from flowalign.folder import Folder
from flowalign.precision import quicker

__all__ = ["DemoOptions", "Failed", "run"]


class Failed(RuntimeError):
    """One of the demo's runs has failed; its log says why."""


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
        command += [*more, *options.words]
        return cls(name, folder, start(command, options.output / f"{name}.log"), seconds)

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
            Failed: with the end of its log.
        """
        if self.process.poll() not in (None, 0):
            log = self.folder.path.parent / f"{self.name}.log"
            why = _reason(log.read_text(errors="replace"))
            raise Failed(f"the run {self.name} failed with code {self.process.returncode}: {why} More is in {log}.")


def _reason(log: str) -> str:
    """Return the end of a log as one line: of a traceback its last line, else what was said, without frames."""
    words = "".join(" " if "\u2500" <= c <= "\u257f" else c for c in log)
    lines = [" ".join(line.split()) for line in words.splitlines() if line.strip()]
    last = lines[-1:] if "Traceback" in log else lines[-8:]
    return " ".join(last)[-800:] or "it said nothing."


def run(options: DemoOptions, progress: bool = True) -> dict[str, Any]:
    """Do the demo and return its verdict.

    Raises:
        ValueError: if the folder holds a demo already or cannot be made, or further options are wrong.
        Failed: if one of the runs fails.
    """
    from flowalign.cli import say

    began = time.perf_counter()
    if options.output.is_dir() and any(options.output.iterdir()):
        raise ValueError(
            f"{options.output} is not empty: choose another folder with --output or delete it; nothing was overwritten."
        )
    check(options, ["flow-grpo", "diffusion-nft", _unregularised(options)[1]])
    options = replace(options, precision=options.precision or quicker())
    options.output.mkdir(parents=True, exist_ok=True)
    judged, more = _base(options, progress)
    # the runs start, judge their small exam, are judged, and write reports outside the time they train in
    left = options.total - (time.perf_counter() - began) - 1.2 * judged - 30
    seconds = max(left, 5.0)
    runs = [Child.start(m, m, options, seconds, *more, *_settings(options)) for m in ("flow-grpo", "diffusion-nft")]
    wait(runs, progress)
    labels = ["Flow-GRPO", "DiffusionNFT", _unregularised(options)[0]]
    folders = [*(r.folder for r in runs), Folder(options.output / "unregularised")]
    if options.control:
        how = [*more, *_settings(options), "--permute"]
        control = Child.start("control", "diffusion-nft", options, seconds, *how)
        wait([control], progress)
        folders.append(control.folder)
        labels.append("control: permuted rewards")
    summaries = {n: f.summary() for n, f in zip(labels, folders, strict=True)}
    found = verdict(summaries, rewarded(folders[0], next(iter(summaries.values()))["accuracy"]), options.full)
    found["seconds"] = time.perf_counter() - began
    (options.output / "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    path = report(options.output, folders, labels)
    say(table(labels, found) + f"\n\n{path}")
    return found


def _unregularised(options: DemoOptions) -> list[str]:
    """Return label, method and options of the run that shows what goes wrong.

    Somebody's own reward may have no gradient: there it is DiffusionNFT without its penalty.
    """
    if options.options:
        return ["DiffusionNFT, no penalty", "diffusion-nft", "--preset", "unregularised"]
    return ["DRaFT on shapes-clip, no penalty", "draft", "--preset", "unregularised", "--reward", "shapes-clip",
            "--prompts", "shapes:focus7"]  # fmt: skip


def _base(options: DemoOptions, progress: bool) -> tuple[float, list[str]]:
    """Judge the base once, beside the run that is let go; return the seconds it took and options that reuse it."""
    share = min(options.total / 7, 70.0)  # longer, it breaks in most seeds
    exam = _exam(25 if options.full else 8, options.images)
    _, method, *how = _unregularised(options)
    unregularised = Child.start("unregularised", method, options, share, *how, *_exam(8, max(2, options.images // 5)))
    base = Folder(options.output / "base")
    command = [sys.executable, "-m", "flowalign", "evaluate", "--base", "--output", str(base.path), *exam]
    command += ["--precision", options.precision, *of_base(options.words)]
    judge = Child("base", base, start(command, options.output / "base.log"), 0.0)
    wait([unregularised, judge], progress)
    seconds = float(base.summary()["seconds"]["evaluate_before"])
    return seconds, [*exam, "--evaluation.base", str(base.path / "before.pt")]


def _settings(options: DemoOptions) -> list[str]:
    """Return the preset of both methods; half an hour wants smaller steps than four minutes."""
    return ["--preset", "demo-long"] if options.full else []


def _exam(every: int, images: int) -> list[str]:
    """Return options of the evaluations: all take the same steps, whatever each method trains with."""
    return ["--evaluation.every", str(every), "--evaluation.images", str(images), "--evaluation.steps", "10"]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process of one thread whose words go to a file."""
    with log.open("wb") as words:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT, env=env)


def wait(children: Sequence[Child], progress: bool) -> None:
    """Show bars until all are done; one that fails ends the others.

    Raises:
        Failed: see :meth:`Child.check`.
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
