"""TTSnap: draw many, prune while they are still noise (Yu et al. 2511.22242).

    at steps S_1 < S_2 < ... keep the part α_i of a prompt's candidates whose posterior means promise most

What promises is a noise-aware reward (:mod:`flowalign.methods.noise_aware`), trained before (``aware``; the values of
noisy states that Euphonium and Flow-NRG train are read too), or in this search on ``train`` candidates that are rolled
out to the end (they are candidates like others, and paid for); else the clean reward of the posterior mean (the paper's
TTSp). The honest cost per candidate, with x for a network evaluation, y for a verification and K steps (:func:`cost`):

    x (S_1 + 1) + α_1 x (S_2 - S_1) + α_1 α_2 x (S_3 - S_2) + ... + α_1 ... α_m x (K - 1 - S_m) + y (1 + α_1 + ...)

The published simulator leaves one evaluation per candidate out: 38 candidates for 2,000 TFLOPs that pay for 32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

import torch

from flowalign.kernels import EulerMaruyama, Kernel
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.noise_aware import Distil, Seen, Verifier, distil
from flowalign.methods.particles import Rows, finish, noisy_kernel, roll, rows_of
from flowalign.noise import mix
from flowalign.options import FitOptions
from flowalign.potentials import Difference
from flowalign.selection import Top
from flowalign.value_file import LatentValues

__all__ = ["TTSnap", "cost", "omega"]


def cost(
    steps: int, levels: Sequence[int], keep: Sequence[float], evaluation: float = 1.0, verification: float = 0.0
) -> float:
    """Return what one candidate costs: see the module. No levels: a sample of best-of-N, judged once."""
    bounds, share, total = [*levels, steps - 1], 1.0, evaluation * (levels[0] + 1 if levels else steps)
    for i, alpha in enumerate(keep):
        total += verification * share
        share *= alpha
        total += evaluation * share * (bounds[i + 1] - bounds[i])
    return total + verification * share


def omega(curve: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]]) -> float:
    """Return the relative gain in area between two reward-budget curves over the budgets that both cover.

    Areas lie above the reference's first reward (best-of-N's at its least budget), by trapezoids:
    ``ω = ∫ (r - r_1) / ∫ (r_ref - r_1) - 1``.

    Args:
        curve: budget and reward, budgets rising.
        reference: likewise.

    Raises:
        ValueError: for curves that share no range of budgets, or a reference that does not rise above its start.
    """
    low, high = max(curve[0][0], reference[0][0]), min(curve[-1][0], reference[-1][0])
    if not low < high:
        raise ValueError(f"the curves share no budgets: {curve[0][0]}-{curve[-1][0]} against {reference}.")
    base = reference[0][1]
    knots = sorted({b for b, _ in (*curve, *reference) if low <= b <= high})

    def area(points: Sequence[tuple[float, float]]) -> float:
        heights = [_at(points, b) - base for b in knots]
        steps = zip(pairwise(knots), pairwise(heights), strict=True)
        return sum((b - a) * (p + q) / 2 for (a, b), (p, q) in steps)

    under = area(reference)
    if under <= 0:
        raise ValueError(f"the reference gains nothing over its first reward {base}: a relative gain has no meaning.")
    return area(curve) / under - 1


def _at(points: Sequence[tuple[float, float]], budget: float) -> float:
    for (a, p), (b, q) in pairwise(points):
        if a <= budget <= b:
            return p + (q - p) * (budget - a) / (b - a)
    raise ValueError(f"the curve {points} does not reach the budget {budget}.")


@dataclass(frozen=True)
class TTSnap(Steering):
    """TTSnap.

    Attributes:
        n: candidates per wanted result and round.
        levels: steps after which to prune, counted from 0.
        keep: part kept at each, in (0, 1].
        rounds: of n candidates each.
        aware: file of trained values: this method's, Flow-NRG's (option save) or Euphonium's (in a run's result,
            value/values.safetensors); "" for none.
        train: candidates per wanted result rolled out to the end first, to train a noise-aware reward on; 0 for none.
        save: where to write what was trained; "" for nowhere.
        combine: several rewards by their weighted sum, or by the sum of their ranks.
        noise: of the sampler: 0 for the ODE, else a of the flow's SDE, η of DDIM.
        distil: how a noise-aware reward is trained.
    """

    name: ClassVar[str] = "ttsnap"
    summary: ClassVar[str] = "prune candidates while they are noise, by a noise-aware reward"
    reference: ClassVar[str] = """@article{yu2025ttsnap,
  title={TTSnap: Test-Time Scaling of Diffusion Models via Noise-Aware Pruning},
  author={Yu, Qingtao and Song, Changlin and Sun, Minghao and Yu, Zhengyang and Verma, Vinay Kumar and Roy, Soumya and
          Negi, Sumit and Li, Hongdong and Campbell, Dylan}, journal={arXiv preprint arXiv:2511.22242}, year={2025}}"""

    n: int = 32
    levels: tuple[int, ...] = (2, 6, 11)
    keep: tuple[float, ...] = (0.4, 0.4, 0.5)
    rounds: int = 1
    aware: str = ""
    train: int = 0
    save: str = ""
    combine: Literal["sum", "ranks"] = "sum"
    noise: float = 0.0
    distil: Distil = field(default_factory=Distil)

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.levels))
        if len(self.levels) != len(self.keep) or not rising or any(k < 0 for k in self.levels):
            raise ValueError(f"levels must rise from 0, with one keep each; got {self.levels} and {self.keep}.")
        if any(not 0 < a <= 1 for a in self.keep) or self.n < 1 or self.rounds < 1 or self.train < 0:
            raise ValueError(f"need keep in (0, 1], n >= 1, rounds >= 1, train >= 0; got {self}.")
        if self.aware and self.train:
            raise ValueError(f"aware={self.aware!r} is trained already: leave train at 0, or leave aware out.")

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield the candidates trained on, then the survivors of each round.

        Raises:
            ValueError: for pruning after more steps than there are, or trained values of other rewards.
        """
        last = len(task.times) - 2
        if self.levels and self.levels[-1] >= last + 1:
            raise ValueError(
                f"pruning after step {self.levels[-1]} is past the sampler's last step {last}. Lower levels, or raise "
                "the number of steps."
            )
        aware = self._read(task) if self.aware else None
        if self.train:
            rows = rows_of(task, per_sample=False, seed=mix(task.seed, 0, 29))
            found, seen = self._whole(rows)
            yield found
            truth = {k: v.detach() for k, v in found.rewards.items()}
            prompts = [task.draw.prompts[p] for p in found.row.tolist()]
            aware = distil(seen, truth, prompts, self.distil, task.seed)
            if self.save:
                aware.save(Path(self.save))
        for i in range(self.rounds):
            yield self._pruned(rows_of(task, per_sample=False, seed=mix(task.seed, i)), aware)

    def _read(self, task: Task) -> LatentValues:
        """Return the trained values; what they lack is found before any sampling."""
        found = LatentValues.load(Path(self.aware))
        found.parts(task.judge.scorer.weights)
        return found

    def schedule(self, count: int, least: int) -> dict[int, int]:
        """Return how many of ``count`` candidates of a prompt are left after each level; never fewer than wanted."""
        out = {}
        for level, alpha in zip(self.levels, self.keep, strict=True):
            count = max(min(least, count), math.floor(alpha * count + 1e-9))
            out[level] = count
        return out

    def _pruned(self, rows: Rows, aware: LatentValues | None) -> Candidates:
        wanted = int(rows.task.draw.samples.max())
        keep = self.schedule(self.n * wanted, wanted)
        with torch.no_grad():
            tree = roll(
                rows, self._kernel(rows.task), rows.enter(self.n * wanted), select=Top(keep),
                value=Verifier(rows, aware, self.combine == "ranks"), potential=Difference(1.0, lambda k: k in keep),
            )  # fmt: skip
            return finish(rows, tree)

    def _whole(self, rows: Rows) -> tuple[Candidates, list[Seen]]:
        """Roll candidates out, and look at what shows through at the levels of the schedule."""
        seen: list[Seen] = []
        look = Verifier(rows, blind=not self.distil.residual, seen=seen)
        levels = set(self.levels)
        with torch.no_grad():
            tree = roll(
                rows, self._kernel(rows.task), rows.enter(self.train * int(rows.task.draw.samples.max())), value=look,
                potential=Difference(0.0, lambda k: k in levels),
            )  # fmt: skip
            return finish(rows, tree), seen

    def _kernel(self, task: Task) -> Kernel:
        return EulerMaruyama() if self.noise == 0 else noisy_kernel(task.policy.process, self.noise)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for one reward and for several, and the demo's."""
        steps = FitOptions(steps=20, size=1)
        published = Distil(lr=3e-6, epochs=1, batch=100)
        return {
            "published": Preset(cls(distil=published), steps, note="FLUX, 20 steps, 2,000 TFLOPs. Not run here."),
            "published-multi": Preset(
                cls(levels=(4, 6, 11), keep=(0.4, 0.5, 0.6), combine="ranks", distil=published), steps,
                note="Three rewards by rank sum. Not run here.",
            ),
            "demo": Preset(
                cls(n=12, levels=(3, 6), keep=(0.5, 0.5)), FitOptions(steps=10, size=4), guidance=False, note="shapes."
            ),
        }  # fmt: skip
