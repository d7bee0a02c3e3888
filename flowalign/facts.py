"""What the demo worlds bring: the judge, prompts and settings that a run on one of them takes by default."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowalign.config import RunConfig
from flowalign.prompts import read_prompts
from flowalign.source import Prompt

__all__ = ["WORLDS", "Facts", "focus_of", "judged_by", "resolve_world", "world_prompts"]


@dataclass(frozen=True)
class Facts:
    """What a run on a demo world takes by default.

    Attributes:
        judge: strict reward, the truth that accuracies are reported by.
        held: rewards that the checks of a run watch beside those, where none are asked for; "" for none.
        layouts: ``module:function`` that names arrangements; "" for none.
        train: prompt set to learn from; ``focus`` is the train split with three prompts of the focus to one other,
            ``focus7`` has seven to one, and so on; ``count7`` has seven of counts to one, whatever the focus is.
        focus: category that has room to improve.
        check: set that recipes are chosen on.
        report: set that figures are reported on.
        call: arguments of the pipeline's call at its best.
        steps: sampling steps that a model is judged with, however many it is trained with; those of the training for 0.
    """

    judge: str
    held: str = ""
    layouts: str = ""
    train: str = "focus"
    focus: str = "count"
    check: str = "select"
    report: str = "report"
    call: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0


# the steps that each is judged with, and its focus
_SHAPES = {
    "shapes": (10, "mixed"),
    "shapes-vp": (10, "count"),
    "shapes-vp-v": (10, "count"),
    "shapes-turbo": (4, "count"),
}
WORLDS: dict[str, Facts] = {
    name: Facts(
        "shapes", "shapes-clip", "flowalign.layouts:shapes", focus=focus, call={"guidance_scale": 1.0}, steps=steps
    )
    for name, (steps, focus) in _SHAPES.items()
}


def resolve_world(config: RunConfig) -> RunConfig:
    """Spell out what the demo world of a configuration brings, so that its pipeline can be replaced by a saved one."""
    facts = WORLDS.get(config.pipeline)
    if facts is None:
        return config
    e = config.evaluation
    spelled = replace(
        e, prompts=e.prompts or f"{config.pipeline}:{facts.report}", rewards=judged_by(facts, e.rewards),
        check_prompts=e.check_prompts or f"{config.pipeline}:{facts.check}", layouts=e.layouts or facts.layouts or None,
        steps=e.steps or facts.steps or None,
    )  # fmt: skip
    return replace(
        config,
        prompts=config.prompts or f"{config.pipeline}:{facts.train}",
        evaluation=spelled,
        call={**facts.call, **config.call},
    )


def focus_of(config: RunConfig) -> str:
    """Return the category that the prompts of a run dwell on, whatever came of it; "" where they do not say."""
    world, _, name = (config.prompts or f"{config.pipeline}:focus").partition(":")
    if world not in WORLDS:
        return ""
    return (_share(world, name) or ("", 0))[0]


def judged_by(facts: Facts | None, given: str | None) -> str:
    """Return the specification of the rewards of an evaluation: the world's judge, then those given, each once."""
    terms = [t.strip() for spec in (facts.judge if facts is not None else "", given or "") for t in spec.split(",")]
    return ", ".join(dict.fromkeys(filter(None, terms)))


def world_prompts(world: str, name: str) -> list[Prompt]:
    """Return a prompt set of a demo world.

    Raises:
        KeyError: for a world that is not known.
        ValueError: for a set that it does not have.
    """
    if world not in WORLDS:
        raise KeyError(world)
    from flowalign.pipelines import worlds
    from flowalign.pipelines.worlds.scenes import CATEGORIES

    folder = Path(worlds.__file__).parent / "prompts"
    if share := _share(world, name):
        return _focus(read_prompts(str(folder / "train.jsonl")), *share)
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        known = ["focus", *CATEGORIES, *sorted(p.stem for p in folder.glob("*.jsonl"))]
        raise ValueError(f"world {world} has no prompt set {name!r}; it has {', '.join(known)}.")
    return read_prompts(str(path))


def _share(world: str, name: str) -> tuple[str, int] | None:
    """Return category and share of a set that dwells on one, as ``focus`` and ``count7`` do; None for another set."""
    from flowalign.pipelines.worlds.scenes import CATEGORIES

    found = re.fullmatch(rf"(focus|{'|'.join(CATEGORIES)})([1-9]\d*)?", name)
    return found and (WORLDS[world].focus if found[1] == "focus" else found[1], int(found[2] or 3))


def _focus(prompts: Sequence[Prompt], focus: str, share: int) -> list[Prompt]:
    """Return prompts of which ``share`` in ``share + 1`` are of one category, the others evenly of the other ones."""
    mine = share * [p for p in prompts if p.meta.get("category") == focus]
    kinds = list(dict.fromkeys(p.meta.get("category") for p in prompts if p.meta.get("category") != focus))
    rest = [[p for p in prompts if p.meta.get("category") == k] for k in kinds]
    others = [p for depth in range(max(map(len, rest))) for r in rest for p in r[depth : depth + 1]]
    wanted = len(mine) // share
    return mine + (others * -(-wanted // len(others)))[:wanted]
