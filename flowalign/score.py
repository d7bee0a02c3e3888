"""``flowalign score``: what rewards say of picture files.

flowalign score IMAGES... --reward SPEC --prompts FILE      files or folders; a table, and means with intervals
flowalign score SPEC IMAGES... --prompt TEXT                the same, one prompt for all

A prompt comes from ``--prompts`` (a line each, in the order of the pictures, or JSON lines that name their ``file``),
from ``--prompt``, or from a text file of the same name beside the picture. What a reward cannot judge has no score: it
is shown as such and left out of the means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.facts import world_prompts
from flowalign.intervals import interval
from flowalign.opening import open_rewards, pick_device, reward_weights
from flowalign.prompts import read_prompts
from flowalign.protocols import Reward
from flowalign.source import Prompt

__all__ = ["Line", "ScoreOptions", "main", "run", "table"]

USAGE = """usage: flowalign score IMAGES... --reward SPEC [--prompts FILE | --prompt TEXT] [--json] [--batch N]
       flowalign score SPEC IMAGES... [the same]

IMAGES are files, or folders of them; SPEC is name[@weights][:weight], with commas. Each picture's prompt is that of
--prompt, of its line in --prompts (a text file in the order of the pictures, or JSON lines with "file" and "prompt", or
a demo world's set such as shapes:report), or of the text file beside it.
"""


@dataclass(frozen=True)
class ScoreOptions:
    """What rewards say of pictures.

    Attributes:
        reward: name[@weights][:weight], with commas.
        prompts: file of prompts, or a demo world's set.
        prompt: what all were to show.
        device: where networks run.
        batch: pictures of one size at a time.
        json: print JSON lines.
    """

    reward: str | None = None
    prompts: str | None = None
    prompt: str | None = None
    device: str = "auto"
    batch: int = 16
    json: bool = False


@dataclass(frozen=True)
class Line:
    """One picture.

    Attributes:
        file: where it is.
        folder: the argument that named it.
        prompt: what it was to show.
        scores: by reward; NaN where it cannot be judged.
        score: the weighted sum.
        reasons: why it cannot be judged, by reward.
    """

    file: Path
    folder: str
    prompt: str
    scores: dict[str, float]
    score: float
    reasons: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; None for what is not known."""
        known = {k: None if math.isnan(v) else v for k, v in self.scores.items()}
        total = None if math.isnan(self.score) else self.score
        found = {"file": str(self.file), "prompt": self.prompt, "score": total, "scores": known}
        return {**found, "unjudged": self.reasons} if self.reasons else found


def main(args: list[str]) -> None:
    """Run the command."""
    from flowalign.arguments import parse
    from flowalign.cli import say

    if not args or args[0] in ("-h", "--help"):
        say(USAGE)
        return
    cut = next((i for i, a in enumerate(args) if a.startswith("--")), len(args))
    named, options = args[:cut], parse(ScoreOptions, args[cut:], ScoreOptions(), "flowalign score IMAGES...")
    reward = options.reward if options.reward is not None else (named.pop(0) if named else None)
    if reward is None or not named:
        raise ValueError("name a reward and at least one picture: flowalign score IMAGES... --reward SPEC.")
    lines = run(reward, named, options)
    if options.json:
        for line in lines:
            say(json.dumps(line.to_dict()))
    else:
        say(table(list(lines)))


def run(reward: str, named: Sequence[str], options: ScoreOptions = ScoreOptions()) -> Iterator[Line]:
    """Yield what the rewards of a specification say of each picture.

    Args:
        reward: the specification.
        named: files, or folders of them.
        options: prompts and batches.

    Raises:
        ValueError: for a missing file or prompt, or an unknown reward.
    """
    from flowalign.rewards.data import picture, pictures

    if options.batch < 1:
        raise ValueError(f"batch must be at least 1; got {options.batch}.")
    paths = [(q, name) for name in named for q in (pictures(Path(name)) if Path(name).is_dir() else [Path(name)])]
    for path, _ in paths:
        if not path.is_file():
            raise ValueError(f"there is no file {path}.")
    prompts = _prompts([p for p, _ in paths], options)
    images = [picture(path) for path, _ in paths]
    judges, weights = open_rewards(reward, pick_device(options.device)), reward_weights(reward)
    sets = not all(judge.card.batch for judge in judges.values())
    for batch in _batches(images, [name for _, name in paths], options.batch, sets):
        media = torch.stack([images[i] for i in batch])
        found = {n: _score(judge, media, [prompts[i] for i in batch]) for n, judge in judges.items()}
        for k, i in enumerate(batch):
            scores = {n: float(s[k]) for n, (s, _) in found.items()}
            reasons = {n: why[k] for n, (_, why) in found.items() if k in why}
            total = sum(weights[n] * s for n, s in scores.items())
            yield Line(paths[i][0], paths[i][1], prompts[i].text, scores, total, reasons)


def _score(judge: Reward, media: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[int, str]]:
    """Return scores ``(B,)``, NaN where a sample cannot be judged, and the reasons."""
    from flowalign.rewards.base import Unjudged

    with torch.no_grad():
        try:
            return judge(media, [p.text for p in prompts], [p.meta for p in prompts]), {}
        except Unjudged as error:
            return error.scores, error.reasons


def _batches(images: Sequence[Tensor], folders: Sequence[str], size: int, sets: bool) -> Iterator[list[int]]:
    """Yield runs of pictures of one folder and one size; all of a folder at once for rewards of sets.

    Raises:
        ValueError: a folder of mixed sizes for a reward of a set.
    """
    batch: list[int] = []
    for i, image in enumerate(images):
        if batch:
            same = folders[i] == folders[batch[0]]
            alike = image.shape == images[batch[0]].shape
            if sets and same and not alike:
                raise ValueError(f"a reward of a set wants pictures of one size; {folders[i]} holds several sizes.")
            if not (same and alike and (sets or len(batch) < size)):
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def _prompts(paths: Sequence[Path], options: ScoreOptions) -> list[Prompt]:
    if options.prompt is not None and options.prompts is not None:
        raise ValueError("give --prompt, one text for all, or --prompts, a file; not both.")
    if options.prompt is not None:
        return [Prompt(options.prompt)] * len(paths)
    if options.prompts is None:
        return [Prompt(_beside(p)) for p in paths]
    found = read_prompts(options.prompts, world_prompts)
    by_file = {str(p.meta["file"]): p for p in found if "file" in p.meta}
    if by_file:
        missing = [p for p in paths if p.name not in by_file and str(p) not in by_file]
        if missing:
            raise ValueError(f'{options.prompts} has no line with "file": "{missing[0].name}".')
        return [by_file.get(str(p), by_file.get(p.name, Prompt("-"))) for p in paths]
    if len(found) != len(paths):
        raise ValueError(
            f"{options.prompts} holds {len(found)} prompts for {len(paths)} pictures: give one line per picture, in "
            'the order of their names, or JSON lines that name their "file".'
        )
    return found


def _beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise ValueError(f"{path} has no prompt: give --prompt or --prompts, or write it to {text}.")
    return text.read_text(encoding="utf-8").strip()


def table(lines: Sequence[Line]) -> str:
    """Return the pictures as a table, and each folder's means with 95 % intervals (by prompt) under it."""
    names = list(lines[0].scores)
    columns = [*names, "sum"] if len(names) > 1 else names
    width = max(12, *(len(n) + 2 for n in columns))
    out = ["".join(f"{c:>{width}}" for c in columns) + "  file"]
    for line in lines:
        cells = "".join(f"{'-' if math.isnan(v) else format(v, '.4f'):>{width}}" for v in _values(line, columns))
        why = "".join(f"   ({n}: {reason})" for n, reason in line.reasons.items())
        out.append(f"{cells}  {line.file}  {line.prompt}{why}")
    for folder in dict.fromkeys(line.folder for line in lines):
        mine = [line for line in lines if line.folder == folder]
        if len(mine) < 2:
            continue
        texts = {t: i for i, t in enumerate(dict.fromkeys(line.prompt for line in mine))}
        # one prompt for all says nothing about prompts: the interval is then over pictures
        cluster = [texts[line.prompt] for line in mine] if len(texts) > 1 else None
        out.append(f"\n{folder}: {len(mine)} pictures, {len(texts)} prompts; mean ± 95 % interval")
        for k, name in enumerate(columns):
            values = torch.tensor([_values(line, columns)[k] for line in mine])
            mean, half = interval(values, cluster)
            judged = int((~values.isnan()).sum())
            figure = f"{mean:9.4f} ± {half:.4f}" if judged > 1 else "        -"
            out.append(f"  {name:{width}}{figure}   of {judged} judged")
    return "\n".join(out)


def _values(line: Line, columns: Sequence[str]) -> list[float]:
    return [line.scores.get(c, line.score) for c in columns]
