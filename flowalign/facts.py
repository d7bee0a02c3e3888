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

__all__ = ["WORLDS", "Facts", "judged_by", "resolve_world", "world_prompts"]


@dataclass(frozen=True)
class Facts:
    """What a run on a demo world takes by default.

    Attributes:
        judge: strict reward, the truth that accuracies are reported by.
        held: rewards that the checks of a run watch beside those, where none are asked for; "" for none.
        layouts: ``module:function`` that names arrangements; "" for none.
        train: prompt set to learn from; ``focus`` is the train split with three prompts of the focus to one other,
            ``focus7`` has seven to one, and so on.
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


WORLDS: dict[str, Facts] = {
    "shapes": Facts("shapes", "shapes-clip", "flowalign.layouts:shapes", call={"guidance_scale": 1.0}, steps=10),
    "shapes-vp": Facts("shapes", "shapes-clip", "flowalign.layouts:shapes", call={"guidance_scale": 1.0}, steps=10),
    "shapes-vp-v": Facts("shapes", "shapes-clip", "flowalign.layouts:shapes", call={"guidance_scale": 1.0}, steps=10),
    "shapes-turbo": Facts("shapes", "shapes-clip", "flowalign.layouts:shapes", call={"guidance_scale": 1.0}, steps=4),
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

    folder = Path(worlds.__file__).parent / "prompts"
    if share := re.fullmatch(r"focus([1-9]\d*)?", name):
        return _focus(read_prompts(str(folder / "train.jsonl")), WORLDS[world].focus, int(share[1] or 3))
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        known = ["focus", *sorted(p.stem for p in folder.glob("*.jsonl"))]
        raise ValueError(f"world {world} has no prompt set {name!r}; it has {', '.join(known)}.")
    return read_prompts(str(path))


def _focus(prompts: Sequence[Prompt], focus: str, share: int) -> list[Prompt]:
    """Return prompts of which ``share`` in ``share + 1`` are of one category, the others evenly of the other ones."""
    mine = [p for p in prompts if p.meta.get("category") == focus]
    kinds = list(dict.fromkeys(p.meta.get("category") for p in prompts if p.meta.get("category") != focus))
    rest = [[p for p in prompts if p.meta.get("category") == k] for k in kinds]
    others = [p for depth in range(max(map(len, rest))) for r in rest for p in r[depth : depth + 1]]
    times = -(-share * len(others) // len(mine)) if len(others) < len(mine) else share
    wanted = -(-times * len(mine) // share)
    return mine * times + others[:wanted]
