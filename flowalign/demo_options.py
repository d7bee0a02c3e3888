"""What may be asked of the demo, and what is refused before it writes anything."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from flowalign.ahead import check_place

__all__ = ["DemoOptions", "check", "of_base"]

MINUTES = {"quick": 0.5, "short": 8.0, "full": 32.0}

OURS = ("--output", "--config", "--preset", "--resume")


@dataclass(frozen=True)
class DemoOptions:
    """The demo.

    Attributes:
        full: thirty-two minutes instead of eight, for gains of 25 points.
        quick: half a minute, to see that everything runs; the figures mean nothing.
        seed: of the training.
        output: folder of all runs.
        control: a further run whose rewards are permuted inside their groups and teach nothing; takes longer.
        minutes: total time, in place of 8 or 32.
        images: held-out images per category.
        precision: of the networks, fp32 or bf16; when empty, whichever this machine multiplies faster in.
        options: further options of flowalign train for every run, in one string, such as
            --options="--pipeline my:pipeline --reward my:Reward"; the base is judged with those that apply to it.
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

    def __post_init__(self) -> None:
        if self.full and self.quick:
            raise ValueError("--full and --quick are two lengths of the demo: choose one.")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be positive; got {self.minutes}.")
        if self.images < 2:
            raise ValueError(f"images must be at least 2, or a mean has no standard error; got {self.images}.")
        if self.precision not in ("", "fp32", "bf16"):
            raise ValueError(f"precision is fp32 or bf16, or empty for the faster one; got {self.precision!r}.")
        named = [word.partition("=")[0] for word in self.words if word.partition("=")[0] in OURS]
        if named:
            raise ValueError(f"{named[0]} belongs to the demo, which sets it for each of its runs; leave it out.")

    @property
    def total(self) -> float:
        """Seconds in all."""
        kind = "quick" if self.quick else "full" if self.full else "short"
        return 60.0 * (MINUTES[kind] if self.minutes is None else self.minutes)

    @property
    def words(self) -> list[str]:
        """The further options, one by one.

        Raises:
            ValueError: for a quotation that is not closed.
        """
        try:
            return shlex.split(self.options)
        except ValueError as error:
            raise ValueError(f"options: {self.options!r} cannot be read ({error}).") from error


def check(options: DemoOptions, methods: Sequence[str]) -> None:
    """Refuse a folder that cannot be made, and further options that one of the runs would refuse.

    Args:
        options: of the demo.
        methods: of its runs.

    Raises:
        ValueError: for values; unknown options end the process with 2, as they do in flowalign train.
    """
    from flowalign.arguments import train_config
    from flowalign.opening import check_pipeline, check_rewards

    check_place(options.output)
    if options.options:
        for method in dict.fromkeys(methods):
            config = train_config([method, *options.words])[0]
            check_pipeline(config.pipeline)
            check_rewards(config.reward, config.evaluation.rewards or "")


def of_base(words: list[str]) -> list[str]:
    """Return the options that judging a base knows too; the others are about training."""
    from flowalign.judge_run import BaseOptions

    known, kept, ours = {f.name for f in fields(BaseOptions)}, [], False
    for word in words:
        if word.startswith("--"):
            ours = word[2:].partition("=")[0].partition(".")[0].replace("-", "_") in known
        kept += [word] if ours else []
    return kept
