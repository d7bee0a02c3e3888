"""Noise search: the deterministic sampler is a function of its noise, so search the noise (Ma et al. 2501.09732).

    random       fresh noises, keep the best; the pool doubles each round where ``growth = 2``
    zero-order   neighbours of a pivot on its sphere,  z' = |z| (θ u + √(1 - θ²) w),  u = z/|z|,  w ⟂ u of length 1;
                 the best becomes the pivot; a round without gain draws a fresh pivot
    paths        states part-way; re-noise each a few levels up, several times, solve down a few more, keep the best

Each wanted result is a search of its own; all of them run in one batch. Every round yields
the best so far; ``paths`` has one round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.kernels import EulerMaruyama
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.candidates import best_by_row, better, mixed, take
from flowalign.methods.particles import Rows, finish, roll, rows_of
from flowalign.noise import START, Noise, mix
from flowalign.options import FitOptions
from flowalign.potentials import Difference
from flowalign.rollout import rollout
from flowalign.selection import Top
from flowalign.trajectory import Nodes, ranks
from flowalign.values import Tweedie

__all__ = ["NoiseSearch", "neighbours", "play", "pruned"]

ODE = EulerMaruyama()


def play(rows: Rows, z: Tensor, row: Tensor) -> Candidates:
    """Solve the ODE from starting noises ``z (N, *shape)`` of the given rows, and judge what comes out."""
    return pruned(rows, z, row, {})[0]


def pruned(rows: Rows, z: Tensor, row: Tensor, keep: Mapping[int, int]) -> tuple[Candidates, Tensor]:
    """Solve the ODE, but after some levels only for those of each row whose posterior means promise most (TTSnap).

    Args:
        rows: of the task.
        z: starting noises ``(N, *shape)``.
        row: of each, ``(N,)``; equally many of each row where ``keep`` is not empty.
        keep: level → number kept of each row.

    Returns:
        The samples that were finished, and which of the noises each came from.
    """
    start = Nodes.enter(rows.task.pipeline.start(z, float(rows.task.times[0]), rows.cond[row]), row)
    with torch.no_grad():
        if not keep:
            tree = roll(rows, ODE, start)
        else:
            potential = Difference(1.0, lambda k: k in keep)
            tree = roll(rows, ODE, start, value=Tweedie(rows.score), potential=potential, select=Top(keep))
        return finish(rows, tree), tree.lineage()[0]


def neighbours(z: Tensor, w: Tensor, theta: float) -> Tensor:
    """Return points at angle arccos θ from ``z (N, *)`` on its own sphere, in the directions of ``w (N, *)``."""
    flat, w = z.flatten(1).double(), w.flatten(1).double()
    radius = flat.norm(dim=1, keepdim=True)
    u = flat / radius
    w = w - (w * u).sum(1, keepdim=True) * u
    w = w / w.norm(dim=1, keepdim=True)
    return (radius * (theta * u + (1 - theta**2) ** 0.5 * w)).to(z).reshape(z.shape)


@dataclass(frozen=True)
class NoiseSearch(Steering):
    """Search over the noise of the deterministic sampler.

    Attributes:
        strategy: random, zero-order, paths.
        rounds: of the search; for ``paths`` there are as many as its grid needs.
        pool: noises per round (random), neighbours of the pivot (zero-order), states kept (paths).
        growth: the random pool's factor from round to round.
        theta: cosine of the angle between a pivot and its neighbours, in [0, 1).
        restart: whether a round without gain draws a fresh pivot.
        renoisings: of each kept state (paths).
        first: steps before the first choice (paths).
        up: levels that a state is re-noised by (paths).
        down: levels that it is then solved down, more than ``up`` (paths).
        levels: steps after which to prune a round's noises, counted from 0 (random, zero-order): local search with
            TTSnap's pruning.
        keep: part kept at each, in (0, 1].
    """

    name: ClassVar[str] = "noise-search"
    summary: ClassVar[str] = "search the starting noise of the ODE: random, zero-order neighbours, or paths"
    results: ClassVar[Literal["best", "last"]] = "last"
    reference: ClassVar[str] = """@article{ma2025inference,
  title={Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps},
  author={Ma, Nanye and Tong, Shangyuan and Jia, Haolin and Hu, Hexiang and Su, Yu-Chuan and Zhang, Mingda and others},
  journal={arXiv preprint arXiv:2501.09732}, year={2025}}"""

    strategy: Literal["random", "zero-order", "paths"] = "zero-order"
    rounds: int = 8
    pool: int = 4
    growth: int = 1
    theta: float = 0.95
    restart: bool = True
    renoisings: int = 4
    first: int = 4
    up: int = 1
    down: int = 3
    levels: tuple[int, ...] = ()
    keep: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if min(self.rounds, self.pool, self.growth, self.renoisings, self.first, self.up) < 1:
            raise ValueError(f"rounds, pool, growth, renoisings, first and up must be at least 1; got {self}.")
        if not 0 <= self.theta < 1:
            raise ValueError(f"theta is a cosine in [0, 1): at 1 every neighbour is the pivot; got {self.theta}.")
        if self.down <= self.up or self.up > self.first:
            raise ValueError(f"paths need up < down and up <= first; got {self.up}, {self.down}, {self.first}.")
        rising = all(a < b for a, b in pairwise(self.levels)) and all(k >= 0 for k in self.levels)
        if len(self.levels) != len(self.keep) or not rising or not all(0 < a <= 1 for a in self.keep):
            raise ValueError(f"levels must rise from 0, with one keep in (0, 1] each; got {self.levels}, {self.keep}.")

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield the best so far of every search, one per wanted result."""
        rows = rows_of(task, per_sample=True)
        if self.strategy == "paths":
            yield from self._paths(rows)
            return
        best: Candidates | None = None
        for found in self._random(rows) if self.strategy == "random" else self._zero_order(rows):
            best, _ = better(best, found)
            yield best

    def _fresh(self, rows: Rows, salt: int, n: int, row: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``n`` standard normals for each row (or each node of ``row``), and the row of each."""
        row = (torch.arange(len(rows.prompt)) if row is None else row).repeat_interleave(n)
        noise = Noise(mix(rows.noise.seed, salt, 71), rows.noise.keys)
        return noise.normal(START, row, ranks(row), rows.task.pipeline.shape(rows.task.judge.cond)), row

    def _kept(self, count: int) -> dict[int, int]:
        """Return how many of a row's noises are left after each level, one at least."""
        out = {}
        for level, alpha in zip(self.levels, self.keep, strict=True):
            out[level] = count = max(1, int(alpha * count + 1e-9))
        return out

    def _random(self, rows: Rows) -> Iterator[Candidates]:
        for i in range(self.rounds):
            n = self.pool * self.growth**i
            z, row = self._fresh(rows, i, n)
            found, origin = pruned(rows, z, row, self._kept(n))
            yield take(found, best_by_row(found.total, row[origin], len(rows.prompt)))

    def _zero_order(self, rows: Rows) -> Iterator[Candidates]:
        """Yield the pivots: a fresh one may be worse than what was found before."""
        z, row = self._fresh(rows, 0, 1)
        if z[0].numel() < 2:
            raise ValueError(
                "a sphere in one dimension has no neighbours: search states of two or more, or strategy=random."
            )
        yield (pivot := play(rows, z, row))
        for i in range(self.rounds):
            w, of = self._fresh(rows, 2 * i + 1, self.pool)
            near = neighbours(z[of], w, self.theta)
            found, origin = pruned(rows, near, of, self._kept(self.pool))
            index = best_by_row(found.total, of[origin], len(row))
            pivot, won = better(pivot, take(found, index))
            z = torch.where(won.reshape(-1, *[1] * (z.ndim - 1)), near[origin[index]], z)
            yield pivot
            stuck = (~won).nonzero().flatten()
            if self.restart and i + 1 < self.rounds and len(stuck):
                z[stuck] = self._fresh(rows, 2 * i + 2, 1)[0][stuck]
                index = torch.arange(len(row))
                index[stuck] = len(row) + torch.arange(len(stuck))
                yield (pivot := mixed(pivot, play(rows, z[stuck], stuck), index))

    def _paths(self, rows: Rows) -> Iterator[Candidates]:
        """Yield the finished samples."""
        task, times = rows.task, rows.task.times
        last = len(times) - 1
        if self.first >= last:
            raise ValueError(f"paths choose first after {self.first} steps, and the sampler has {last}. Lower first.")
        z, row = self._fresh(rows, 0, self.pool)
        start = Nodes.enter(task.pipeline.start(z, float(times[0]), rows.cond[row]), row)
        level, x = self.first, self._solve(rows, start, 0, self.first)[0]
        while level < last:
            top, end = level - self.up, min(level - self.up + self.down, last)
            w, of = self._fresh(rows, level, self.renoisings, row)
            x = x.repeat_interleave(self.renoisings, 0)
            x = task.policy.process.forward(x, float(times[level]), float(times[top]), w.to(x))
            x, x0 = self._solve(rows, Nodes.enter(x, of), top, end)
            with torch.no_grad():
                total = rows.score(x0, of)
            keep = best_by_row(total, of, len(rows.prompt), self.pool)
            x, level = x[keep.to(x.device)], end
        heard = rows.last(x0)
        assert heard is not None
        yield take(Candidates(x0, rows.prompt[of], heard, total, torch.zeros_like(total)), keep[:: self.pool])

    def _solve(self, rows: Rows, start: Nodes, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return the states at level ``last`` and what the last network call takes for their clean states."""
        with torch.no_grad():
            tree = rollout(
                rows.task.policy, ODE, rows.task.times[first : last + 1], start, rows.cond, noise=rows.noise,
                n_rows=len(rows.prompt), keep=True,
            )  # fmt: skip
        before = tree.at(last - first - 1).posterior
        assert before is not None
        return tree.leaves.x, tree.leaves.x if last == len(rows.task.times) - 1 else before.x0

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings of the three searches, and the demo's."""
        return {
            "published": Preset(cls(), FitOptions(steps=28, size=1), note="zero-order, θ = .95, 4 neighbours."),
            "published-random": Preset(cls("random", 5, 2, 2), FitOptions(steps=28, size=1), note="pool 2^round."),
            "paths": Preset(cls("paths", pool=2), FitOptions(steps=28, size=1), note="f and b: unverified."),
            "demo": Preset(cls(rounds=4), FitOptions(steps=10, size=4), guidance=False, note="shapes."),
        }  # fmt: skip
