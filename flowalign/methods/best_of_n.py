"""Best of N: draw, judge, keep the best. The rival of every search at equal budget.

Each round draws a few fresh samples per prompt, so a budget may end the search at any time. The distribution of the
best of N is at most log N - (N - 1)/N nats from the base's (Stiennon et al. 2009.01325; Beirami et al. 2401.01879).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from flowalign.collect import enter
from flowalign.kernels import EulerMaruyama
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.noise import Noise, mix
from flowalign.options import FitOptions
from flowalign.rollout import rollout

__all__ = ["BestOfN"]


@dataclass(frozen=True)
class BestOfN(Steering):
    """Best of N.

    Attributes:
        n: candidates per result.
        per_round: candidates per prompt drawn at a time; the budget is looked at between rounds.
    """

    name: ClassVar[str] = "best-of-n"
    summary: ClassVar[str] = "draw N independent samples, keep the best"
    reference: ClassVar[str] = """@inproceedings{stiennon2020learning,
  title={Learning to Summarize with Human Feedback},
  author={Stiennon, Nisan and Ouyang, Long and Wu, Jeffrey and Ziegler, Daniel and Lowe, Ryan and Voss, Chelsea and
          Radford, Alec and Amodei, Dario and Christiano, Paul},
  booktitle={Advances in Neural Information Processing Systems}, year={2020}, note={arXiv:2009.01325}}"""

    n: int = 16
    per_round: int = 4

    def __post_init__(self) -> None:
        if self.n < 1 or self.per_round < 1:
            raise ValueError(f"n and per_round must be at least 1; got {self.n} and {self.per_round}.")

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield rounds of independent samples."""
        wanted = self.n * task.draw.samples
        done, number = torch.zeros_like(wanted), 0
        while (done < wanted).any():
            now = (wanted - done).clamp(max=self.per_round * task.draw.samples)
            row = torch.arange(len(now)).repeat_interleave(now)
            noise = Noise(mix(task.seed, number), task.draw.keys)
            with torch.no_grad():
                start = enter(task.pipeline, task.judge.cond, row, noise, float(task.times[0]))
                tree = rollout(
                    task.policy, EulerMaruyama(), task.times, start, task.judge.cond, noise=noise, n_rows=len(now)
                )
                leaves = tree.leaves
                rewards = task.judge(leaves.x, leaves.row)
                total = torch.stack([task.judge.scorer.weights[k] * r for k, r in rewards.items()]).sum(0)
            yield Candidates(leaves.x, leaves.row, rewards, total, torch.zeros(len(row)))
            done, number = done + now, number + 1

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return N = 16 at the pipeline's usual steps, and the demo's."""
        return {
            "published": Preset(cls(), FitOptions(steps=28, size=1), note="28 steps, 16 candidates per result."),
            "demo": Preset(
                cls(n=8), FitOptions(steps=10, size=4), guidance=False, note="shapes: 8 candidates, 10 steps."
            ),
        }
