"""Steering: search the samples of a frozen generator, within a budget counted by the ledger.

    steer(generator, BestOfN(n=8), reward, ["three cyan circles"], budget=2000)  →  media, scores, weights, cost

A method yields rounds of candidates; between rounds the budget is looked at, so any search can be cut short and what
it found so far is the result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.config import Scalar, to_dict
from flowalign.ledger import UNITS, Ledger
from flowalign.methods.base import Candidates, Method, Steering, Task
from flowalign.policy import Policy
from flowalign.protocols import Pipeline, Reward
from flowalign.scorer import Bound, Scorer
from flowalign.source import Prompt, make_draw
from flowalign.trajectory import ranks

__all__ = ["SteerConfig", "Steered", "run", "steer"]


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
        budget: end the search when so much was spent; None for no limit.
        unit: of the budget: evaluations, gradients, decodes, rewards or seconds.
        guidance: whether the pipeline's guidance rule is on.
        precision: of the network.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        seed: of the noises.
        limit: at most so many prompts of the file; None for all.
    """

    method: Method
    pipeline: str = "shapes"
    call: dict[str, Scalar] = field(default_factory=dict)
    reward: str = "shapes"
    prompts: str | None = None
    output: Path | None = None
    samples: int = 4
    steps: int = 10
    budget: float | None = None
    unit: str = "evaluations"
    guidance: bool = True
    precision: str = "fp32"
    device: str = "auto"
    seed: int = 0
    limit: int | None = None

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.output or Path("runs") / f"{self.method.name}-{Path(self.pipeline).name}"


@dataclass(frozen=True)
class Steered:
    """What a search found.

    Attributes:
        media: ``(M, ...)``, best first within each prompt.
        row: prompt of each, ``(M,)``.
        rewards: by name, ``(M,)``.
        total: the weighted reward, ``(M,)``.
        weights: of each result within its prompt; they sum to one.
        candidates: mean reward of everything drawn, per prompt ``(P,)``: what no search would have had.
        ledger: what it cost.
    """

    media: Tensor
    row: Tensor
    rewards: dict[str, Tensor]
    total: Tensor
    weights: Tensor
    candidates: Tensor
    ledger: Ledger


def steer(
    generator: Pipeline,
    method: Steering,
    reward: Reward | Scorer,
    prompts: Sequence[str | Prompt],
    *,
    samples: int = 1,
    steps: int = 10,
    budget: float | None = None,
    unit: str = "evaluations",
    seed: int = 0,
    policy: Policy | None = None,
) -> Steered:
    """Search.

    Args:
        generator: from :func:`flowalign.load`.
        method: how.
        reward: what for; or a :class:`Scorer` with several.
        prompts: one search each.
        samples: results per prompt.
        steps: sampling steps.
        budget: end between rounds once so much was spent.
        unit: of the budget, a unit of the ledger.
        seed: of the noises.
        policy: evaluates the generator, where it needs a precision or a chunk size.

    Raises:
        ValueError: for a method that does not steer, no prompts, or a unit that does not exist.
    """
    if not isinstance(method, Steering):
        raise ValueError(f"{method.name} is a training method and steers nothing. Run flowalign train {method.name}.")
    if not prompts:
        raise ValueError("no prompts: a search needs at least one.")
    if unit not in UNITS:
        raise ValueError(f"unknown budget unit {unit!r}; choose one of {', '.join(UNITS)}.")
    scorer = reward if isinstance(reward, Scorer) else Scorer(generator, {reward.card.name: reward})
    policy = policy or Policy(generator)
    ledger = policy.ledger = scorer.ledger = Ledger()
    draw = make_draw([Prompt(p) if isinstance(p, str) else p for p in prompts], samples)
    judge = scorer.bind(generator.encode(draw.prompts, draw.meta), draw.prompts, draw.meta)
    task = Task(generator, policy, judge, draw, generator.times(steps), seed)
    rounds: list[Candidates] = []
    search = method.search(task)
    while True:
        with ledger.phase("search"):
            found = next(search, None)
        if found is None:
            break
        rounds = [*rounds, found] if method.results == "best" else [found]
        if budget is not None and ledger.spent(unit) >= budget:
            break
    if not rounds:
        raise ValueError(f"{method.name} yielded no candidates.")
    return _result(method, _join(rounds), judge, draw.samples, ledger)


def _join(rounds: list[Candidates]) -> Candidates:
    rewards = {k: torch.cat([r.rewards[k] for r in rounds]) for k in rounds[0].rewards}
    x, row, total, log_w = (torch.cat([getattr(r, k) for r in rounds]) for k in ("x", "row", "total", "log_w"))
    return Candidates(x, row, rewards, total, log_w, rounds[-1].trajectory)


def _result(method: Steering, found: Candidates, judge: Bound, samples: Tensor, ledger: Ledger) -> Steered:
    """Keep the best ``samples`` of each prompt, or all of the last round; decode them."""
    total = found.total.cpu()
    chosen = []
    for prompt, wanted in enumerate(samples.tolist()):
        mine = (found.row == prompt).nonzero().flatten()
        order = mine[total[mine].argsort(descending=True, stable=True)]
        chosen.append(order[:wanted] if method.results == "best" else order)
    index = torch.cat(chosen)
    row = found.row[index]
    log_w = torch.zeros(len(index)) if method.results == "best" else found.log_w.cpu()[index].float()
    weights = torch.cat([log_w[row == r].softmax(0) for r in row.unique()])
    mean = torch.stack([total[found.row == r].mean() for r in range(len(samples))])
    with torch.no_grad():
        media = judge.media(found.x[index.to(found.x.device)], row)
    rewards = {k: v.cpu()[index] for k, v in found.rewards.items()}
    return Steered(media, row, rewards, total[index], weights, mean, ledger)


# -- the command -----------------------------------------------------------------------------------------------------
def run(config: SteerConfig) -> dict[str, Any]:
    """Search for the prompts of a configuration and write a folder: images, scores, summary, report.

    Raises:
        ValueError: for whatever does not exist, or a folder that holds something already.
    """
    from flowalign.build import open_parts
    from flowalign.media_files import save_media
    from flowalign.summary import commit, versions

    if config.folder.is_dir() and any(config.folder.iterdir()):
        raise ValueError(f"{config.folder} is not empty: choose another folder with --output; nothing was overwritten.")
    if not isinstance(config.method, Steering):
        raise ValueError(
            f"{config.method.name} is a training method and steers nothing. Run flowalign train {config.method.name}."
        )
    generator, scorer, prompts, policy = open_parts(config)
    found = steer(
        generator, config.method, scorer, prompts, samples=config.samples, steps=config.steps, budget=config.budget,
        unit=config.unit, seed=config.seed, policy=policy,
    )  # fmt: skip
    names = [f"{int(r):03d}-{i:02d}" for r, i in zip(found.row, ranks(found.row), strict=True)]
    files = save_media(config.folder / "media", found.media, generator.modality, names)
    results = [
        {
            "prompt": prompts[int(found.row[i])].text,
            "file": files[i],
            "reward": float(found.total[i]),
            "rewards": {k: float(v[i]) for k, v in found.rewards.items()},
            "weight": float(found.weights[i]),
        }
        for i in range(len(found.row))
    ]
    summary = {
        "method": config.method.name,
        "reward_of_results": float(found.total.mean()),
        "reward_of_candidates": float(found.candidates.mean()),
        "ledger": found.ledger.state_dict(),
        "results": results,
        "config": to_dict(config),
        "versions": versions(),
        "commit": commit(),
    }
    (config.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary
