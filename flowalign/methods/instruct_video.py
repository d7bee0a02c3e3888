"""InstructVideo: reward fine-tuning as editing, over the part of the chain that an edit takes (Yuan et al. 2312.12490).

    x_t* = α x0 + σ ε at t* = strength,   the sampler's remaining steps to data,   gradient through the last ``depth``

Starting from a finished video (the data's, or the policy's own) costs a part of the chain in place of all of it and
keeps what is judged near what it was. Image rewards see a few frames of it: segmental and temporally attenuated
(:class:`flowalign.rewards.frames.FrameReward`, e.g. ``--reward frames``). Nothing here is about video alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowalign.collect import Collector
from flowalign.growth import Clean, Growth, clean_states, cut, fresh_noise, judged
from flowalign.kernels import Ancestral, EulerMaruyama, Kernel
from flowalign.laws import Ddim
from flowalign.methods.base import Preset, Training
from flowalign.noise import Noise, mix
from flowalign.objectives.backprop import Backprop, Grown
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe
from flowalign.rollout import Tape, rollout
from flowalign.scorer import Bound
from flowalign.source import Draw
from flowalign.trajectory import Nodes

__all__ = ["InstructVideo", "Partial"]


class Partial(Growth):
    """Grows edits: a clean sample is noised to ``strength`` and brought back.

    Args:
        strength: time to which it is noised; the grid's last time not below it.
        depth: last steps with a graph.
        start: whose samples are edited.
    """

    def __init__(self, strength: float, depth: int, start: Clean) -> None:
        self.strength, self.depth, self.start = strength, depth, start

    def __call__(self, collector: Collector, draw: Draw, judge: Bound, iteration: int, tape: Tape) -> Grown:
        """Return the edits with their rewards."""
        policy, recipe = collector.policy, collector.recipe
        times = cut(recipe.grid(collector.pipeline.times(collector.steps)), self.strength)
        x0, row = clean_states(collector, draw, judge, iteration, self.start)
        noise = fresh_noise(collector, draw, iteration, 31, row, x0)
        x = policy.process.diffuse(x0, float(times[0]), noise)
        first = max(0, len(times) - 1 - self.depth)
        tree = rollout(
            policy, recipe.kernel, times, Nodes.enter(x, row), judge.cond, n_rows=len(draw.prompts),
            noise=Noise(mix(collector.seed, iteration, 32), draw.keys), tape=Tape(first, tape.checkpoint),
            keep=recipe.keep,
        )  # fmt: skip
        return Grown(tree, *judged(collector, judge, tree.leaves.x, row))


@dataclass(frozen=True)
class InstructVideo(Training):
    """InstructVideo.

    Attributes:
        strength: time to which samples are noised, in (0, 1): .6 of the chain is then taken again.
        depth: last steps with gradients.
        eta: noise of the sampler; 0 is deterministic.
        start: what is edited: data (each prompt's meta["media"]; published), or the policy's own samples.
        ceiling: reward above which a sample gives no gradient; none for none.
        kl: weight of the mean squared velocity gap to the base at the taped states.
        checkpoint: recompute activations in the backward pass.
    """

    name: ClassVar[str] = "instruct-video"
    summary: ClassVar[str] = "reward gradients through a partial chain: noise a video part of the way and bring it back"
    reference: ClassVar[str] = """@inproceedings{yuan2024instructvideo,
  title={{InstructVideo}: Instructing Video Diffusion Models with Human Feedback},
  author={Yuan, Hangjie and Zhang, Shiwei and Wang, Xiang and Wei, Yujie and Feng, Tao and Pan, Yining and
          Zhang, Yingya and Liu, Ziwei and Albanie, Samuel and Ni, Dong},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition}, year={2024}, note={arXiv:2312.12490}}"""

    strength: float = 0.6
    depth: int = 1
    eta: float = 0.0
    start: Clean = "samples"
    ceiling: float | None = None
    kl: float = 0.0
    checkpoint: bool = True

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices.

        Raises:
            ValueError: for a strength that leaves no step, or more gradient than there are steps.
        """
        left = len(cut(times, self.strength)) - 1
        if not 1 <= self.depth <= left or not 0 < self.strength < 1:
            raise ValueError(
                f"strength must lie in (0, 1) and depth in 1 to {left}, the steps that strength {self.strength} leaves "
                f"of {len(times) - 1}; got {self.strength} and {self.depth}."
            )
        kernel: Kernel = Ancestral(Ddim(self.eta)) if self.eta else EulerMaruyama()
        return Recipe(
            kernel, Backprop(self.ceiling, self.kl), credit=None, keep=bool(self.kl),
            growth=Partial(self.strength, self.depth, self.start), tape=lambda i: Tape(0, self.checkpoint),
        )  # fmt: skip

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings (ModelScope text-to-video), and the demo's."""
        return {
            "published": Preset(
                cls(start="data", ceiling=1.0),
                FitOptions(iterations=20_000, groups=4, size=1, steps=20, batch=1, accumulate=0, lr=1e-5),
                Lora(rank=4, alpha=4),
                note="HPSv2 on 4 of 16 frames, λ = 1 (reward frames); iterations and rank are ours. Not run here.",
            ),
            "demo": Preset(
                cls(depth=3),
                FitOptions(iterations=200, groups=4, size=8, steps=10, batch=32, accumulate=0, lr=2e-4,
                           weight_decay=0.0),
                None,
                guidance=False,
                note="shapes with shapes-clip; a video world with frames(shapes-clip).",
            ),
        }  # fmt: skip
