"""Golden noise: a small network that turns a noise and a prompt into a better noise (NPNet, Zhou et al. 2411.09502).

    collect   z → one step down under guidance → back up without it: z' has taken in what the guidance knows of the
              prompt; the pair (z, z') is kept where the sample of z' has the greater reward
    train     min_f E | f(z, prompt) - z' |²
    apply     f(z, prompt) in place of z, from then on one small forward pass per sample

    x_s = α_s x̂0 + σ_s ε̂ (guided, at x_t),   x_t' = α_t x̂0 + σ_t ε̂ (unguided, at x_s)

The network and its training are in :mod:`flowalign.methods.golden_net`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowalign.gaussian import per_sample
from flowalign.methods.base import Candidates, Preset, Steering, Task
from flowalign.methods.golden_net import GoldenNet, Pairs, Refine, fit_pairs
from flowalign.methods.noise_search import play
from flowalign.methods.particles import Rows, rows_of
from flowalign.noise import START, Noise, mix
from flowalign.options import FitOptions
from flowalign.protocols import Condition
from flowalign.trajectory import ranks

__all__ = ["GoldenNoise", "collect", "fresh", "golden"]


@runtime_checkable
class Guided(Condition, Protocol):
    """A condition whose guidance can be switched off."""

    @property
    def guided(self) -> bool:
        """Whether the guidance rule is on."""
        ...

    def bare(self) -> Condition:
        """Return the same rows without guidance."""
        ...


@torch.no_grad()
def golden(rows: Rows, z: Tensor, row: Tensor) -> Tensor:
    """Return noises ``z (N, *shape)`` after one guided step down and one unguided step back up: two evaluations.

    Raises:
        ValueError: where there is no guidance to take in.
    """
    task, cond = rows.task, rows.cond[row]
    if not isinstance(cond, Guided) or not cond.guided:
        raise ValueError(
            "golden noise is what guidance tells a noise, and this pipeline has none switched on: set --guidance and a "
            "--call guidance_scale above 1, or give a trained network."
        )
    t, s = (float(v) for v in task.times[:2])
    x = task.pipeline.start(z, t, cond)

    def moved(x: Tensor, a: float, b: float, cond: Condition) -> Tensor:
        known = task.policy.posterior(x, a, cond)
        alpha, sigma = (per_sample(v, known.x0) for v in task.policy.process(b))
        return alpha * known.x0 + sigma * known.eps

    x = moved(moved(x, t, s, cond), s, t, cond.bare())
    zero = task.pipeline.start(torch.zeros_like(z), t, cond)  # the start is affine in the noise
    slope = task.pipeline.start(torch.ones_like(z), t, cond) - zero
    return ((x - zero) / slope).to(z)


def collect(rows: Rows, n: int, seed: int) -> tuple[Pairs, Candidates]:
    """Return ``n`` pairs for each row, kept or not, and the samples of both noises.

    Args:
        rows: prompts.
        n: per row.
        seed: of the noises.
    """
    z, row = fresh(rows, n, seed)
    better = golden(rows, z, row)
    both = play(rows, torch.cat([z, better]), torch.cat([row, row]))
    before, after = both.total.chunk(2)
    prompts = [rows.task.draw.prompts[p] for p in rows.prompt[row].tolist()]
    return Pairs(z, better, prompts, (after - before).cpu()), both


def fresh(rows: Rows, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ``n`` standard normals for each row, and the row of each."""
    row = torch.arange(len(rows.prompt)).repeat_interleave(n)
    shape = rows.task.pipeline.shape(rows.task.judge.cond)
    return Noise(seed, rows.noise.keys).normal(START, row, ranks(row), shape), row


@dataclass(frozen=True)
class GoldenNoise(Steering):
    """Golden noise.

    Attributes:
        n: candidates per wanted result, each from a refined noise.
        network: file of a trained network; "" to train one here.
        pairs: collected per prompt to train on; their samples are candidates too, and paid for.
        margin: least gain in reward of a pair that is kept.
        save: where to write what was trained; "" for nowhere.
        train: how.
    """

    name: ClassVar[str] = "golden-noise"
    summary: ClassVar[str] = "a small network that maps noise and prompt to better noise (NPNet)"
    reference: ClassVar[str] = """@article{zhou2024golden,
  title={Golden Noise for Diffusion Models: A Learning Framework},
  author={Zhou, Zikai and Shao, Shitong and Bai, Lichen and Xu, Zhiqiang and Han, Bo and Xie, Zeke},
  journal={arXiv preprint arXiv:2411.09502}, year={2024}}"""

    n: int = 4
    network: str = ""
    pairs: int = 16
    margin: float = 0.0
    save: str = ""
    train: Refine = field(default_factory=Refine)

    def __post_init__(self) -> None:
        if self.n < 1 or self.pairs < 1 or self.margin < 0:
            raise ValueError(f"need n >= 1, pairs >= 1, margin >= 0; got {self.n}, {self.pairs}, {self.margin}.")

    def search(self, task: Task) -> Iterator[Candidates]:
        """Yield the samples of the pairs, where a network is trained, then those of refined noises."""
        rows = rows_of(task, per_sample=False)
        if self.network:
            net = GoldenNet.load(Path(self.network))
        else:
            pairs, found = collect(rows, self.pairs, mix(task.seed, 31))
            yield found
            net = fit_pairs(pairs[(pairs.gain > self.margin).nonzero().flatten()], self.train, task.seed)
            if self.save:
                net.save(Path(self.save))
        z, row = fresh(rows, self.n * int(task.draw.samples.max()), mix(task.seed, 32))
        yield play(rows, net.refine(z, [task.draw.prompts[p] for p in rows.prompt[row].tolist()]), row)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published way to collect, and the demo's."""
        return {
            "published": Preset(
                cls(1, pairs=1000, train=Refine(128, 1e-4, 30, 64)), FitOptions(steps=50, size=1),
                note="SDXL, collected at CFG 5.5 (set it by --call), HPS v2.1 gains, 100,000 pairs. Not run here.",
            ),
            "demo": Preset(cls(), FitOptions(steps=10, size=4), guidance=True, note="shapes with guidance_scale 3."),
        }  # fmt: skip
