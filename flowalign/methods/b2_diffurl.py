"""B²-DiffuRL: backward progressive training on branched samples (Hu et al. 2503.11240).

Train the last steps of the chain first and let the trained tail grow towards the noise; at the start of the tail every
sample branches into siblings that share their past, so their rewards differ by the tail alone. Of the siblings the best
and worst are trained, where they stand out by half a standard deviation of the recent rewards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowalign.credit import Credit, Levels
from flowalign.experience import Experience
from flowalign.kernels import Ancestral
from flowalign.laws import Ddim
from flowalign.methods.base import Preset, Training
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe
from flowalign.windows import BranchAt, Growing

__all__ = ["B2DiffuRL", "Siblings"]


class Siblings(Credit):
    """Advantages within a branch.

    The best sibling is pulled up and the worst pushed down; the rest, and branches that do not stand out, get nothing.

    Args:
        window: the tail; its first level is where siblings part.
        margin: standard deviations by which best and worst must stand out from the recent mean.
        memory: iterations that the mean and deviation remember.
    """

    def __init__(self, window: Growing, margin: float = 0.5, memory: int = 8) -> None:
        self.window, self.margin, self.memory = window, margin, memory
        self.recent: list[list[float]] = []

    def __call__(self, experience: Experience) -> Levels:
        """Credit the tail's steps."""
        e, tree = experience, experience.trajectory
        total = e.total.detach()
        self.recent = [*self.recent, total.double().cpu().tolist()][-self.memory :]
        known = torch.tensor([r for it in self.recent for r in it], dtype=torch.float64)
        z = ((total.double().cpu() - known.mean()) / (known.std(correction=0) + 1e-6)).to(total)
        parent = tree.lineage()[self.window.bounds[0]]
        out = torch.zeros_like(z)
        for b in parent.unique().tolist():
            members = (parent == b).nonzero().flatten().to(z.device)
            best, worst = members[z[members].argmax()], members[z[members].argmin()]
            centre = z[members].mean()
            if z[best] >= self.margin:
                out[best] = z[best] - centre
            if z[worst] <= -self.margin and worst != best:
                out[worst] = z[worst] - centre
        return tree.backup(out)

    def state_dict(self) -> dict[str, Any]:
        """Return the recent rewards."""
        return {"recent": [list(r) for r in self.recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.recent = [list(r) for r in state["recent"]]


@dataclass(frozen=True)
class B2DiffuRL(Training):
    """B²-DiffuRL.

    Attributes:
        eta: noise of the DDIM step.
        low: steps trained at first, as a fraction of all (published: 14 of 20).
        high: steps trained in the end.
        stages: iterations over which the tail grows.
        width: siblings per sample; the group size must be a multiple of it.
        margin: see :class:`Siblings`.
        clip: range of the per-dimension ratio.
    """

    name: ClassVar[str] = "b2-diffurl"
    summary: ClassVar[str] = "backward progressive training of the chain's tail on branched siblings"
    reference: ClassVar[str] = """@inproceedings{hu2025b2diffurl,
  title={Towards Better Alignment: Training Diffusion Models with Reinforcement Learning Against Sparse Rewards},
  author={Hu, Zijing and Zhang, Fengda and Chen, Long and Kuang, Kun and Li, Jiahui and Gao, Kaifeng and others},
  booktitle={Conference on Computer Vision and Pattern Recognition}, year={2025}, note={arXiv:2503.11240}}"""

    eta: float = 1.0
    low: float = 0.7
    high: float = 1.0
    stages: int = 100
    width: int = 5
    margin: float = 0.5
    clip: float = 0.1

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices; the step into clean data draws no noise, so it is sampled and not trained."""
        steps = len(times) - 1
        window = Growing(times, max(1, round(self.low * steps)), max(1, round(self.high * steps)), self.stages)
        kernel = Ancestral(Ddim(self.eta))
        return Recipe(
            kernel,
            Clip(kernel, self.clip),
            credit=Siblings(window, self.margin),
            select=BranchAt(window, self.width),
            roots=lambda n: max(1, n // self.width),
            trained=lambda level, t, s: s > 0 and window.trained(level, t, s),
            learners=(window,),
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for SD 1.5, and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(iterations=100, groups=32, size=5, steps=20, batch=4, accumulate=64, lr=1e-4),
                Lora(rank=4, alpha=4),
                note="SD 1.5, 20 DDIM steps, guidance 5. Not run here.",
            ),
            "demo": Preset(
                cls(width=4, clip=1e-2, stages=40),
                FitOptions(iterations=200, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes-vp: all weights.",
            ),
        }
