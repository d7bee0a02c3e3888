"""Trees with shared prefixes: BranchGRPO (2509.06040), TreeGRPO (2512.08153), Dynamic-TreeRPO with LayerTuning-RL.

A few roots per prompt split at chosen levels; the prefix of a subtree is computed once. ``backup`` says what a step is
credited with:

    mean          the mean reward of the leaves below, normalised among the nodes of a depth         BranchGRPO
    probability   their mean by likelihood, normalised among the nodes of a depth                    BranchGRPO's option
    edges         the leaves' advantages in their group, backed up by likelihood, as they come out   TreeGRPO

Options add the relatives' parts:

    window        noise at the splits and inside a window, the ODE elsewhere               TreeGRPO, Branch-Mix
    slide         the window moves towards the data, with its splits and layers            Dynamic-TreeRPO
    growth        noise level a (1 + growth · layer/(layers - 1)): deeper layers explore   Dynamic-TreeRPO, eq. 6
                  more; a layer is what lies between two splits
    reach         clip range ε (1 + reach · min(|A|, 1))                                   Dynamic-TreeRPO, eq. 11
    supervised    + λ σ(-A) ‖x̂0 - x0_best‖² on the way to the best leaf of the group       LayerTuning-RL, eq. 13
    prune_width   train only what leads to the best leaf below each last split, or to      BranchGRPO
                  the best and worst leaves of each group; advantages are those of the whole tree
    prune_depth   leave a window of depths out of the update; it slides towards the noise  BranchGRPO

What is pruned has been sampled and judged, and costs no network evaluation and gives no gradient in the update. The
code of BranchGRPO draws the noise of a split 4 times as large as the density it is scored with. That is left out: such
a ratio is of no law that was sampled, and the states leave the marginals that the network knows. ``split_noise`` raises
the level of the law itself at the splits, drift and density with it. The window of Branch-Mix moves with the sampling
step and not with the iteration: the published interval of 30 leaves it at the first four steps. The exact constants of
Dynamic-TreeRPO's eqs. 6, 11 and 13 and the place of TreeGRPO's window are not public; the forms here are ours. λ was
chosen on the training rewards of 34 iterations of one seed of shapes: at .1 it outweighs the policy gradient, and the
pictures dissolve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.credit import Credit, Edges, Tree
from flowalign.kernels import EulerMaruyama, Windowed
from flowalign.laws import Constant, NoiseLaw
from flowalign.methods.base import Preset, Training
from flowalign.objectives.clip import Clip
from flowalign.options import FitOptions
from flowalign.process import Process, Time, as_time
from flowalign.recipe import Learner, Recipe, always
from flowalign.thinning import Thin, best_siblings, chain, compared, extremes, pruned, with_best
from flowalign.windows import BranchAt, LeftOut, Sliding, Window

__all__ = ["Layered", "TreeGRPO"]


class Layered(NoiseLaw):
    """``g = eta (1 + growth · layer/(layers - 1))``, times ``split_noise`` where the tree splits.

    Args:
        window: says where the tree is.
        splits: offsets of its splits from the window's first level; a layer reaches from one to before the next, the
            first one is layer 0, and so is what comes before it.
        eta: level of layer 0.
        growth: rise from the first layer to the last.
        split_noise: factor at a split.
    """

    def __init__(self, window: Window, splits: Sequence[int], eta: float, growth: float, split_noise: float) -> None:
        self.window, self.splits = window, tuple(sorted(splits))
        self.eta, self.growth, self.split_noise = eta, growth, split_noise

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        """Return the level at each t."""
        times = as_time(t)
        found = [self.at(self.window.level(v)) for v in times.reshape(-1).tolist()]
        return torch.tensor(found, dtype=times.dtype, device=times.device).reshape(times.shape)

    def at(self, level: int) -> float:
        """Return the noise of the step from a level."""
        offset = level - self.window.bounds[0]
        layer = max(0, sum(k <= offset for k in self.splits) - 1)
        grown = self.eta * (1 + self.growth * layer / max(1, len(self.splits) - 1))
        return grown * (self.split_noise if offset in self.splits else 1.0)


@dataclass(frozen=True)
class TreeGRPO(Training):
    """Policy gradient on trees with shared prefixes.

    Attributes:
        eta: noise level; with ``growth`` that of the first layer.
        splits: levels at which every node splits, and noise is drawn in any case; those of the window's first place.
        width: children at a split.
        window: first and last (exclusive) stochastic step, in its first place; none for all but the last.
        slide: iterations after which the window moves a step towards the data, until the last step but one, and then
            begins again; 0 for a window that stands still.
        growth: rise of the noise level from the first layer of the tree to the last.
        split_noise: factor of the noise level at the splits.
        backup: mean, probability, or edges: see the module.
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
  author={Li, Yuming and others}, journal={arXiv preprint arXiv:2509.06040}, year={2025}}
@article{ding2025treegrpo,
  title={{TreeGRPO}: Tree-Advantage {GRPO} for Online {RL} Post-Training of Diffusion Models},
  author={Ding, Zheng and Ye, Weirui}, journal={arXiv preprint arXiv:2512.08153}, year={2025}}
@article{fu2025dynamictreerpo,
  title={{Dynamic-TreeRPO}: Breaking the Independent Trajectory Bottleneck with Structured Sampling},
  author={Fu, Xiaolong and Ma, Lichen and Guo, Zipeng and others}, journal={arXiv preprint arXiv:2509.23352},
  year={2025}}"""

    eta: float = 0.3
    splits: tuple[int, ...] = (0, 3, 6, 9)
    width: int = 2
    window: tuple[int, int] | None = None
    slide: int = 0
    growth: float = 0.0
    split_noise: float = 1.0
    backup: Literal["mean", "probability", "edges"] = "mean"
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
            ValueError: for splits that the sampler has no noise for, or that would leave a moving window; for a window
                or depths that it does not have; for depths of a tree that moves.
        """
        window = self._window(times)
        first = window.bounds[0]
        splits = tuple(k - first for k in self.splits)
        kernel = Windowed(
            EulerMaruyama(self._law(window, splits)),
            lambda t, s: window(t, s) or window.level(t) - window.bounds[0] in splits,
        )
        depths = None
        if self.prune_depth is not None:
            depths = LeftOut(times, *self.prune_depth, period=self.prune_period, stop=max(self.splits))
        leaves = prod([self.width] * len(self.splits))
        learners: list[Learner] = [window] if self.slide else []
        return Recipe(
            kernel,
            Clip(kernel, self.clip, reach=self.reach, supervised=self.supervised),
            credit=self._credit(),
            select=BranchAt(window, self.width, splits),
            roots=lambda n: max(1, n // leaves),
            trained=always if depths is None else depths.trained,
            thin=self._thin(),
            learners=tuple(learners) if depths is None else (depths,),
        )

    def _window(self, times: Tensor) -> Sliding:
        steps = len(times) - 1
        first, last = self.window or (0, max(steps - 1, 1))
        if not 0 <= first < last <= steps:
            raise ValueError(f"a window of steps {first} to {last} does not lie in the {steps} steps of the sampler.")
        end = max(last, steps - 1)
        outside = [k for k in self.splits if not (first <= k < last if self.slide else 0 <= k < end)]
        if outside or not self.splits:
            low, high = (first, last) if self.slide else (0, end)
            raise ValueError(
                f"splits must lie at steps {low} to {high - 1}, where noise can be drawn; got {list(self.splits)}: "
                "children of a deterministic step would be copies."
            )
        if self.slide and self.prune_depth is not None:
            raise ValueError("depths are pruned of a tree that stands still: set slide or prune_depth, not both.")
        return Sliding(times, last - first, period=max(self.slide, 1), stop=end if self.slide else last, start=first)

    def _credit(self) -> Credit:
        return Edges() if self.backup == "edges" else Tree(how=self.backup)

    def _thin(self) -> Thin:
        if self.prune_width == "extremes" and self.keep < 1:
            raise ValueError(f"width pruning keeps at least one leaf at either end; got keep = {self.keep}.")
        rule = {"none": [], "best": [pruned(best_siblings)], "extremes": [extremes(self.keep, self.keep)]}
        return chain(*rule[self.prune_width], with_best if self.supervised else compared)

    def _law(self, window: Window, splits: tuple[int, ...]) -> NoiseLaw:
        if not self.growth and self.split_noise == 1:
            return Constant(self.eta)
        return Layered(window, splits, self.eta, self.growth, self.split_noise)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Return the published settings (BranchGRPO; TreeGRPO and Dynamic-TreeRPO in kind), and the demo's."""
        early, flux = (
            (0, 1, 2, 3),
            FitOptions(iterations=300, groups=16, size=16, steps=20, batch=1, accumulate=0, lr=1e-5),
        )
        return {
            "published": Preset(
                cls(), flux, None, note="BranchGRPO, FLUX.1-dev, binary splits at 0, 3, 6, 9 of 20. Not run here.",
            ),
            "published-pruned": Preset(
                cls(prune_width="best", prune_depth=(15, 19)), flux, None,
                note="BranchGRPO with both prunings: best leaf per last split; depths 15-18, sliding every 30. Not run "
                "here.",
            ),
            "published-mix": Preset(
                cls(window=(0, 4)), flux, None,
                note="Branch-Mix: noise in the first four steps and at the splits, the ODE elsewhere. Not run here.",
            ),
            "published-treegrpo": Preset(
                cls(splits=early, window=(0, 4), backup="edges"), replace(flux, steps=10), None,
                note="TreeGRPO in kind, SD3.5-M, T = 10: splits and noise in a window, the ODE elsewhere, advantages "
                "per edge. Its window, widths and optimiser are not public: they are BranchGRPO's. Not run here.",
            ),
            "published-dynamic": Preset(
                cls(splits=early, window=(0, 4), slide=25, growth=1.0, reach=1.0, supervised=0.01),
                replace(flux, steps=25), None,
                note="Dynamic-TreeRPO in kind: depth 4 in a window that slides as MixGRPO's, noise by layer, "
                "LayerTuning. Not run here.",
            ),
            **cls._demos(),
        }  # fmt: skip

    @classmethod
    def _demos(cls) -> dict[str, Preset]:
        plain = cls(eta=0.5, splits=(0, 1, 2, 3))
        window = replace(plain, window=(0, 4))
        fit = FitOptions(iterations=400, groups=8, size=16, steps=10, batch=192, lr=2e-4, weight_decay=0.0)
        kinds = {
            "demo": (plain, "all weights."),
            "demo-pruned": (replace(plain, prune_width="extremes", keep=4), "BranchGRPO, four best and worst leaves."),
            "demo-treegrpo": (replace(window, backup="edges"), "TreeGRPO: an advantage for each edge of a window."),
            "demo-dynamic": (
                replace(window, slide=10, growth=1.0, reach=1.0, supervised=0.01),
                "Dynamic-TreeRPO: a sliding window, noise by layer, LayerTuning.",
            ),
        }
        return {k: Preset(m, fit, None, guidance=False, note=f"shapes: {note}") for k, (m, note) in kinds.items()}
