"""What a search has looked at so far: the best states of each prompt, and reward against what was spent.

Every method asks the task's judge, so everything is seen here, intermediate looks (the posterior means of particles)
included. When a budget ends a search that has finished no round of its own, the best it has looked at is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign.ledger import Ledger
from flowalign.methods.base import Candidates
from flowalign.rollout import Stage
from flowalign.scorer import Bound
from flowalign.selection.resample import ess
from flowalign.trajectory import row_lse

__all__ = ["Look", "Watch", "Watched"]


@dataclass(frozen=True)
class Look:
    """One call of the judge.

    Attributes:
        spent: unit → so much by then.
        mean: reward of the states looked at.
        best: best reward so far, averaged over the prompts that were looked at.
        level: the level of the rollout before it; None outside of one.
        ess: effective sample size as a share of the particles, averaged over prompts; None where nothing is weighted.
        log_z: estimate of ``log Z`` up to then, averaged over prompts; None likewise.
    """

    spent: dict[str, float]
    mean: float
    best: float
    level: int | None = None
    ess: float | None = None
    log_z: float | None = None


@dataclass
class Watch:
    """Remembers.

    Attributes:
        ledger: what is spent on.
        wanted: results of each prompt, ``(P,)``.
        weights: of the rewards.
        told: called after each look; a progress bar.
    """

    ledger: Ledger
    wanted: Tensor
    weights: Mapping[str, float]
    told: Callable[[Look], None] | None = None
    looks: list[Look] = field(default_factory=list)
    _best: dict[int, tuple[Tensor, Tensor, dict[str, Tensor]]] = field(default_factory=dict)
    _state: tuple[int, float, float] | None = None

    @torch.no_grad()
    def scores(self, x0: Tensor, prompt: Tensor, rewards: Mapping[str, Tensor]) -> None:
        """Remember states ``(B, *)`` of prompts ``(B,)`` and what they scored."""
        each = {k: r.detach().float().cpu() for k, r in rewards.items()}
        total = torch.stack([self.weights[k] * r for k, r in each.items()]).sum(0)
        for p in prompt.unique().tolist():
            self._keep(p, (prompt == p).nonzero().flatten(), x0.detach(), total, each)
        best = sum(float(t[0]) for _, t, _ in self._best.values()) / len(self._best)
        spent = {u: self.ledger.spent(u) for u in ("evaluations", "gradients", "decodes", "rewards", "seconds")}
        level, share, log_z = self._state or (None, None, None)
        self.looks.append(Look(spent, float(total.mean()), best, level, share, log_z))
        if self.told is not None:
            self.told(self.looks[-1])

    def _keep(self, p: int, mine: Tensor, x0: Tensor, total: Tensor, each: Mapping[str, Tensor]) -> None:
        n = int(self.wanted[p])
        old = self._best.get(p)
        if old is not None and len(old[1]) >= n and float(total[mine].max()) <= float(old[1][-1]):
            return
        mine = mine[total[mine].argsort(descending=True, stable=True)[:n]]
        x, t, r = x0[mine.to(x0.device)], total[mine], {k: v[mine] for k, v in each.items()}
        if old is not None:
            x, t, r = (
                torch.cat([old[0], x]),
                torch.cat([old[1], t]),
                {k: torch.cat([old[2][k], v]) for k, v in r.items()},
            )
        order = t.argsort(descending=True, stable=True)[:n]
        self._best[p] = (x[order.to(x.device)], t[order], {k: v[order] for k, v in r.items()})

    @torch.no_grad()
    def stage(self, stage: Stage) -> None:
        """Remember the weights of a level."""
        nodes, rows = stage.nodes, len(stage.log_z)
        log_w = nodes.log_w.detach().double().cpu()
        count = torch.bincount(nodes.row, minlength=rows)
        log_z = stage.log_z + row_lse(log_w, nodes.row, rows) - count.log()
        share = torch.stack([ess(log_w[nodes.row == r]) for r in nodes.row.unique()]) / count[nodes.row.unique()]
        self._state = (stage.level, float(share.mean()), float(log_z.mean()))

    def best(self) -> Candidates | None:
        """Return the best states of each prompt, best first; None where nothing was judged."""
        if not self._best:
            return None
        parts = [self._best[p] for p in sorted(self._best)]
        row = torch.cat([torch.full((len(t),), p) for p, (_, t, _) in sorted(self._best.items())])
        x, total = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        rewards = {k: torch.cat([p[2][k] for p in parts]) for k in parts[0][2]}
        return Candidates(x, row, rewards, total, torch.zeros(len(total)))


@dataclass(frozen=True)
class Watched(Bound):
    """A judge that lets a :class:`Watch` hear.

    Attributes:
        watch: who hears, after each chunk, so that nothing judged is lost when a budget ends the next one.
    """

    watch: Watch = field(kw_only=True)

    def __call__(self, x0: Tensor, row: Tensor, *, learn: bool = False) -> dict[str, Tensor]:
        """Score; a search trains nothing, so ``learn`` is without effect."""
        parts: list[dict[str, Tensor]] = []
        for index in torch.arange(len(x0)).split(self.scorer.chunk):
            x, r = x0[index.to(x0.device)], row[index]
            scores = super().__call__(x, r)
            self.watch.scores(x, r, scores)
            parts.append(scores)
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
