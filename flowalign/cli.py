"""The ``flowalign`` command. Each subcommand is thin: it reads options, calls one function, prints what came.

How options are read is in :mod:`flowalign.arguments`, what is listed in :mod:`flowalign.listing`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowalign.arguments import flag, method_name, parse, take, train_config
from flowalign.listing import LISTS, listed, wrapped
from flowalign.methods import names, nearest, resolve
from flowalign.pause import Away

__all__ = ["flag", "main", "parse", "say", "take"]

METHOD = "  METHOD               "
HELP = """flowalign: align diffusion and flow-matching generators with reward models.

  flowalign demo                          align a little text-to-image model by two methods, and look: 8 minutes
  flowalign train METHOD [options]        fine-tune a generator on a reward
  flowalign steer METHOD [options]        search a frozen generator's samples
  flowalign score IMAGES --reward SPEC    what rewards say of pictures
  flowalign evaluate FOLDER [options]     judge a run's result once more, or several models side by side
  flowalign report FOLDER...              write report.html of one run, or of several side by side
  flowalign methods | rewards | pipelines what there is
  flowalign serve REWARD                  a reward behind HTTP
  flowalign cite METHOD                   BibTeX

A first run, on the demo model that comes with the package:

  flowalign train diffusion-nft --pipeline shapes --reward shapes --max-seconds 120 --output runs/first

Your own: a folder or hub id of any diffusers pipeline, a reward by name or as module:Class, prompts in a file:

  flowalign train flow-grpo --preset published --pipeline stabilityai/stable-diffusion-3.5-medium \\
      --reward pickscore --prompts prompts.txt --precision bf16 --call height 512 width 512

`flowalign COMMAND --help` says more.
"""
TRAIN_HELP = """usage: flowalign train METHOD [--preset NAME] [--config FILE.yaml] [options]

Fine-tunes a generator on a reward: evaluates it on held-out prompts, trains, evaluates again on the same noises, and
writes a folder with the configuration, metrics, checkpoints, the result in diffusers format, summary.json, report.html.

{methods}
  --preset NAME        settings to start from: demo (for the little worlds) or published (the paper's); default demo
  --config FILE        a YAML file over the preset; its keys are the options below, nested at the dots
  --resume             go on with the run in --output after a crash or Ctrl-C; its settings need not be told again, and
                       a preset, a file or options that are must agree: only budgets may change
  --full | --lora      train all weights, or a LoRA (then --lora.rank, --lora.alpha, ...)
  --max-seconds, --max-evaluations, --iterations, --seed     short for --fit.max-seconds, ...
  --quiet              no progress bars

flowalign train METHOD --help lists every option with its default.
"""
STEER_HELP = """usage: flowalign steer METHOD [--preset NAME] [options]

Searches the samples of a frozen generator and writes a folder: what it found, at what cost, and how it came about.

{methods}

  flowalign steer best-of-n --prompts "three cyan circles" --method.n 16
  flowalign steer fk-steering --prompts prompts.txt --reward "shapes?aspect=graded" --budget 5000nfe
  flowalign steer dts --prompts "three cyan circles" --budget 30s --output runs/tree
  flowalign steer dts --prompts "three cyan circles" --budget 60s --output runs/tree --resume

A budget is in network evaluations (500nfe), seconds (30s, 5min), rewards, decodes or gradients; the search ends in time
with the best so far. The folder has the images, summary.json (scores, weights, log Z, the ledger) and report.html.

flowalign steer METHOD --help lists every option with its default.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 for a run that failed, 2 for bad input, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    try:
        if args[0] == "--version":
            from flowalign import __version__

            print(__version__)
            return
        if args[0] not in COMMANDS:
            raise ValueError(f"there is no command {args[0]!r}. {nearest(args[0], list(COMMANDS))}")
        COMMANDS[args[0]](args[1:])
    except (ValueError, FloatingPointError, Away) as error:
        print(f"flowalign: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
    except KeyboardInterrupt:
        saved = " What was saved is in the run's folder; --resume goes on from there." if args[0] == "train" else ""
        print(f"flowalign: stopped.{saved}", file=sys.stderr)
        raise SystemExit(130) from None


def say(text: str) -> None:
    """Print: the one place beside this file's own where the package writes to the terminal."""
    print(text)


# -- train -----------------------------------------------------------------------------------------------------------
def train(args: list[str]) -> None:
    """``flowalign train``."""
    if not args or args[0] in ("-h", "--help"):
        print(TRAIN_HELP.format(methods=wrapped(METHOD, names("training"))))
        return
    config, resume, quiet = train_config(args)
    from flowalign.folder import Folder
    from flowalign.run import train as run

    if resume and not Folder(config.folder).exists:
        print(f"{config.folder} holds no run to go on with: a new one begins.", file=sys.stderr)
    summary = run(config, resume, progress=not quiet)
    print(_table(summary))
    print(f"\n{config.folder}/report.html")
    if summary["status"] == "interrupted":  # by Ctrl-C: a budget that is used up ends a run as done
        raise SystemExit(130)


def _table(summary: dict[str, Any]) -> str:
    """Return the figures of a run as text."""
    cost = f"{summary['trained_seconds']:.0f} s of training, {summary['evaluations']} network evaluations"
    lines = [f"{summary['method']} on {summary['pipeline']}: {summary['iterations']} iterations, {cost}"]
    if "accuracy" not in summary:
        return "\n".join([*lines, f"{summary['status']}: no final evaluation; --resume goes on"])
    lines.append(
        f"{'held-out prompts':18}{'images':>7}{'before':>9}{'after':>9}{'gain':>9}{'± s.e.':>8}{'layouts kept':>14}"
    )
    for name, c in summary["accuracy"].items():
        kept = "-" if c["layouts_kept"] is None else f"{c['layouts_kept']:.0%}"
        lines.append(
            f"{name:18}{c['images']:7d}{c['before'][0]:9.3f}{c['after'][0]:9.3f}{c['gain'][0]:+9.3f}"
            f"{c['gain'][1]:8.3f}{kept:>14}"
        )
    return "\n".join(lines)


# -- the others ------------------------------------------------------------------------------------------------------
def steer(args: list[str]) -> None:
    """``flowalign steer``."""
    from flowalign.config import preset_of
    from flowalign.steer import SteerConfig, run

    if not args or args[0] in ("-h", "--help"):
        print(STEER_HELP.format(methods=wrapped(METHOD, names("steering"))))
        return
    name = method_name(args, "steering")
    if name is None:
        raise ValueError(f"name a method: {', '.join(names('steering'))}.")
    preset = preset_of(resolve(name), take(args, "--preset", "demo") or "demo")
    base = SteerConfig(preset.method, samples=preset.fit.size, steps=preset.fit.steps, guidance=preset.guidance)
    config = parse(SteerConfig, args, base, f"flowalign steer {name}")
    s = run(config)
    results, candidates = (math.nan if (r := s[f"reward_of_{k}"]) is None else r for k in ("results", "candidates"))
    print(
        f"{s['status']}: reward of the results {results:.4f}, of all candidates {candidates:.4f}; "
        f"{s['ledger']['evaluations']:.0f} network evaluations\n{config.folder}/report.html"
    )


def demo(args: list[str]) -> None:
    """``flowalign demo``."""
    from flowalign.demo import DemoOptions, Failed, run

    options = parse(DemoOptions, args, DemoOptions(), "flowalign demo")
    again = f"{options.output} keeps what was written; delete it, or choose another --output, to begin again."
    try:
        run(options)
    except Failed as error:
        print(f"flowalign: {error} {again}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"flowalign: the demo was stopped, and is not resumed. {again}", file=sys.stderr)
        raise SystemExit(130) from None


def report(args: list[str]) -> None:
    """``flowalign report FOLDER... [--output FILE]``."""
    from flowalign.folder import Folder
    from flowalign.report import write_report

    output = take(args, "--output")
    if not args or args[0] in ("-h", "--help"):
        print("usage: flowalign report FOLDER [FOLDER ...] [--output FILE.html]")
        return
    folders = [Folder(Path(a)) for a in args]
    for f in folders:
        if not f.exists:
            raise ValueError(f"{f.path} holds no run.")
    print(write_report(folders, Path(output) if output else folders[0].path / "report.html"))


def _later(module: str, function: str = "main") -> Callable[[list[str]], None]:
    """Return a command that lives in another module and is imported when it is asked for."""

    def command(args: list[str]) -> None:
        import importlib

        getattr(importlib.import_module(module), function)(args)

    return command


def _list(what: str) -> Callable[[list[str]], None]:
    """Return a command that prints a list."""
    return lambda args: print(listed(what, args))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "train": train,
    "steer": steer,
    "score": _later("flowalign.score"),
    "evaluate": _later("flowalign.judge_run"),
    "report": report,
    **{what: _list(what) for what in LISTS},
    "serve": _later("flowalign.rewards.serve"),
}
