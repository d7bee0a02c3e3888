"""IPRO: identity-preserving image-to-video by reward gradients through the last steps, with a KL at each (2510.14255).

    L = -mean r(x0(θ)) + β Σ_k KL( p_θ(x_{k+1} | x_k) ‖ p_ref(x_{k+1} | x_k) )      k: the last ``depth`` steps

The KL is that of the sampler's own Gaussian steps, in nats, at the visited states; a step without noise has no density,
so where ``noise`` is 0 the mean squared velocity gap takes its place. The reward compares with a *pool* of features of
the person at several angles (:class:`flowalign.rewards.face.FaceIdentity`); users of the method standardise it with
mean .54 and std .16 and weigh it by .1: ``--reward "z(face):0.1"`` by a file of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo
from flowalign.methods.base import Preset, Training
from flowalign.objectives.backprop import Backprop
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe
from flowalign.rollout import Tape

__all__ = ["IPRO"]


@dataclass(frozen=True)
class IPRO(Training):
    """IPRO.

    Attributes:
        depth: last steps with gradients.
        kl: β.
        noise: level a of the Flow-GRPO law while sampling; 0 for the ODE.
        ceiling: reward above which a sample gives no gradient; none for none.
        checkpoint: recompute activations in the backward pass.
    """

    name: ClassVar[str] = "ipro"
    summary: ClassVar[str] = "reward gradients through the last steps, held by the KL of each step to the base"
    reference: ClassVar[str] = """@article{ipro2025,
  title={Identity-Preserving Image-to-Video Generation via Reward-Guided Optimization},
  journal={arXiv preprint arXiv:2510.14255}, year={2025}}"""

    depth: int = 3
    kl: float = 0.01
    noise: float = 0.3
    ceiling: float | None = None
    checkpoint: bool = True

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices.

        Raises:
            ValueError: for a depth that does not fit, or a negative weight.
        """
        steps = len(times) - 1
        if not 1 <= self.depth <= steps or self.kl < 0 or self.noise < 0:
            raise ValueError(
                f"depth must lie in 1 to {steps} for {steps} sampling steps, kl and noise must not be negative; got "
                f"{self.depth}, {self.kl} and {self.noise}."
            )
        kernel = EulerMaruyama(FlowGrpo(self.noise)) if self.noise else EulerMaruyama()
        return Recipe(
            kernel, Backprop(self.ceiling, self.kl, kernel if self.noise else None), credit=None, keep=bool(self.kl),
            tape=lambda i: Tape(steps - self.depth, self.checkpoint),
        )  # fmt: skip

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return settings for Wan2.2 image-to-video, and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(iterations=500, groups=8, size=1, steps=20, batch=1, accumulate=0, lr=1e-5),
                Lora(rank=32, alpha=64),
                note="Wan2.2-I2V; last steps and a KL are the paper's, the constants are ours: its code is not public. "
                "Not run here.",
            ),
            "demo": Preset(
                cls(kl=1e-3),
                FitOptions(iterations=200, groups=4, size=8, steps=10, batch=32, accumulate=0, lr=2e-4,
                           weight_decay=0.0),
                None,
                guidance=False,
                note="shapes with shapes-clip.",
            ),
        }  # fmt: skip
