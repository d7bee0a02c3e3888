"""Which steps draw noise and are trained: windows, tails, pruned depths, exits, and the last step of each method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowalign.collect import Collector, collect
from flowalign.kernels import EulerMaruyama, SecondOrder
from flowalign.methods.b2_diffurl import B2DiffuRL
from flowalign.methods.base import Training
from flowalign.methods.dance_grpo import DanceGRPO
from flowalign.methods.ddpo import DDPO
from flowalign.methods.euphonium import Euphonium
from flowalign.methods.g2rpo import G2RPO
from flowalign.methods.mix_grpo import MixGRPO
from flowalign.methods.talk2move import Talk2Move
from flowalign.methods.tree_grpo import TreeGRPO
from flowalign.minibatch import minibatches
from flowalign.options import FitOptions
from flowalign.prepare import prepare
from flowalign.recipe import Recipe, trained_steps
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from tests.test_method_settings import OTHERS
from tests.toy import Bright, Toy
from tests.worlds import stable_diffusion

TIMES = torch.linspace(1, 0, 9, dtype=torch.float64)
FAMILY = [m for m, _ in OTHERS if not isinstance(m, G2RPO | Talk2Move)]


@pytest.mark.parametrize("method", [*FAMILY, G2RPO(levels=(7, 2)), Talk2Move(exits=(4,))], ids=lambda m: m.name)
def test_no_step_without_noise_is_trained(method: Training) -> None:
    """A density needs noise: the law of every trained step has some, and the others cost no evaluation."""
    toy = Toy()
    recipe = method.recipe(TIMES)
    grid = recipe.grid(TIMES)
    for k in trained_steps(recipe, grid):
        t, s = grid[k : k + 2].tolist()
        x = torch.zeros(1, 3, 2, 2)
        assert float(recipe.kernel(x, toy.posterior(x, t, toy.encode(["a"])), t, s)[0].std.min()) > 0, k


@pytest.mark.parametrize("method", [DanceGRPO(eta=0.5), Euphonium(eta=0.5, start=0.0, width=8)])
def test_what_dance_grpo_decodes_is_the_clean_prediction(method: Training) -> None:
    """The last step draws no noise and is not guided: the leaves are x̂0 of the states before; the others draw some."""
    toy = Toy()
    recipe = method.recipe(toy.times(6))
    for learner in recipe.learners:
        learner.prepare((3, 2, 2))
    policy, _ = prepare(toy, None)
    e = collect(Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, 6, 0), Prompts(["a"]).draw(0, 1, 4), 0)
    before = e.trajectory.at(5)
    assert torch.allclose(e.trajectory.leaves.x, toy.posterior(before.x, 1 / 6, e.cond).x0, atol=1e-5)
    assert trained_steps(recipe, e.trajectory.times) == [0, 1, 2, 3, 4]
    assert recipe.kernel.stochastic(1 / 3, 1 / 6) and not recipe.kernel.stochastic(1 / 6, 0.0)
    assert trained_steps(DanceGRPO().recipe(TIMES[[0, 8]]), TIMES[[0, 8]]) == [0], "a sampler of one step"


def test_dance_grpo_keeps_both_ends_of_a_group() -> None:
    """``keep`` of the best and as many of the worst, by the method's own recipe."""
    toy = Toy()
    recipe = DanceGRPO(eta=0.5, keep=2, fraction=1.0).recipe(toy.times(6))
    policy, _ = prepare(toy, None)
    e = collect(Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, 6, 0), Prompts(["a"]).draw(0, 1, 8), 0)
    steps = e.trajectory.transitions(recipe.credit(e), lambda k, t, s: k < 5)
    assert recipe.thin is not None
    kept = recipe.thin(steps, e)
    order = e.total.argsort().tolist()
    assert set(kept.child[kept.level > 0].tolist()) == {*order[:2], *order[-2:]} and len(kept) == 4 * 5


def test_trees_are_as_wide_as_told_and_have_their_teacher() -> None:
    """``width`` children at each split; with a supervised term every trained step is shown its group's best leaf."""
    toy = Toy()
    recipe = TreeGRPO(eta=0.5, splits=(0, 2), width=3, supervised=0.1).recipe(toy.times(6))
    policy, _ = prepare(toy, None)
    e = collect(Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, 6, 0), Prompts(["a"]).draw(0, 1, 18), 0)
    assert [len(e.trajectory.at(k)) for k in range(7)] == [2, 6, 6, 18, 18, 18, 18]
    assert recipe.thin is not None
    steps = recipe.thin(e.trajectory.transitions(recipe.credit(e)), e)
    assert steps.target is not None
    assert torch.equal(steps.target, e.trajectory.leaves.x[e.total.argmax()].expand_as(steps.target))


def test_the_stem_of_a_tree_is_not_trained() -> None:
    """Before its first split a tree has one node, whose advantage is 0 by construction: no network call is spent on it.

    A second tree of the same prompt is something to compare with, and a teacher teaches there too.
    """
    toy = Toy()
    policy, _ = prepare(toy, None)

    def trained(size: int, **settings: Any) -> list[int]:
        recipe = TreeGRPO(eta=0.5, splits=(2, 3), **settings).recipe(toy.times(6))
        collector = Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, 6, 0)
        e = collect(collector, Prompts(["a", "b"]).draw(0, 2, size), 0)
        (batch,) = minibatches(recipe, collector, e, None, FitOptions(batch=1000), 0, 0)  # type: ignore[arg-type]
        policy.ledger.evaluations = 0
        recipe.objective(policy, batch.data, e.cond)
        assert policy.ledger.evaluations == len(
            {*zip(batch.data.level.tolist(), batch.data.parent.tolist(), strict=True)}
        )
        return torch.bincount(batch.data.level, minlength=6).tolist()

    assert trained(4) == [0, 0, 4, 8, 8, 0]
    assert trained(8) == [4, 4, 8, 16, 16, 0] and trained(4, supervised=0.1) == [2, 2, 4, 8, 8, 0]
    assert trained(4, backup="edges") == [2, 2, 4, 8, 8, 0], "TreeGRPO's stem has its tree's likely advantage"


@pytest.mark.parametrize("width", [1, 3, 7])
def test_a_progressive_window_visits_all_steps_but_the_last(width: int) -> None:
    """MixGRPO: from noise towards data and back again, ``period`` iterations at a place."""
    recipe = MixGRPO(width=width, period=2).recipe(TIMES)
    seen = []
    for _ in range(36):
        seen.append(recipe.learners[0].bounds)
        recipe.learners[0].observe(None)
    places = [(k, k + width) for k in range(8 - width)]
    assert seen == [p for p in (places * 40)[:18] for _ in range(2)]


def test_windows_stop_where_told() -> None:
    """MixGRPO's ``stop``: no window reaches that step, and every place before it has its turn; the last step never."""
    for strategy, default in (("progressive", 7), ("random", 4)):
        for stop in (None, 2, 5, 7):
            window = MixGRPO(width=2, period=1, strategy=strategy, stop=stop).recipe(TIMES).learners[0]
            seen = set()
            for _ in range(60):
                seen.add(window.bounds)
                window.observe(None)
            assert seen == {(k, k + 2) for k in range((stop or default) - 1)}, (strategy, stop)


def test_a_random_window_follows_its_seed() -> None:
    """Flow-GRPO-Fast: each iteration draws from the early half, in an order that is the seed's."""

    def starts(seed: int, width: int = 2) -> list[tuple[int, int]]:
        window = MixGRPO(strategy="random", width=width, seed=seed).recipe(TIMES).learners[0]
        out = []
        for _ in range(40):
            out.append(window.bounds)
            window.observe(None)
        return out

    assert set(starts(0)) == {(0, 2), (1, 3), (2, 4)} and set(starts(0, 3)) == {(0, 3), (1, 4)}
    assert starts(0) == starts(0) != starts(1)


def test_flash_thins_the_steps_after_the_window() -> None:
    """The window's own steps stay; 40 % of the later ones are left, DPM-Solver++'s; without flash all, by Euler."""
    times = torch.linspace(1, 0, 26, dtype=torch.float64)
    recipe = MixGRPO(width=4, period=1, flash=0.4).recipe(times)
    for first in (0, 1, 2):
        grid = recipe.grid(times)
        kept = first + 4 + round((21 - first) * 0.4)
        assert torch.equal(grid[: first + 5], times[: first + 5]) and len(grid) == kept + 1 and grid[-1] == 0
        assert trained_steps(recipe, grid) == list(range(first, first + 4))
        recipe.learners[0].observe(None)
    assert recipe.kernel.outside == SecondOrder() and MixGRPO().recipe(times).kernel.outside == EulerMaruyama()
    assert torch.equal(MixGRPO().recipe(times).grid(times), times)


def test_g2rpo_takes_its_levels_in_turn() -> None:
    recipe = G2RPO(levels=(5, 0, 2)).recipe(TIMES)
    seen = []
    for _ in range(7):
        assert trained_steps(recipe, TIMES) == [recipe.learners[0].bounds[0]]
        seen.append(recipe.learners[0].bounds)
        recipe.learners[0].observe(None)
    assert [a for a, _ in seen] == [5, 0, 2, 5, 0, 2, 5] and all(b == a + 1 for a, b in seen)


def test_pruned_depths_move_with_the_run_up_to_the_last_split() -> None:
    """BranchGRPO: the levels left out slide towards the noise every ``prune_period`` iterations."""
    recipe = TreeGRPO(splits=(0, 3), prune_depth=(5, 7), prune_period=2).recipe(TIMES)
    seen = []
    for _ in range(8):
        seen.append(sorted({0, 1, 2, 3, 4, 5, 6} - set(trained_steps(recipe, TIMES))))
        for learner in recipe.learners:
            learner.observe(None)
    assert seen == [[5, 6], [5, 6], [4, 5], [4, 5], [3, 4], [3, 4], [3, 4], [3, 4]]


def test_the_tail_grows_up_to_its_upper_end() -> None:
    """B²-DiffuRL: stage i of 7 trains ``low + ⌊i (high - low + 1) / 7⌋`` of 8 steps, 2 to 6, and no more after them."""
    recipe: Recipe = B2DiffuRL(low=0.25, high=0.75, stages=7).recipe(TIMES)
    widths = []
    for _ in range(9):
        widths.append(8 - recipe.learners[0].bounds[0])
        assert trained_steps(recipe, TIMES) == list(range(8 - widths[-1], 7)), "into data there is no noise"
        recipe.learners[0].observe(None)
    assert widths == [2, 2, 3, 4, 4, 5, 6, 6, 6]


@pytest.mark.parametrize("method", [DDPO(), B2DiffuRL()], ids=lambda m: m.name)
def test_the_last_step_is_trained_where_it_draws_noise(method: Training) -> None:
    """Stable Diffusion ends at ᾱ = .99915 with noise in its last step, which DDPO trains; a flow's last draws none."""
    process, times = stable_diffusion(), torch.linspace(1, 0, 21, dtype=torch.float64)
    recipe = method.recipe(times)
    x = torch.zeros(1, 1)
    std = recipe.kernel(x, process.posterior(x, times[-2], x0=x), times[-2], times[-1])[0].std
    assert 0.01 < float(std) < 0.03
    assert trained_steps(recipe, times, process)[-1] == 19 and trained_steps(recipe, times)[-1] == 18

    class Diffusion(Toy):
        def posterior(self, x, t, cond):
            v = 0.1 * self.denoiser(torch.cat([x.flatten(1), torch.full((len(x), 1), 0.5)], 1)).reshape(x.shape)
            return self.process.posterior(x, t, eps=x + v)

    Diffusion.process = process  # type: ignore[assignment]
    toy = Diffusion()
    policy, _ = prepare(toy, None)
    collector = Collector(toy, Scorer(toy, {"b": Bright()}), policy, method.recipe(toy.times(4)), 4, 0)
    e = collect(collector, Prompts(["a"]).draw(0, 1, 10), 0)
    (batch,) = minibatches(collector.recipe, collector, e, None, FitOptions(batch=1000), 0, 0)  # type: ignore[arg-type]
    assert batch.data.level.max() == 3 and torch.isfinite(batch.data.log_prob).all()
    with pytest.raises(ValueError, match="none of the 4 steps draws noise"):
        trained_steps(DDPO(eta=0.0).recipe(toy.times(4)), toy.times(4), process)


def test_the_jump_to_the_end_draws_no_noise() -> None:
    """Talk2Move: ``step`` noisy steps, all trained, and the ODE over all the rest at once."""
    recipe = Talk2Move(exits=(3,)).recipe(TIMES)
    grid = recipe.grid(TIMES)
    assert torch.equal(grid, TIMES[[0, 1, 2, 3, 8]]) and trained_steps(recipe, grid) == [0, 1, 2]


def test_rounds_of_an_exit_have_prompts_and_noises_of_their_own() -> None:
    """The variance of a candidate is the mean over its rounds, drawn before and apart from the training's samples."""
    toy = Toy()
    recipe = Talk2Move(noise=0.7, exits=(2,), rounds=2).recipe(toy.times(6))
    policy, _ = prepare(toy, None, recipe.roles)
    collector = Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, 6, 0)
    source, options = Prompts(["a", "b dark", "c"]), FitOptions(groups=1, size=6)
    recipe.learners[0].before(collector, source, options)
    spread = [
        float(collect(collector, source.draw(i, 1, 6), -1 - i).total.var(correction=0)) for i in range(2)
    ]  # fmt: skip
    assert recipe.learners[0].variances[2] == pytest.approx(sum(spread) / 2, rel=1e-4)
    assert abs(spread[0] - spread[1]) > 0.01 * spread[0]
