"""B²-DiffuRL: backward progressive training on branched samples (Hu et al. 2503.11240).

Train the last steps of the chain first and let the trained tail grow towards the noise; at the start of the tail every
sample branches into siblings that share their past, so their rewards differ by the tail alone.

    z = (r - mean_prompt) / (std_prompt + 1e-8),  unbiased std          A = clamp(z, ±5)

Mean and deviation are those of the prompt's own rewards in this iteration and the 8 before. Of the siblings the best is
trained if z ≥ .5 and the worst if z < -.5; the others are sampled, judged and dropped. The advantage is z itself, as in
the authors' code (``run_select.py``, ``run_train.py``): siblings choose who is trained, not how much.
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
from flowalign.thinning import credited
from flowalign.windows import BranchAt, Growing

__all__ = ["B2DiffuRL", "Siblings"]

F64 = torch.float64


class Siblings(Credit):
    """Advantages of the best and the worst of each branch, against their prompt's recent rewards.

    The best sibling is pulled up and the worst pushed down, each only if it stands out; all others get exactly 0.

    Args:
        window: the tail; its first level is where siblings part.
        margin: standard deviations by which best and worst must stand out from the prompt's recent mean.
        memory: iterations before this one that the mean and deviation remember.
        clamp: bound of the advantage.
    """

    def __init__(self, window: Growing, margin: float = 0.5, memory: int = 8, clamp: float = 5.0) -> None:
        self.window, self.margin, self.memory, self.clamp = window, margin, memory, clamp
        self.recent: list[dict[str, list[float]]] = []  # of each iteration remembered, the rewards by prompt

    def __call__(self, experience: Experience) -> Levels:
        """Credit the tail's steps."""
        tree = experience.trajectory
        z = self._standing(experience)
        parent = tree.lineage()[self.window.bounds[0]]
        out = torch.zeros_like(z)
        for b in parent.unique().tolist():
            members = (parent == b).nonzero().flatten()
            best, worst = members[z[members].argmax()], members[z[members].argmin()]
            if z[best] >= self.margin:
                out[best] = z[best]
            if z[worst] < -self.margin:
                out[worst] = z[worst]
        return tree.backup(out.clamp(-self.clamp, self.clamp).to(experience.total))

    def _standing(self, e: Experience) -> Tensor:
        """Return each leaf's z ``(N_leaves,)``, float64 on the CPU, and remember this iteration's rewards."""
        total = e.total.detach().double().cpu()
        prompts = [e.cond.prompts[r] for r in e.trajectory.leaves.row.tolist()]
        now: dict[str, list[float]] = {}
        for prompt, r in zip(prompts, total.tolist(), strict=True):
            now.setdefault(prompt, []).append(r)
        known = {p: torch.tensor([r for it in (*self.recent, now) for r in it.get(p, [])], dtype=F64) for p in now}
        self.recent = [*self.recent, now][-self.memory :] if self.memory else []
        mean, std = (torch.stack([f(known[p]) for p in prompts]) for f in (torch.mean, torch.std))
        return (total - mean) / (std + 1e-8)

    def state_dict(self) -> dict[str, Any]:
        """Return the recent rewards."""
        return {"recent": [{p: list(r) for p, r in it.items()} for it in self.recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.recent = [{p: list(r) for p, r in it.items()} for it in state["recent"]]


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
        """Return the choices: every step of the tail that draws noise is trained, on the chosen siblings alone."""
        steps = len(times) - 1
        window = Growing(times, max(1, round(self.low * steps)), max(1, round(self.high * steps)), self.stages)
        kernel = Ancestral(Ddim(self.eta))
        return Recipe(
            kernel,
            Clip(kernel, self.clip),
            credit=Siblings(window, self.margin),
            select=BranchAt(window, self.width),
            roots=lambda n: max(1, n // self.width),
            trained=window.trained,
            thin=credited,
            uneven=True,
            learners=(window,),
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for SD 1.5, and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(
                    iterations=100, groups=256, size=5, steps=20, updates=2, batch=2, accumulate=64 * 17, lr=1e-4
                ),
                Lora(rank=4, alpha=4),
                note="SD 1.4, 20 DDIM steps, guidance 5; a stage has 256 starts of 5 siblings each and is trained on "
                "twice. An optimiser step there takes 128 samples with all their 14 to 20 trained steps, here as many "
                "transitions as with 17. Not run here.",
            ),
            "demo": Preset(
                cls(width=4, clip=1e-2, stages=40),
                FitOptions(iterations=200, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes-vp: all weights.",
            ),
        }
