"""The folder of a run: what it holds, how it is opened, and how it is found again after a crash.

    config.yaml           what was asked for, defaults too     result/        LoRA or pipeline, diffusers format
    resolved.yaml         with what a world and machine bring  images/        grids before and after
    metrics.jsonl         one line per iteration               summary.json   figures, cost, versions
    checks.jsonl          small evaluations on the way         report.html    all of it to look at
    checkpoints/          the newest two                       tensorboard/   the chosen trackers' own files
    before.pt, after.pt   the evaluations, image by image      costs.json     seconds and evaluations of all its parts

Files are written beside their final name and renamed, so that a kill leaves the old or the new one, never half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from flowalign.ahead import check_place
from flowalign.config import RunConfig, compose, flatten, to_dict

__all__ = ["BUDGETS", "Folder"]

BUDGETS = (
    "fit.iterations",
    "fit.max_seconds",
    "fit.max_evaluations",
    "fit.checkpoint_every",
    "evaluation.stop_on_hacking",
    "max_wall",
    "output",
    "trackers",
    "device",
)


class Folder:
    """A run's folder.

    Args:
        path: where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, config: RunConfig, resume: bool = False, resolved: RunConfig | None = None) -> Folder:
        """Make the folder of a new run, or go back to that of an old one.

        Args:
            config: what was asked for; a resumed run is held to it.
            resume: go back.
            resolved: the same with what a demo world and the machine bring, to be read.

        Raises:
            ValueError: see :meth:`check`.
        """
        cls.check(config, resume)
        folder = cls(config.folder)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write("config.yaml", _yaml(to_dict(config)))
        if resolved is not None:
            folder.write("resolved.yaml", _yaml(to_dict(resolved)))
        return folder

    @classmethod
    def check(cls, config: RunConfig, resume: bool = False) -> None:
        """Refuse a folder that :meth:`open` would not open, and write nothing.

        Raises:
            ValueError: if a new run would overwrite an old one, or a resumed one differs in more than its budget.
        """
        folder = cls(config.folder)
        check_place(folder.path)
        if folder.exists and not resume:
            raise ValueError(
                f"{folder.path} holds a run already. Continue it with --resume, or choose another folder with "
                "--output: nothing was overwritten."
            )
        if folder.exists:
            folder._same(config)
        elif folder.path.is_dir() and any(folder.path.iterdir()):
            raise ValueError(
                f"{folder.path} is not empty and holds no run of flowalign: choose another folder with --output."
            )

    @property
    def exists(self) -> bool:
        """Whether there is a run."""
        return (self.path / "config.yaml").is_file()

    def config(self) -> RunConfig:
        """Return the configuration of the run."""
        import yaml

        text = (self.path / "config.yaml").read_text(encoding="utf-8")
        return compose(yaml.safe_load(text), None, where=str(self.path / "config.yaml"))

    def _same(self, config: RunConfig) -> None:
        old, new = flatten(to_dict(self.config())), flatten(to_dict(config))
        changed = [k for k in {**old, **new} if old.get(k) != new.get(k) and not k.startswith(BUDGETS)]
        if changed:
            k, more = changed[0], f" (nor {len(changed) - 1} other changes)" if len(changed) > 1 else ""
            raise ValueError(
                f"{self.path} was run with {k} = {old.get(k)!r} and cannot be resumed with {new.get(k)!r}{more}: only "
                "its budget may change. Leave the option out, or start a new run with --output."
            )

    # -- files -------------------------------------------------------------------------------------------------
    def write(self, name: str, text: str) -> Path:
        """Write a text file atomically."""
        path = self.path / name
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
        return path

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one line of JSON."""
        with (self.path / name).open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the whole lines of a JSONL file; a last one cut short by a kill is left out."""
        path = self.path / name
        if not path.is_file():
            return []
        whole = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in whole if line]

    def rewind(self, name: str, iteration: float) -> None:
        """Drop the lines after an iteration: a resumed run writes them again."""
        kept = [r for r in self.lines(name) if r["iteration"] <= iteration]
        if (self.path / name).is_file():
            self.write(name, "".join(json.dumps(r) + "\n" for r in kept))

    def remember(self, name: str, make: Callable[[], dict[str, Any]], **now: Any) -> dict[str, Any]:
        """Return tensors and plain values of a file, made once; again where what it says of ``now`` is not so."""
        path, kept = self.path / name, self.recall(name)
        if kept is not None and all(kept.get(k) == v for k, v in now.items()):
            return kept
        temporary = path.with_name(path.name + ".tmp")
        torch.save(make() | now, temporary)
        os.replace(temporary, path)
        return torch.load(path, weights_only=True)

    def recall(self, name: str) -> dict[str, Any] | None:
        """Return what was remembered, or None."""
        path = self.path / name
        return torch.load(path, weights_only=True) if path.is_file() else None

    def spent(self) -> dict[str, float]:
        """Return ``costs.json``: what was spent, by name, over all processes that worked on the run."""
        path = self.path / "costs.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def spend(self, **amounts: float) -> None:
        """Add to what was spent."""
        spent = self.spent()
        self.write("costs.json", json.dumps({**spent, **{k: spent.get(k, 0.0) + v for k, v in amounts.items()}}) + "\n")

    def summary(self) -> dict[str, Any]:
        """Return ``summary.json``; empty where the run has not ended."""
        path = self.path / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _yaml(data: Any) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False)
