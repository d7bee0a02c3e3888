"""R0: a few-step generator from rewards and regularisers alone, without any distillation loss (Luo et al. 2503.13070).

    L = -mean r(x_θ(z)) + (w/2) mean ‖x_θ(z) - x_base(z)‖²/d       gradient through all of the few steps

x_θ(z) is the generator's sample from the noise z (all noises of the chain), x_base(z) what the weights that it began
with make of the same z in the same few steps: a proximal step in data space, so that the reward moves samples and the
regulariser holds the map from noise to data, hence the spread. For ``r = -q (x - a)²/2`` per coordinate the optimum is
``x = (w x_base + q a)/(w + q)``: the spread shrinks to w/(w + q), and to nothing without it. A further regulariser is
AdamW's weight decay with a LoRA, whose zero is the base.

No code is public; the paper says "generator parameterisation and proper regularisation". What stands here is our
reading of its search in data space, not a reproduction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flowalign.collect import Collector
from flowalign.growth import Growth, judged
from flowalign.kernels import Ancestral
from flowalign.laws import Ddim
from flowalign.methods.base import Preset, Training
from flowalign.objectives.backprop import Backprop, Grown
from flowalign.objectives.base import Losses, summary
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.prepare import Lora
from flowalign.recipe import Recipe
from flowalign.rollout import Tape
from flowalign.scorer import Bound
from flowalign.source import Draw

__all__ = ["R0", "Beside", "Held", "Proximal"]


@dataclass(frozen=True)
class Held(Grown):
    """Grown samples beside what the base makes of the same noise, ``base (N, *)``."""

    base: Tensor | None = None


class Beside(Growth):
    """Grows samples of the policy and of its base from the same noises."""

    def __call__(self, collector: Collector, draw: Draw, judge: Bound, iteration: int, tape: Tape) -> Held:
        """Return both; the policy's with a graph."""
        base = collector.sample(draw, judge, iteration, role="reference").leaves.x
        tree = collector.sample(draw, judge, iteration, tape)
        return Held(tree, *judged(collector, judge, tree.leaves.x, tree.leaves.row), base=base)


class Proximal(Backprop):
    """The reward loss, and how far samples have moved in data space.

    Args:
        hold: w.
        ceiling: reward above which a sample gives no gradient; None for none.
    """

    def __init__(self, hold: float, ceiling: float | None = None) -> None:
        super().__init__(ceiling)
        self.hold = hold

    @property
    def roles(self) -> tuple[str, ...]:
        """The reference."""
        return ("reference",)

    def forward(self, policy: Policy, batch: Grown, cond: Any = None) -> Losses:
        """Return both terms."""
        terms, metrics = super().forward(policy, batch, cond)
        assert isinstance(batch, Held) and batch.base is not None
        moved = ((batch.trajectory.leaves.x - batch.base) ** 2).mean()
        return Losses({**terms, "hold": 0.5 * self.hold * moved}, {**metrics, "moved": summary(moved.sqrt())})


@dataclass(frozen=True)
class R0(Training):
    """R0.

    Attributes:
        hold: w, weight of the squared distance to the base's sample of the same noise, a mean over coordinates.
        eta: fresh noise between the few steps: 0 the ODE, 1 DDPM's.
        ceiling: reward above which a sample gives no gradient; none for none.
        most: sampling steps above which this is no few-step generator.
        checkpoint: recompute activations in the backward pass.
    """

    name: ClassVar[str] = "r0"
    summary: ClassVar[str] = "few-step generator from rewards and regularisers alone, held in data space"
    reference: ClassVar[str] = """@article{luo2025r0,
  title={Rewards Are Enough for Fast Photo-Realistic Text-to-image Generation},
  author={Luo, Yihong and Hu, Tianyang and Luo, Weijian and Kawaguchi, Kenji and Tang, Jing},
  journal={arXiv preprint arXiv:2503.13070}, year={2025}}"""

    hold: float = 1.0
    eta: float = 1.0
    ceiling: float | None = None
    most: int = 8
    checkpoint: bool = True

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices.

        Raises:
            ValueError: for more steps than ``most``, or a negative weight.
        """
        if len(times) - 1 > self.most or self.hold < 0:
            raise ValueError(
                f"R0 trains a few-step generator through all of its steps: fit.steps must be at most {self.most} and "
                f"hold not negative; got {len(times) - 1} and {self.hold}. Lower fit.steps (published: 4)."
            )
        return Recipe(
            Ancestral(Ddim(self.eta)), Proximal(self.hold, self.ceiling), credit=None, growth=Beside(),
            tape=lambda i: Tape(0, self.checkpoint),
        )  # fmt: skip

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return settings for a 4-step SD3, and the demo's."""
        return {
            "published": Preset(
                cls(), FitOptions(iterations=5000, groups=32, size=1, steps=4, batch=4, accumulate=0, lr=1e-5),
                Lora(rank=32, alpha=64), note="Four steps are the paper's, the constants are ours. Not run here.",
            ),
            "demo": Preset(
                cls(), FitOptions(iterations=200, groups=4, size=8, steps=4, batch=32, accumulate=0, lr=2e-4,
                                  weight_decay=0.0), None, guidance=False, note="shapes-turbo with shapes-clip.",
            ),
        }  # fmt: skip
