"""Steering: search the samples of a frozen generator, within a budget counted by the ledger.

    steer(generator, BestOfN(n=8), reward, ["three cyan circles"], budget="500nfe")  →  media, scores, weights, cost

A method yields rounds of candidates. The budget holds inside a round too: work that would go over it is not begun, and
the result is what the rounds that were finished have found; where none was, the best that was looked at, which may be a
posterior mean. Decoding the results to show them comes on top of what the search may spend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from flowalign.config import Scalar
from flowalign.ledger import Budget, BudgetSpent, Ledger
from flowalign.methods.base import Candidates, Method, Steering, Task
from flowalign.policy import Policy
from flowalign.protocols import Pipeline, Reward
from flowalign.scorer import Scorer
from flowalign.source import Prompt, make_draw
from flowalign.steered import SearchFailed, Steered, join, settle
from flowalign.watch import Look, Watch, Watched

__all__ = ["SearchFailed", "SteerConfig", "Steered", "run", "steer"]


@dataclass(frozen=True)
class SteerConfig:
    """A steering run.

    Attributes:
        method: settings of the method; ``flowalign methods`` lists them.
        pipeline: a demo world, a folder written by save_pretrained, a hub id, or your module:function.
        call: arguments of every call of the pipeline.
        reward: name[@weights][:weight], with commas; or your module:Class.
        prompts: a .txt or .jsonl file, world:set, a datasets id, or the prompt itself in quotes.
        output: folder of the run; runs/METHOD-PIPELINE when None.
        samples: results per prompt.
        steps: sampling steps.
        budget: what the search of all prompts together may spend: 500nfe, 30s, 5min, 64rewards, 64decodes, 40gradients;
            None for no limit.
        guidance: whether the pipeline's guidance rule is on.
        precision: of the network.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        seed: of the noises.
        limit: at most so many prompts of the file; None for all.
        chunk: samples per forward pass, decode and reward call, where memory is short; None for all at once.
        resume: go on with the search in the output folder (tree search).
        genealogy: keep pictures of the intermediate states for the report; they cost memory and decodes.
        progress: show a bar.
    """

    method: Method
    pipeline: str = "shapes"
    call: dict[str, Scalar] = field(default_factory=dict)
    reward: str = "shapes"
    prompts: str | None = None
    output: Path | None = None
    samples: int = 4
    steps: int = 10
    budget: str | None = None
    guidance: bool = True
    precision: str = "fp32"
    device: str = "auto"
    seed: int = 0
    limit: int | None = None
    chunk: int | None = None
    resume: bool = False
    genealogy: bool = True
    progress: bool = True

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.output or Path("runs") / f"{self.method.name}-{Path(self.pipeline).name}"


def steer(
    generator: Pipeline,
    method: Steering,
    reward: Reward | Scorer,
    prompts: Sequence[str | Prompt],
    *,
    samples: int = 1,
    steps: int = 10,
    budget: str | float | Budget | None = None,
    seed: int = 0,
    policy: Policy | None = None,
    chunk: int | None = None,
    ledger: Ledger | None = None,
    folder: Path | None = None,
    keep: bool = False,
    progress: bool = False,
) -> Steered:
    """Search.

    Args:
        generator: from :func:`flowalign.load`.
        method: how.
        reward: what for; or a :class:`Scorer` with several.
        prompts: one search each, all in one batch.
        samples: results per prompt.
        steps: sampling steps.
        budget: ``"500nfe"``, ``"30s"``, ``"64rewards"``, ...: what the search may spend, for all prompts together.
        seed: of the noises.
        policy: evaluates the generator, where it needs a precision.
        chunk: samples per forward pass, decode and reward call; None for all at once.
        ledger: what was spent before, where a search goes on.
        folder: where a search that can be continued keeps its state, and goes on from.
        keep: keep what the network said at each node, for the pictures of a report.
        progress: show a bar with the best and the mean reward, ESS and log Z.

    Raises:
        ValueError: for a method that does not steer, no prompts, a budget that is none or too small for one sample.
        SearchFailed: a reward or a weight broke, or memory ran out, after something had been found.
    """
    if not isinstance(method, Steering):
        raise ValueError(f"{method.name} is a training method and steers nothing. Run flowalign train {method.name}.")
    if not prompts:
        raise ValueError("no prompts: a search needs at least one.")
    if samples < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"samples and chunk must be at least 1; got {samples} and {chunk}.")
    limit = budget if isinstance(budget, Budget) or budget is None else Budget.parse(budget)
    scorer = reward if isinstance(reward, Scorer) else Scorer(generator, {reward.card.name: reward})
    policy = policy or Policy(generator)
    if chunk is not None:
        policy.chunk, scorer.chunk = chunk, chunk
    ledger = policy.ledger = scorer.ledger = ledger or Ledger()
    draw = make_draw([Prompt(p) if isinstance(p, str) else p for p in prompts], samples)
    plain = scorer.bind(generator.encode(draw.prompts, draw.meta), draw.prompts, draw.meta)
    with _bar(method.name, limit, progress) as told:
        watch = Watch(ledger, draw.samples, scorer.weights, told)
        judge = Watched(**vars(plain), watch=watch)
        task = Task(
            generator, policy, judge, draw, generator.times(steps), seed, watch=watch.stage, keep=keep, folder=folder
        )
        rounds, stopped, error = _search(method, task, ledger, limit)
    found = join(rounds) if rounds else watch.best()
    if found is None:
        if error is not None:
            raise error
        raise ValueError(
            f"{method.name} found nothing: " + (
                f"the budget of {limit} ended before a sample could be judged. One sample of one prompt takes "
                f"{steps} network evaluations and one decode, and prompts and particles go in one batch: give more."
                if stopped == "budget" else "it yielded no candidates."
            )
        )  # fmt: skip
    result = settle(method if rounds else None, found, plain, draw.samples, ledger, watch.looks, stopped)
    if error is not None:
        raise SearchFailed(f"{error} What was found until then is kept.", result) from error
    return result


def _search(
    method: Steering, task: Task, ledger: Ledger, limit: Budget | None
) -> tuple[list[Candidates], Literal["finished", "budget"], Exception | None]:
    """Run the method until it, its budget or its luck ends; return the rounds, how it ended, and what broke."""
    rounds: list[Candidates] = []
    search = method.search(task)
    while True:
        try:
            with ledger.phase("search"), ledger.within(limit):
                found = next(search, None)
        except BudgetSpent:
            return rounds, "budget", None
        except (ValueError, FloatingPointError) as error:
            return rounds, "finished", error
        except (torch.OutOfMemoryError, MemoryError) as error:
            return rounds, "finished", _memory(error, task)
        if found is None:
            return rounds, "finished", None
        rounds = [*rounds, found] if method.results == "best" else [found]


def _memory(error: BaseException, task: Task) -> ValueError:
    chunk = task.policy.chunk
    small = "all at once" if chunk is None else f"{chunk} at a time"
    return ValueError(
        f"memory ran out ({str(error).splitlines()[0]}): the states of {len(task.draw.prompts)} prompts were evaluated "
        f"{small}. Set chunk (--chunk {max(1, (chunk or 16) // 2)}), or take fewer particles or prompts at a time."
    )


@contextmanager
def _bar(name: str, limit: Budget | None, shown: bool) -> Iterator[Callable[[Look], None] | None]:
    """Yield what shows a look: spent so far, the best and the mean reward, ESS and log Z."""
    if not shown:
        yield None
        return
    from tqdm.auto import tqdm

    unit = "evaluations" if limit is None else limit.unit
    total = None if limit is None else limit.amount
    with tqdm(total=total, desc=name, unit=f" {unit}", dynamic_ncols=True) as line:

        def told(look: Look) -> None:
            line.n = round(look.spent[unit], 1)
            parts = {"best": look.best, "mean": look.mean, "ESS": look.ess, "log Z": look.log_z}
            line.set_postfix({k: f"{v:.3g}" for k, v in parts.items() if v is not None})

        yield told


# -- the command -----------------------------------------------------------------------------------------------------
def run(config: SteerConfig) -> dict[str, Any]:
    """Search for the prompts of a configuration and write a folder: images, scores, weights, summary, report.

    Raises:
        ValueError: for whatever does not exist, or a folder that holds something already.
    """
    from flowalign.build import open_parts
    from flowalign.steer_folder import spent_before, write

    method, folder = config.method, config.folder
    if not isinstance(method, Steering):
        raise ValueError(f"{method.name} is a training method and steers nothing. Run flowalign train {method.name}.")
    if config.resume and not method.resumable:
        raise ValueError(f"{method.name} keeps nothing that a search could go on from; leave --resume out.")
    if folder.is_dir() and any(folder.iterdir()) and not config.resume:
        hint = "go on with --resume, or " if method.resumable else ""
        raise ValueError(f"{folder} is not empty: {hint}choose another folder with --output; nothing was overwritten.")
    if config.budget is not None:
        Budget.parse(config.budget)  # before anything is loaded
    generator, scorer, prompts, policy = open_parts(config)
    try:
        found = steer(
            generator, method, scorer, prompts, samples=config.samples, steps=config.steps, budget=config.budget,
            seed=config.seed, policy=policy, chunk=config.chunk, ledger=spent_before(folder),
            folder=folder if method.resumable else None, keep=config.genealogy, progress=config.progress,
        )  # fmt: skip
    except SearchFailed as error:
        write(config, generator, scorer, prompts, error.found, f"failed: {error}")
        raise ValueError(f"{error} It is in {folder}.") from error
    return write(config, generator, scorer, prompts, found, found.stopped)
