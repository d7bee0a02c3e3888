"""SRPO: Direct-Align's closed-form recovery under a relative reward (Shen et al. 2509.06942).

A finished sample x0 is noised with a *known* noise ε, the network takes one step, and what the noise did is taken back:

    x_t = α_t x0 + σ_t ε,    x_s = α_s x̂0_θ(x_t) + σ_s ε̂_θ(x_t),    x̂0 = (x_s - σ_s ε) / α_s

With the true ε̂ this returns x0 exactly from any t to any s, so early steps are trained as safely as late ones, by one
network call. The reward is relative: with the prompt worded in a wanted and an unwanted way, c⁺ and c⁻,

    denoising  s < t:   r = (1 + κ) r(x̂0, c⁺) - r(x̂0, c⁻)
    inversion  s > t:   r = (1 + κ) r(x̂0, c⁻) - r(x̂0, c⁺)       the same step upwards, where a pull at x̂0 moves the
                                                                velocity the other way: what both have in common cancels
    L = mean γ^j relu(τ - r)                                    j-th of several consecutive steps, from noise to data

κ runs linearly over the sampler's steps, for each branch by itself. A reward that does not read its prompt is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from flowalign.collect import Collector
from flowalign.growth import Clean, Growth, clean_states, ends, fresh_noise, judged, recovered
from flowalign.kernels import EulerMaruyama
from flowalign.methods.base import Preset, Training
from flowalign.noise import mix
from flowalign.objectives.backprop import Backprop, Grown
from flowalign.options import FitOptions
from flowalign.recipe import Recipe
from flowalign.rollout import Tape
from flowalign.scorer import Bound
from flowalign.source import Draw

__all__ = ["SRPO", "DirectAlign"]


class DirectAlign(Growth):
    """Grows recovered samples under the relative reward, one entry per step, branch and sample.

    Args:
        options: see :class:`SRPO`.
    """

    def __init__(self, options: SRPO) -> None:
        self.options = options

    def __call__(self, collector: Collector, draw: Draw, judge: Bound, iteration: int, tape: Tape) -> Grown:
        """Return them with their relative rewards, and the discount as their weight."""
        o = self.options
        grid = collector.recipe.grid(collector.pipeline.times(collector.steps)).tolist()
        x0, row = clean_states(collector, draw, judge, iteration, o.start)
        noise = fresh_noise(collector, draw, iteration, 21, row, x0)
        first = o.first(len(grid) - 1, mix(collector.seed, iteration, 22))
        xs, totals, weights = [], [], []
        with torch.enable_grad():
            for j, up in ((j, up) for j in range(o.count) for up in ((False, True) if o.inversion else (False,))):
                k = first + j
                t, s = (grid[k + 1], grid[k]) if up else (grid[k], grid[k + 1])
                x = recovered(collector.policy, x0, noise, t, s, judge.cond[row], checkpoint=tape.checkpoint)
                good, bad = self._both(collector, judge, x, row, mix(collector.seed, iteration, 23))
                low, high = o.pull if up else o.push
                kappa = low + (high - low) * k / max(len(grid) - 2, 1)
                xs.append(x)
                totals.append((1 + kappa) * bad - good if up else (1 + kappa) * good - bad)
                weights.append(torch.full_like(good.detach(), o.discount**j))
        total = torch.cat(totals)
        return Grown(ends(torch.cat(xs), row.repeat(len(xs))), {"relative": total}, total, torch.cat(weights))

    def _both(self, collector: Collector, judge: Bound, x: Tensor, row: Tensor, seed: int) -> list[Tensor]:
        """Return the rewards under the wanted and the unwanted wording, ``(N,)`` each.

        Raises:
            ValueError: if they are the same.
        """
        out = []
        for words in (self.options.positive, self.options.negative):
            prompts = [f"{words[seed % len(words)]} {p}".strip() for p in judge.prompts]
            out.append(judged(collector, replace(judge, prompts=prompts), x, row)[1])
        if torch.equal(out[0], out[1]):
            raise ValueError(
                f"the reward scores {self.options.positive} and {self.options.negative} before the prompt alike: it "
                "does not read the prompt, and there is nothing relative to learn. Take a text-image reward."
            )
        return out


@dataclass(frozen=True)
class SRPO(Training):
    """SRPO.

    Attributes:
        positive: wordings put before the prompt of the wanted reward, one drawn per iteration.
        negative: wordings of the unwanted one.
        push: κ of the denoising branch, at the first and at the last step of the sampler.
        pull: κ of the inversion branch.
        inversion: whether to take the step upwards as well.
        count: consecutive steps that are judged, each by one network call.
        discount: γ, by which a step counts less than the one before it (later steps are easier to hack).
        ceiling: τ, relative reward above which a sample gives no gradient; none for none.
        start: what is noised: the policy's own samples, or data (each prompt's meta["media"]).
        checkpoint: recompute activations in the backward pass.
    """

    name: ClassVar[str] = "srpo"
    summary: ClassVar[str] = "Direct-Align: one step from known noise, recovered in closed form; relative reward"
    reference: ClassVar[str] = """@article{shen2025srpo,
  title={Directly Aligning the Full Diffusion Trajectory with Fine-Grained Human Preference},
  author={Shen, Xiangwei and Li, Zhimin and Yang, Zhantao and Zhang, Shiyi and Zhang, Yingfang and Li, Donghao and
          Wang, Chunyu and Lu, Qinglin and Tang, Yansong},
  journal={arXiv preprint arXiv:2509.06942}, year={2025}}"""

    positive: tuple[str, ...] = ("Natural-lighting.", "Detail.", "Real.")
    negative: tuple[str, ...] = ("Painting.", "Anime.", "Oil.")
    push: tuple[float, float] = (0.1, 0.25)
    pull: tuple[float, float] = (0.3, 0.01)
    inversion: bool = True
    count: int = 1
    discount: float = 0.9
    ceiling: float | None = 0.7
    start: Clean = "samples"
    checkpoint: bool = True

    def first(self, steps: int, seed: int) -> int:
        """Return the step that an iteration begins with: any of which all that is asked for exists.

        The inversion branch goes neither from data time, where a network knows nothing of noise, nor to pure noise.
        """
        low, high = (1, steps - 1 - self.count) if self.inversion else (0, steps - self.count)
        return low + seed % (high - low + 1)

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices.

        Raises:
            ValueError: for more steps than the sampler has, a discount outside (0, 1], or no wording.
        """
        least = self.count + (2 if self.inversion else 0)
        if self.count < 1 or len(times) - 1 < least:
            raise ValueError(
                f"{self.count} judged steps {'and their inversions ' if self.inversion else ''}need at least {least} "
                f"sampling steps, and count at least 1; there are {len(times) - 1}."
            )
        if not 0 < self.discount <= 1 or not self.positive or not self.negative:
            raise ValueError(
                f"discount must lie in (0, 1] and both wordings be given; got {self.discount}, {self.positive} and "
                f"{self.negative}."
            )
        return Recipe(
            EulerMaruyama(), Backprop(self.ceiling), credit=None, growth=DirectAlign(self),
            tape=lambda i: Tape(0, self.checkpoint),
        )  # fmt: skip

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings (FLUX.1-dev), and the demo's."""
        return {
            "published": Preset(
                cls(), FitOptions(iterations=100, groups=32, size=1, steps=25, batch=1, accumulate=0, lr=5e-6,
                                  max_grad_norm=0.1), None, note="FLUX.1-dev 720 px, HPSv2.1. Not run here.",
            ),
            "demo": Preset(
                cls(positive=("",), negative=("four",), ceiling=None),
                FitOptions(iterations=200, groups=8, size=4, steps=10, batch=32, accumulate=0, lr=1e-4,
                           weight_decay=0.0), None, guidance=False, note="shapes with shapes-clip: few words.",
            ),
        }  # fmt: skip
