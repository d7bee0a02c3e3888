"""Noise-aware rewards by self-distillation: what the picture that shows through the noise will be worth (TTSnap).

A reward was trained on clean pictures, and the posterior mean of a noisy state is none. For each level t of the sampler

    R_t( x̂0_t ) ≈ R(x0),    mean squared error,    one pass per level, from the clean end to the noisy one

where every level starts from the weights of the level before it and keeps its own copy. ``residual`` students are the
teacher plus a correction that starts at zero, ``R(x̂0_t) + δ_t(x̂0_t)``: self-distillation in the paper's sense, at the
price of one decode and one reward call per look. Others see the posterior mean alone and cost neither. What is pruned
by may also be a value of noisy states that Euphonium or Flow-NRG trained (:mod:`flowalign.value_file`): no look either.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign.methods.particles import Rows
from flowalign.noise import mix
from flowalign.process import Posterior, Time
from flowalign.selection.base import by_row
from flowalign.value_file import LatentValues
from flowalign.valuenet import LatentValue, word_ids
from flowalign.values import Value

__all__ = ["Distil", "Seen", "Verifier", "distil", "within_rows"]


@dataclass(frozen=True)
class Distil:
    """How a noise-aware reward is trained.

    Attributes:
        residual: learn what is to be added to the clean reward of the posterior mean, rather than the reward.
        width: of the network.
        lr: learning rate (AdamW); published 3e-6 for whole reward models.
        epochs: passes over the pairs of a level; published 1.
        batch: pairs per step; published 100.
    """

    residual: bool = True
    width: int = 32
    lr: float = 1e-3
    epochs: int = 8
    batch: int = 64


@dataclass(frozen=True)
class Seen:
    """What showed through the noise at one level.

    Attributes:
        t: the time.
        x0: posterior means ``(N, *)``.
        scores: clean rewards of the posterior means by name, ``(N,)`` each; empty where nobody asked.
    """

    t: float
    x0: Tensor
    scores: Mapping[str, Tensor]


def distil(
    seen: Sequence[Seen], truth: Mapping[str, Tensor], prompts: Sequence[str], options: Distil, seed: int = 0
) -> LatentValues:
    """Train students of each reward, one for each level, on posterior means.

    Args:
        seen: the levels of one batch of samples, in any order.
        truth: rewards of the finished samples by name, ``(N,)`` each.
        prompts: of each sample.
        options: how.
        seed: of the initial weights and the batches.

    Raises:
        ValueError: where residual students lack the clean rewards of the posterior means.
    """
    levels = sorted(seen, key=lambda s: s.t)  # the curriculum: from clean to noisy
    networks: dict[str, list[LatentValue]] = {}
    scale: dict[str, tuple[float, float]] = {}
    for number, (name, reward) in enumerate(truth.items()):
        if options.residual and any(name not in s.scores for s in levels):
            raise ValueError(f"a residual student of {name!r} needs the clean rewards of the posterior means.")
        target = reward.detach().float()
        gaps = [target - s.scores[name].detach().float() if options.residual else target for s in levels]
        every = torch.cat(gaps)
        mean, std = (0.0 if options.residual else float(every.mean())), max(float(every.std(correction=0)), 1e-6)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(mix(seed, number))
            networks[name] = _curriculum(levels, [(g - mean) / std for g in gaps], word_ids(prompts), options)
        scale[name] = (mean, std)
    return LatentValues(networks, scale, [s.t for s in levels], "posterior", options.residual)


def _curriculum(levels: Sequence[Seen], targets: list[Tensor], words: Tensor, options: Distil) -> list[LatentValue]:
    """Return the student after each level."""
    x0 = levels[0].x0
    net = LatentValue(tuple(x0.shape[1:]), options.width).to(x0.device)
    last = net.head[-1]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.zeros_(last.weight)  # the student starts as its teacher
    torch.nn.init.zeros_(last.bias)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.lr)
    kept = []
    for level, target in zip(levels, targets, strict=True):
        x, y, w = level.x0.detach(), target.to(x0.device), words.to(x0.device)
        for _ in range(options.epochs):
            for i in torch.randperm(len(x)).split(options.batch):
                i = i.to(x.device)
                loss = ((net(x[i], x.new_full((len(i),), level.t), w[i]) - y[i]) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        kept.append(copy.deepcopy(net))
    return kept


def within_rows(score: Tensor, row: Tensor) -> Tensor:
    """Return the rank of each score among those of its row, 0 for the least, ``(N,)``; ties share their order."""
    nodes = by_row(row, int(row.max()) + 1)
    ranked = score.detach().cpu()[nodes].argsort(dim=1, stable=True).argsort(dim=1)
    out = torch.empty(len(row), dtype=torch.float64)
    out[nodes.flatten()] = ranked.flatten().double()
    return out.to(score.device)


@dataclass(frozen=True)
class Verifier(Value):
    """What a state promises by its posterior mean: the clean rewards, or their noise-aware students'.

    Attributes:
        rows: whose judge and prompts.
        aware: the students, or trained values of noisy states; None for the clean rewards.
        ranks: sum the ranks within each prompt in place of the weighted rewards (several rewards of unlike scales).
        blind: ask nothing before data time: states are only looked at.
        seen: what was looked at, where it is to be kept for training.
    """

    rows: Rows
    aware: LatentValues | None = None
    ranks: bool = False
    blind: bool = False
    seen: list[Seen] | None = field(default=None, compare=False)

    def __call__(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
        """Return ``(B,)``; at data time the rewards themselves."""
        x0, time = posterior.x0, float(t)
        judge = self.rows.task.judge
        weights: Mapping[str, float] = judge.scorer.weights
        clean = time == 0 or not (self.blind or (self.aware is not None and not self.aware.residual))
        total = self.rows.score(x0, row) if clean else x0.new_zeros(len(x0))
        scores: Mapping[str, Tensor] = (self.rows.last(x0) or {}) if clean else {}
        if self.seen is not None and time > 0:
            self.seen.append(Seen(time, x0.detach(), scores))
        if time == 0 or self.blind or (self.aware is None and not self.ranks):
            return total
        if self.aware is not None:
            prompts = [judge.prompts[p] for p in self.rows.prompt[row].tolist()]
            words, looked = word_ids(prompts), x if self.aware.sees == "state" else x0
            weights = self.aware.parts(weights)
            told = {name: self.aware(name, looked, time, words) for name in weights}
            scores = {name: scores.get(name, 0.0) + v for name, v in told.items()}
        counted = {k: within_rows(scores[k], row) if self.ranks else scores[k] for k in weights}
        return torch.stack([w * counted[k] for k, w in weights.items()]).sum(0)
