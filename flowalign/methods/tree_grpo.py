"""Trees with shared prefixes: BranchGRPO (2509.06040), TreeGRPO (2512.08153), Dynamic-TreeRPO with LayerTuning-RL.

A few roots per prompt split at chosen levels; the prefix of a subtree is computed once. A node's value is the mean over
its leaves (or their mean by likelihood, ``backup = "probability"``), its advantage is normalised within its depth, and
a step is credited with the node it leads to. Options add the relatives' parts:

    window        noise and splits inside a window only, the ODE elsewhere                     TreeGRPO, Branch-Mix
    growth        noise level a (1 + growth · depth/steps): deeper layers explore more         Dynamic-TreeRPO, eq. 6
    reach         clip range ε (1 + reach · min(|A|, 1))                                       Dynamic-TreeRPO, eq. 11
    supervised    + λ σ(-A) ‖x̂0 - x0_best‖²: the best leaf of the group as a teacher           LayerTuning-RL, eq. 13
    prune_width   train only what leads to the best leaf below each last split, or to          BranchGRPO
                  the best and worst leaves of each group; advantages are those of the whole tree
    prune_depth   leave a window of depths out of the update; it slides towards the noise      BranchGRPO

What is pruned has been sampled and judged, and costs no network evaluation and gives no gradient in the update. The
code of BranchGRPO multiplies the noise of a split by 4 and forgets it in the density; here both are the kernel's. The
exact constants of Dynamic-TreeRPO's eqs. 6, 11 and 13 are not public; the forms here are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.credit import Tree
from flowalign.kernels import EulerMaruyama, Kernel, Windowed
from flowalign.laws import Constant, NoiseLaw, Table
from flowalign.methods.base import Preset, Training, levels_between
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.recipe import Recipe, always
from flowalign.selection import Branch
from flowalign.thinning import Thin, best_siblings, chain, extremes, pruned, with_best
from flowalign.windows import LeftOut

__all__ = ["TreeGRPO"]


@dataclass(frozen=True)
class TreeGRPO(Training):
    """Policy gradient on trees with shared prefixes.

    Attributes:
        eta: noise level of the constant law.
        splits: levels at which every node splits.
        width: children at a split.
        window: first and last (exclusive) stochastic step; none for all but the last.
        growth: rise of the noise level with depth.
        backup: mean of the leaves, or siblings weighted by the softmax of their log-densities (probability).
        clip: range of the per-dimension ratio.
        reach: widening of the clip range with the advantage.
        supervised: weight of the pull towards the best leaf.
        prune_width: none; best, of the siblings of each last split; extremes, of each group.
        keep: leaves kept at either end of a group (``prune_width = extremes``).
        prune_depth: first and last (exclusive) level left out of the update at first; none for no pruning.
        prune_period: iterations after which the pruned levels move one towards the noise, until the last split.
    """

    name: ClassVar[str] = "tree-grpo"
    summary: ClassVar[str] = "trees with shared prefixes, advantages per depth (BranchGRPO, TreeGRPO, Dynamic-TreeRPO)"
    reference: ClassVar[str] = """@article{li2025branchgrpo,
  title={{BranchGRPO}: Stable and Efficient {GRPO} with Structured Branching in Diffusion Models},
  author={Li, Yuming and others}, journal={arXiv preprint arXiv:2509.06040}, year={2025}}"""

    eta: float = 0.3
    splits: tuple[int, ...] = (0, 3, 6, 9)
    width: int = 2
    window: tuple[int, int] | None = None
    growth: float = 0.0
    backup: Literal["mean", "probability"] = "mean"
    clip: float = 1e-3
    reach: float = 0.0
    supervised: float = 0.0
    prune_width: Literal["none", "best", "extremes"] = "none"
    keep: int = 2
    prune_depth: tuple[int, int] | None = None
    prune_period: int = 30

    def recipe(self, times: Tensor) -> Recipe:
        """Return the choices.

        Raises:
            ValueError: for splits outside the sampler, or where no noise is drawn; for depths that it does not have.
        """
        steps = len(times) - 1
        first, last = self.window or (0, max(steps - 1, 1))
        outside = [k for k in self.splits if not first <= k < last]
        if outside or not self.splits:
            raise ValueError(
                f"splits must lie at stochastic steps {first} to {last - 1} of this sampler; got {list(self.splits)}: "
                "children of a deterministic step would be copies."
            )
        inside = levels_between(times, first, last)
        kernel: Kernel = Windowed(EulerMaruyama(self._law(times)), inside)
        depths = None
        if self.prune_depth is not None:
            depths = LeftOut(times, *self.prune_depth, period=self.prune_period, stop=max(self.splits))
        leaves = prod([self.width] * len(self.splits))
        return Recipe(
            kernel,
            Clip(kernel, self.clip, reach=self.reach, supervised=self.supervised),
            credit=Tree(how=self.backup),
            select=Branch(dict.fromkeys(self.splits, self.width)),
            roots=lambda n: max(1, n // leaves),
            trained=always if depths is None else depths.trained,
            thin=self._thin(),
            learners=() if depths is None else (depths,),
        )

    def _thin(self) -> Thin:
        if self.prune_width == "extremes" and self.keep < 1:
            raise ValueError(f"width pruning keeps at least one leaf at either end; got keep = {self.keep}.")
        rule = {"none": [], "best": [pruned(best_siblings)], "extremes": [extremes(self.keep, self.keep)]}
        return chain(*rule[self.prune_width], *([with_best] if self.supervised else []))

    def _law(self, times: Tensor) -> NoiseLaw:
        if not self.growth:
            return Constant(self.eta)
        steps = len(times) - 1
        return Table(
            torch.as_tensor(times)[:-1], self.eta * (1 + self.growth * torch.arange(steps) / max(steps - 1, 1))
        )

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings (BranchGRPO; a Dynamic-TreeRPO in kind), and the demo's."""
        return {
            "published": Preset(
                cls(),
                FitOptions(iterations=300, groups=16, size=16, steps=20, batch=1, accumulate=0, lr=1e-5),
                None,
                note="BranchGRPO, FLUX.1-dev, binary splits at 0, 3, 6, 9 of 20. Not run here.",
            ),
            "published-pruned": Preset(
                cls(prune_width="best", prune_depth=(15, 19)),
                FitOptions(iterations=300, groups=16, size=16, steps=20, batch=1, accumulate=0, lr=1e-5),
                None,
                note="BranchGRPO with both prunings: best leaf per last split; depths 15-18, sliding every 30. Not run "
                "here.",
            ),
            "published-mix": Preset(
                cls(splits=(0, 1, 2, 3), window=(0, 4)),
                FitOptions(iterations=300, groups=16, size=16, steps=20, batch=1, accumulate=0, lr=1e-5),
                None,
                note="Branch-Mix, and TreeGRPO in kind (with backup=probability): splits and noise in a window of four "
                "steps, the ODE after it. Not run here.",
            ),
            "published-dynamic": Preset(
                cls(splits=(0, 1, 2, 3), window=(0, 4), growth=1.0, reach=1.0, supervised=0.1),
                FitOptions(iterations=300, groups=16, size=16, steps=25, batch=1, accumulate=0, lr=1e-5),
                None,
                note="Dynamic-TreeRPO in kind: depth 4 in a window, noise by layer, LayerTuning. Not run here.",
            ),
            "demo": Preset(
                cls(eta=0.5, splits=(0, 1, 2, 3)),
                FitOptions(iterations=400, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0),
                None,
                guidance=False,
                note="shapes: all weights.",
            ),
        }
