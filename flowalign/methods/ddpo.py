"""DDPO: policy gradient on the DDIM chain of a diffusion model (Black et al. 2305.13301).

    x_s ~ N( DDIM mean, η² σ̃² ),  η = 1      A = (r - mean_prompt) / (std_prompt + 1e-6), clamped to ±10

Mean and standard deviation are those of the prompt's last 16 rewards, whatever iteration they came from; a prompt with
fewer is compared with the batch. Every step of the chain that draws noise is trained. Where data time is clean (a flow)
σ̃ of the last step is 0; Stable Diffusion's last step ends at ᾱ = .99915, keeps a noise of std .02, and is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flowalign.credit import Credit, Levels
from flowalign.experience import Experience
from flowalign.kernels import Ancestral
from flowalign.laws import Ddim
from flowalign.methods.base import Preset, Training
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.prepare import Lora
from flowalign.recipe import Recipe

__all__ = ["DDPO", "History"]


class History(Credit):
    """Advantages against each prompt's own recent rewards, a named state.

    Args:
        size: rewards remembered per prompt.
        least: below so many the batch's statistics are used.
        clamp: bound of the advantage.
    """

    def __init__(self, size: int = 16, least: int = 16, clamp: float = 10.0) -> None:
        self.size, self.least, self.clamp = size, least, clamp
        self.seen: dict[str, list[float]] = {}

    def __call__(self, experience: Experience) -> Levels:
        """Remember the rewards, then compare each with its prompt's."""
        e, leaves = experience, experience.trajectory.leaves
        total = e.total.detach().double().cpu()
        prompts = [e.cond.prompts[r] for r in leaves.row.tolist()]
        for p, r in zip(prompts, total.tolist(), strict=True):
            self.seen[p] = [*self.seen.get(p, []), r][-self.size :]
        mean, std = [], []
        for p in prompts:
            known = torch.tensor(self.seen[p]) if len(self.seen[p]) >= self.least else total
            mean.append(known.double().mean())
            std.append(known.double().std(correction=0))
        a = (total - torch.stack(mean)) / (torch.stack(std) + 1e-6)
        return e.trajectory.backup(a.clamp(-self.clamp, self.clamp).to(e.total))

    def state_dict(self) -> dict[str, Any]:
        """Return the rewards remembered."""
        return {"seen": {k: list(v) for k, v in self.seen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.seen = {k: list(v) for k, v in state["seen"].items()}


@dataclass(frozen=True)
class DDPO(Training):
    """DDPO.

    Attributes:
        eta: noise of the DDIM step; 1 is DDPM's.
        clip: range of the per-dimension ratio.
        buffer: rewards remembered per prompt.
        least: below so many the batch's statistics are used.
    """

    name: ClassVar[str] = "ddpo"
    summary: ClassVar[str] = "clipped policy gradient on the DDIM chain, advantages against the prompt's history"
    reference: ClassVar[str] = """@inproceedings{black2024ddpo,
  title={Training Diffusion Models with Reinforcement Learning},
  author={Black, Kevin and Janner, Michael and Du, Yilun and Kostrikov, Ilya and Levine, Sergey},
  booktitle={International Conference on Learning Representations}, year={2024}, note={arXiv:2305.13301}}"""

    eta: float = 1.0
    clip: float = 1e-4
    buffer: int = 16
    least: int = 16

    def recipe(self, times: torch.Tensor) -> Recipe:
        """Return the choices."""
        kernel = Ancestral(Ddim(self.eta))
        return Recipe(kernel, Clip(kernel, self.clip), credit=History(self.buffer, self.least))

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings for SD 1.4, and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(iterations=100, groups=256, size=1, steps=50, batch=8, accumulate=800, lr=3e-4),
                Lora(rank=4, alpha=4),
                ema=None,
                note="SD 1.4, 50 DDIM steps, guidance 5, 256 samples an epoch. Not run here.",
            ),
            "demo": Preset(
                cls(clip=1e-3, least=8),
                FitOptions(iterations=200, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes-vp: all weights.",
            ),
        }
