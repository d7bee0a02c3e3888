"""How the command line is read: the method's name, a file and a preset under the options, and the options themselves.

Options come from dataclasses (tyro), so ``--help`` and the YAML keys are the same fields with the same words. What is
heavy is imported where it is needed, so that ``flowalign --help`` answers at once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowalign.methods import names, resolve

if TYPE_CHECKING:
    from flowalign.config import RunConfig

__all__ = ["flag", "method_name", "parse", "take", "train_config"]

SHORT = {
    "--max-seconds": "--fit.max-seconds",
    "--max-evaluations": "--fit.max-evaluations",
    "--iterations": "--fit.iterations",
    "--seed": "--fit.seed",
    "--stop-on-hacking": "--evaluation.stop-on-hacking",
}


def take(args: list[str], option: str, default: str | None = None) -> str | None:
    """Remove ``option VALUE`` or ``option=VALUE`` and return the value."""
    for i, a in enumerate(args):
        if a == option:
            if i + 1 >= len(args):
                raise ValueError(f"{option} needs a value.")
            value = args[i + 1]
            del args[i : i + 2]
            return value
        if a.startswith(option + "="):
            del args[i]
            return a.removeprefix(option + "=")
    return default


def flag(args: list[str], option: str) -> bool:
    """Remove a flag and return whether it was there."""
    found = option in args
    args[:] = [a for a in args if a != option]
    return found


def method_name(args: list[str], kind: str) -> str | None:
    """Remove the method's name, if one is there, and return it.

    Raises:
        ValueError: for a method that does not exist, or is of another kind.
    """
    if not args or args[0].startswith("-"):
        return None
    name = args.pop(0)
    found = resolve(name).kind
    if found != kind:
        verb = {"training": "train", "steering": "steer"}[found]
        raise ValueError(f"{name} is a {found} method: run flowalign {verb} {name}.")
    return name


def parse(kind: Any, args: list[str], default: Any, prog: str) -> Any:
    """Read the fields of a dataclass; exits with 2 for unknown options, naming the nearest."""
    import tyro

    shown = tyro.conf.AvoidSubcommands[kind]
    return tyro.cli(shown, args=args, default=default, prog=prog, config=(tyro.conf.SuppressFixed,))


def train_config(args: list[str]) -> tuple[RunConfig, bool, bool]:
    """Read a training configuration: preset, file or resumed run, then options; and the flags --resume and --quiet.

    Raises:
        ValueError: for what can be seen to be wrong before anything is loaded.
    """
    from flowalign.config import RunConfig
    from flowalign.prepare import Lora

    name = method_name(args, "training")
    file, preset = take(args, "--config"), take(args, "--preset")
    resume, quiet, full, lora = (flag(args, o) for o in ("--resume", "--quiet", "--full", "--lora"))
    for i, a in enumerate(args):
        head, equals, tail = a.partition("=")
        args[i] = SHORT.get(head, head) + equals + tail
    base = _base(args, name, file, preset, resume)
    if full and (lora or any(a.startswith("--lora.") for a in args)):
        raise ValueError("--full trains all weights and --lora an adapter: choose one.")
    if full:
        base = replace(base, lora=None)
    elif lora or any(a.startswith("--lora.") for a in args):
        base = replace(base, lora=base.lora or Lora())
    return parse(RunConfig, args, base, f"flowalign train {base.method.name}"), resume, quiet


def _base(args: list[str], name: str | None, file: str | None, preset: str | None, resume: bool) -> RunConfig:
    """Return what the options change: a resumed run's configuration, a file's, or a preset's."""
    from flowalign.config import default, from_yaml
    from flowalign.folder import Folder

    start = preset or "demo"
    base = from_yaml(Path(file), name, start) if file is not None else default(name, start) if name else None
    output = take(list(args), "--output")
    folder = None if output is None else Path(output)
    if folder is None and base is not None:
        folder = replace(base, pipeline=take(list(args), "--pipeline") or base.pipeline).folder
    if resume and folder is not None and (old := Folder(folder)).exists:
        found = old.config()
        if base is not None and type(found.method) is not type(base.method):
            raise ValueError(f"{folder} is a run of {found.method.name}, not of {name or base.method.name}.")
        return replace(_again(found, file, preset), output=folder)
    if base is None:
        raise ValueError(f"name a method: {', '.join(names('training'))}; or give --config, or --resume with --output.")
    return base


def _again(found: RunConfig, file: str | None, preset: str | None) -> RunConfig:
    """Return a resumed run's configuration with what the command names once more: a preset, a file.

    Both say the same as before or are refused by the folder, as an option would be; what they leave out, and
    the budgets that a preset starts with, stay as they were in the run.
    """
    from flowalign.config import over, preset_of
    from flowalign.folder import BUDGETS
    from flowalign.yaml_file import read_mapping

    data = {} if file is None else read_mapping(Path(file))
    preset = data.get("preset", preset)
    if preset is not None:
        chosen = preset_of(type(found.method), str(preset))
        budgets = [b.removeprefix("fit.") for b in BUDGETS if b.startswith("fit.")]
        fit = replace(chosen.fit, **{b: getattr(found.fit, b) for b in budgets})
        found = replace(
            found, method=chosen.method, fit=fit, lora=chosen.lora, ema=chosen.ema, guidance=chosen.guidance
        )
    return over(found, data, str(file))
