"""Noise-aware rewards by self-distillation: what the picture that shows through the noise will be worth (TTSnap).

A reward was trained on clean pictures, and the posterior mean of a noisy state is none. For each level t of the sampler

    R_t( x̂0_t ) ≈ R(x0),    mean squared error,    one pass per level, from the clean end to the noisy one

where every level starts from the weights of the level before it and keeps its own copy. ``residual`` students are the
teacher plus a correction that starts at zero, ``R(x̂0_t) + δ_t(x̂0_t)``: self-distillation in the paper's sense, at the
price of one decode and one reward call per look. Others see the state alone and cost neither.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flowalign import weights_file
from flowalign.methods.particles import Rows
from flowalign.noise import mix
from flowalign.process import Posterior, Time
from flowalign.selection.base import by_row
from flowalign.valuenet import LatentValue, word_ids
from flowalign.values import Value

__all__ = ["Distil", "NoiseAware", "Seen", "Verifier", "distil", "within_rows"]

KIND = "noise-aware"


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


class NoiseAware:
    """Students by reward and level.

    Args:
        networks: by name of the reward, one per level.
        times: of the levels, rising.
        scale: mean and deviation of what the students of a reward predict.
        residual: see :class:`Distil`.
    """

    def __init__(
        self,
        networks: Mapping[str, Sequence[LatentValue]],
        times: Sequence[float],
        scale: Mapping[str, tuple[float, float]],
        residual: bool,
    ) -> None:
        self.networks, self.times, self.scale, self.residual = dict(networks), list(times), dict(scale), residual

    @torch.no_grad()
    def __call__(self, name: str, x0: Tensor, t: float, prompts: Sequence[str]) -> Tensor:
        """Return what the student of the nearest level adds to the clean reward, or says in its place, ``(B,)``.

        Raises:
            ValueError: for a reward that it was not trained on.
        """
        if name not in self.networks:
            raise ValueError(f"no noise-aware student of reward {name!r}; there are {', '.join(self.networks)}.")
        level = min(range(len(self.times)), key=lambda k: abs(self.times[k] - t))
        words = word_ids(prompts).to(x0.device)
        mean, std = self.scale[name]
        return mean + std * self.networks[name][level].to(x0.device)(x0, x0.new_full((len(x0),), t), words)

    def save(self, path: Path) -> None:
        """Write weights (safetensors) with what is needed to read them."""
        first = next(iter(self.networks.values()))[0]
        about = {
            "times": self.times, "scale": self.scale, "residual": self.residual, "shape": first.shape,
            "width": first.width,
        }  # fmt: skip
        weights = {
            f"{name}/{k}/{key}": v
            for name, nets in self.networks.items() for k, net in enumerate(nets) for key, v in net.state_dict().items()
        }  # fmt: skip
        weights_file.write(path, KIND, about, weights)

    @classmethod
    def load(cls, path: Path) -> NoiseAware:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: for a file that is none of these.
        """
        about, weights = weights_file.read(path, KIND, "noise-aware reward")
        networks: dict[str, list[LatentValue]] = {}
        for name in about["scale"]:
            nets = [LatentValue(about["shape"], about["width"]) for _ in about["times"]]
            for k, net in enumerate(nets):
                head = f"{name}/{k}/"
                net.load_state_dict({key.removeprefix(head): w for key, w in weights.items() if key.startswith(head)})
            networks[name] = nets
        scale = {name: (float(m), float(s)) for name, (m, s) in about["scale"].items()}
        return cls(networks, about["times"], scale, bool(about["residual"]))


def distil(
    seen: Sequence[Seen], truth: Mapping[str, Tensor], prompts: Sequence[str], options: Distil, seed: int = 0
) -> NoiseAware:
    """Train students of each reward.

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
    return NoiseAware(networks, [s.t for s in levels], scale, options.residual)


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
        aware: the students; None for the clean rewards.
        ranks: sum the ranks within each prompt in place of the weighted rewards (several rewards of unlike scales).
        blind: ask nothing before data time: states are only looked at.
        seen: what was looked at, where it is to be kept for training.
    """

    rows: Rows
    aware: NoiseAware | None = None
    ranks: bool = False
    blind: bool = False
    seen: list[Seen] | None = field(default=None, compare=False)

    def __call__(self, x: Tensor, posterior: Posterior, t: Time, row: Tensor) -> Tensor:
        """Return ``(B,)``; at data time the rewards themselves."""
        x0, time = posterior.x0, float(t)
        judge = self.rows.task.judge
        clean = time == 0 or not (self.blind or (self.aware is not None and not self.aware.residual))
        total = self.rows.score(x0, row) if clean else x0.new_zeros(len(x0))
        scores: Mapping[str, Tensor] = (self.rows.last(x0) or {}) if clean else {}
        if self.seen is not None and time > 0:
            self.seen.append(Seen(time, x0.detach(), scores))
        if time == 0 or self.blind or (self.aware is None and not self.ranks):
            return total
        if self.aware is not None:
            prompts = [judge.prompts[p] for p in self.rows.prompt[row].tolist()]
            told = {name: self.aware(name, x0, time, prompts) for name in judge.scorer.weights}
            scores = {name: scores.get(name, 0.0) + v for name, v in told.items()}
        counted = {k: within_rows(v, row) if self.ranks else v for k, v in scores.items()}
        return torch.stack([w * counted[k] for k, w in judge.scorer.weights.items()]).sum(0)
