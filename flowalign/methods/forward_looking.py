"""Forward-looking balance: flow-network training with credit for each step (Pan et al. 2302.01687; 2405.20971).

Trajectory balance learns what a whole chain was worth; here the reward of the posterior mean on the way says what each
few steps were worth, and a learned residual flow what that gets wrong; see :mod:`flowalign.objectives.local`. No
gradient of sampler or reward. ``span`` as long as the chain is relative trajectory balance (``rtb``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo, Memoryless
from flowalign.lookahead import LookAhead, PromptedFlow
from flowalign.methods.base import Preset, Training
from flowalign.objectives.local import LocalBalance
from flowalign.options import FitOptions
from flowalign.recipe import Recipe

__all__ = ["ForwardLooking"]


@dataclass(frozen=True)
class ForwardLooking(Training):
    """Forward-looking balance.

    Attributes:
        scale: λ, reward in log units.
        span: steps of a window; 1 is detailed balance.
        power: the look-ahead counts as α^power on the way.
        log_z: vargrad (mean imbalance of each prompt's windows at the start) or learned.
        flow: whether a residual flow is learned.
        width: of its network.
        memoryless: sample with the memoryless law.
        noise: level a of the Flow-GRPO law otherwise.
    """

    name: ClassVar[str] = "forward-looking"
    summary: ClassVar[str] = "flow-network balance with local credit: what a state promises, step by step"
    reference: ClassVar[str] = """@inproceedings{pan2023better,
  title={Better Training of {GFlowNets} with Local Credit and Incomplete Trajectories},
  author={Pan, Ling and Malkin, Nikolay and Zhang, Dinghuai and Bengio, Yoshua},
  booktitle={International Conference on Machine Learning}, year={2023}, note={arXiv:2302.01687}}"""

    scale: float = 10.0
    span: int = 1
    power: float = 2.0
    log_z: Literal["vargrad", "learned"] = "vargrad"
    flow: bool = True
    width: int = 32
    memoryless: bool = True
    noise: float = 0.7

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices."""
        kernel = EulerMaruyama(Memoryless() if self.memoryless else FlowGrpo(self.noise))
        flow = (lambda shape: PromptedFlow(shape, self.width)) if self.flow else None
        return Recipe(
            kernel,
            LocalBalance(kernel, self.span, self.log_z, flow),
            credit=LookAhead(self.scale, self.power),
            keep=True,
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return settings in the manner of the papers, which have no image generators, and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(iterations=1000, groups=8, size=8, steps=50, batch=8, accumulate=0, lr=1e-5),
                note="The loss is the paper's, for discrete objects; the constants are ours. Not run here.",
            ),
            "demo": Preset(
                cls(scale=5.0),
                FitOptions(
                    iterations=200, groups=8, size=16, steps=10, batch=16, lr=1e-4, lr_objective=1e-3, weight_decay=0.0
                ),
                None,
                guidance=False,
                note="shapes.",
            ),
        }
