"""The relatives of BranchGRPO through the method: layers, windows that slide, splits outside them, edges, presets."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.collect import Collector, collect
from flowalign.credit import Edges, Tree
from flowalign.fit import fit
from flowalign.kernels import EulerMaruyama
from flowalign.methods.tree_grpo import TreeGRPO
from flowalign.noise import Noise
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.prepare import prepare
from flowalign.recipe import Recipe, trained_steps
from flowalign.rollout import rollout
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from flowalign.trajectory import Nodes
from tests.toy import Bright, Toy
from tests.worlds import F64, Normal

STEPS = 8
TIMES = torch.linspace(1, 0, STEPS + 1, dtype=F64)
WORLD = Normal(0.5, 0.4)
DYNAMIC = TreeGRPO(eta=0.4, splits=(0, 1, 2), window=(0, 3), slide=2, growth=1.0, reach=1.0, supervised=0.1, clip=1e-2)


def levels(recipe: Recipe) -> list[float]:
    """The noise level of each step, 0 for the ODE: std / √(t - s)."""
    out = []
    for t, s in pairwise(TIMES.tolist()):
        law, _ = recipe.kernel(torch.zeros(1, 1, dtype=F64), WORLD.posterior(torch.zeros(1, 1, dtype=F64), t), t, s)
        out.append(float(law.std) / (t - s) ** 0.5)
    return out


def grown(recipe: Recipe, samples: int = 8) -> list[int]:
    """Nodes by level of one group's trees."""
    toy = Toy()
    policy, _ = prepare(toy, None, recipe.roles)
    collector = Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, STEPS, 0)
    e = collect(collector, Prompts(["a"]).draw(0, 1, samples), 0)
    return [len(e.trajectory.at(k)) for k in range(STEPS + 1)]


def test_noise_by_layer() -> None:
    """Dynamic-TreeRPO: from η to η (1 + growth) over the layers of the tree, however long the sampler is."""
    found = levels(TreeGRPO(eta=0.3, splits=(0, 1, 2, 3), window=(0, 4), growth=1.0).recipe(TIMES))
    assert found == pytest.approx([0.3, 0.4, 0.5, 0.6, 0, 0, 0, 0])
    wide = levels(TreeGRPO(eta=0.3, splits=(1, 3, 4), growth=0.5).recipe(TIMES))
    assert wide == pytest.approx([0.3, 0.3, 0.3, 0.375, 0.45, 0.45, 0.45, 0]), "a layer is what lies between splits"
    assert levels(TreeGRPO(eta=0.3, splits=(2,), growth=0.5).recipe(TIMES))[:7] == pytest.approx([0.3] * 7)


def test_noise_of_a_split() -> None:
    """The level of the law itself is raised where nodes part: the drift follows, and the marginals stay."""
    recipe = TreeGRPO(eta=0.3, splits=(0, 3), split_noise=2.0).recipe(TIMES)
    assert levels(recipe) == pytest.approx([0.6, 0.3, 0.3, 0.6, 0.3, 0.3, 0.3, 0])
    x = torch.tensor([[0.7]], dtype=F64)
    post = WORLD.posterior(x, float(TIMES[3]))
    law, _ = recipe.kernel(x, post, TIMES[3], TIMES[4])
    dt = float(TIMES[4] - TIMES[3])
    assert torch.allclose(law.mean, x + (post.velocity + 0.6**2 / 2 * post.eps / TIMES[3]) * dt)


def test_the_tree_moves_with_its_window() -> None:
    """Noise, layers, splits and training slide together to the last step but one, and begin again."""
    recipe = DYNAMIC.recipe(TIMES)
    for i in range(14):
        k = (i // 2) % 5
        assert trained_steps(recipe, TIMES) == [k, k + 1, k + 2], i
        assert levels(recipe) == pytest.approx([0] * k + [0.4, 0.6, 0.8] + [0] * (5 - k))
        if i % 2:
            assert grown(recipe) == [1] * (k + 1) + [2, 4, 8] + [8] * (5 - k), i
        for learner in recipe.learners:
            learner.observe(None)
    late = replace(DYNAMIC, splits=(2, 3), window=(2, 5)).recipe(TIMES)
    places = []
    for _ in range(8):
        places.append(trained_steps(late, TIMES)[0])
        late.learners[0].observe(None)
    assert places == [2, 2, 3, 3, 4, 4, 2, 2] and grown(late, 4)[3:6] == [1, 2, 4]


def test_a_window_that_stands_still_and_splits_outside_it() -> None:
    """Branch-Mix: the SDE in the window and at every split, wherever it is; what draws noise is trained."""
    recipe = TreeGRPO(eta=0.3, splits=(0, 3, 6), window=(0, 2)).recipe(TIMES)
    for _ in range(3):
        assert trained_steps(recipe, TIMES) == [0, 1, 3, 6] and not recipe.learners
        assert [v > 0 for v in levels(recipe)] == [k in (0, 1, 3, 6) for k in range(STEPS)]
    assert grown(recipe) == [1, 2, 2, 2, 4, 4, 4, 8, 8]
    whole = TreeGRPO(eta=0.3, splits=(0, 3)).recipe(TIMES)
    assert trained_steps(whole, TIMES) == list(range(7))


@pytest.mark.parametrize(("method", "words"), [
    (TreeGRPO(splits=(0, 7)), "steps 0 to 6, where noise"),
    (TreeGRPO(splits=()), "where noise"),
    (replace(DYNAMIC, splits=(0, 3)), "steps 0 to 2, where noise"),
    (replace(DYNAMIC, window=(0, 9)), "does not lie"),
    (replace(DYNAMIC, window=(3, 3)), "does not lie"),
    (replace(DYNAMIC, prune_depth=(4, 5)), "stands still"),
])  # fmt: skip
def test_what_does_not_fit(method: TreeGRPO, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        method.recipe(TIMES)


def started(method: TreeGRPO, iterations: int, **kwargs: Any):
    toy = Toy()
    options = FitOptions(iterations=iterations, groups=4, size=8, steps=STEPS, lr=3e-3, batch=64, checkpoint_every=1)
    recipe = method.recipe(toy.times(STEPS))
    policy, parameters = prepare(toy, None, recipe.roles)
    scorer = Scorer(toy, {"bright": Bright()})
    return toy, fit(toy, scorer, Prompts(["a"]), recipe, options, policy=policy, parameters=parameters, **kwargs)


KINDS = {"dynamic": DYNAMIC, "edges": TreeGRPO(eta=0.5, splits=(0, 1, 2), window=(0, 3), backup="edges", clip=1e-2)}


@pytest.mark.parametrize("name", KINDS)
def test_resumes_bitwise(name: str, tmp_path: Path) -> None:
    """The place of the window is a state: a run that was cut goes on as if it had not been."""
    whole, run = started(KINDS[name], 7, folder=tmp_path / "a")
    list(run)
    _, run = started(KINDS[name], 7, folder=tmp_path / "b")
    for _ in range(4):
        next(run)
    run.close()
    cut, run = started(KINDS[name], 7, folder=tmp_path / "b", resume=True)
    assert len(list(run)) == 3
    for p, q in zip(whole.denoiser.parameters(), cut.denoiser.parameters(), strict=True):
        assert torch.equal(p, q)


def judged(toy: Toy) -> torch.Tensor:
    """Rewards of the ODE from fixed noises."""
    z = torch.randn(256, 3, 2, 2, generator=torch.Generator().manual_seed(9))
    cond = toy.encode(["a"])
    ends = rollout(Policy(toy), EulerMaruyama(), toy.times(STEPS), Nodes.enter(z), noise=Noise(0)).leaves.x
    return Bright()(toy.decode(ends, cond), ["a"] * 256)


@pytest.mark.parametrize("name", KINDS)
def test_learns(name: str) -> None:
    """On the same noises the trained policy's rewards beat the base's by more than 5 standard errors, paired."""
    toy, run = started(KINDS[name], 24)
    before = judged(toy)
    list(run)
    gain = judged(toy) - before
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5 and gain.mean() > 0.005


def test_every_relative_has_its_presets() -> None:
    """TreeGRPO, Dynamic-TreeRPO and the pruned tree can be asked for by name, in a published and a demo form."""
    found = {k: p.method for k, p in TreeGRPO.presets().items()}
    for kind, fits in {
        "treegrpo": lambda m: isinstance(m.recipe(TIMES).credit, Edges) and m.window is not None,
        "dynamic": lambda m: m.slide > 0 and m.growth > 0 and m.reach > 0 and m.supervised > 0,
        "pruned": lambda m: m.prune_width != "none" and m.recipe(torch.linspace(1, 0, 21)).credit == Tree(),
    }.items():
        for where in ("published", "demo"):
            assert fits(found[f"{where}-{kind}"]), (where, kind)
    assert found["published-mix"].recipe(torch.linspace(1, 0, 21)).credit == Tree()
    assert trained_steps(found["published-mix"].recipe(torch.linspace(1, 0, 21)), torch.linspace(1, 0, 21)) == [
        0, 1, 2, 3, 6, 9]  # fmt: skip
    for entry in ("2509.06040", "2512.08153", "2509.23352"):
        assert entry in TreeGRPO.reference
