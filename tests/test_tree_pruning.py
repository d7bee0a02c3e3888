"""Pruning of trees: what is left out gives no gradient and costs no network evaluation; against brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowalign.collect import Collector, collect
from flowalign.fit import fit
from flowalign.methods.tree_grpo import TreeGRPO
from flowalign.minibatch import minibatches
from flowalign.objectives import Clip
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.prepare import prepare
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from flowalign.thinning import best_siblings, extremes
from flowalign.trajectory import Transitions
from flowalign.windows import LeftOut
from tests.toy import Bright, Toy

STEPS = 6
OPTIONS = FitOptions(iterations=1, groups=2, size=16, steps=STEPS, batch=1000, lr=1e-3)
PLAIN = TreeGRPO(eta=0.5, splits=(0, 2, 3), clip=1e-2)  # two trees of eight leaves a group
CASES = {
    "none": PLAIN,
    "best": replace(PLAIN, prune_width="best"),
    "extremes": replace(PLAIN, prune_width="extremes", keep=2),
    "depth": replace(PLAIN, prune_depth=(3, 5)),
    "both": replace(PLAIN, prune_width="best", prune_depth=(1, 3)),
}


def grown(method: TreeGRPO):
    """A tree with its credit, and what trains on it."""
    toy = Toy()
    recipe = method.recipe(toy.times(STEPS))
    policy, parameters = prepare(toy, None, recipe.roles)
    collector = Collector(toy, Scorer(toy, {"r": Bright()}), policy, recipe, STEPS, 0)
    draw = Prompts(["a", "b dark"]).draw(0, 2, 16)
    return collector, draw, collect(collector, draw, 0), parameters


def by_walking(e, method: TreeGRPO) -> set[tuple[int, int]]:
    """The (level, child) of every step that should be trained, by walking up from each kept leaf."""
    tree, total = e.trajectory, e.total
    group = e.group[tree.leaves.row]
    if method.prune_width == "best":  # the last split is at level 3: siblings share their ancestor there
        kept = {max((i for i in range(32) if tree.lineage()[3][i] == p), key=lambda i: total[i])
                for p in tree.lineage()[3].tolist()}  # fmt: skip
    elif method.prune_width == "extremes":
        kept = set()
        for g in (0, 1):
            order = sorted((i for i in range(32) if group[i] == g), key=lambda i: total[i])
            kept |= {*order[:2], *order[-2:]}
    else:
        kept = set(range(32))
    steps = set()
    for leaf in kept:
        child = leaf
        for level in range(STEPS - 1, -1, -1):
            if level < STEPS - 1 and not (method.prune_depth and level in range(*method.prune_depth)):
                steps.add((level, child))
            child = int(tree.at(level + 1).parent[child])
    return steps


@pytest.mark.parametrize("name", CASES)
def test_pruned_steps_are_not_there(name: str) -> None:
    """The gradient is the mean over the steps found by walking, one at a time; the others are never evaluated."""
    method = CASES[name]
    collector, draw, e, parameters = grown(method)
    wanted = by_walking(e, method)
    tree, credit = e.trajectory, collector.recipe.credit(e)  # credit of the whole tree, pruned or not
    clip = Clip(collector.recipe.kernel, 1e-2)
    grads = [torch.zeros_like(p) for p in parameters]
    for level, child in sorted(wanted):
        a, b = tree.at(level), tree.at(level + 1)
        i, parent = torch.tensor([child]), b.parent[child : child + 1]
        step = Transitions(a.x[parent], b.x[i], tree.times[level].expand(1), tree.times[level + 1].expand(1), b.row[i],
                           torch.tensor([level]), b.log_prob[i], credit[level + 1][i])  # fmt: skip
        loss = clip(Policy(collector.pipeline), step, e.cond).terms["policy"] / len(wanted)
        for g, p in zip(grads, torch.autograd.grad(loss, parameters), strict=True):
            g += p
    before = collector.policy.ledger.evaluations
    (batch,) = minibatches(collector.recipe, collector, e, draw, OPTIONS, 0, 0)
    assert set(zip(batch.data.level.tolist(), batch.data.child.tolist(), strict=True)) == wanted
    loss = collector.recipe.objective(collector.policy, batch.data, batch.cond).terms["policy"]
    origins = {(level, int(tree.at(level + 1).parent[child])) for level, child in wanted}  # siblings share their call
    assert collector.policy.ledger.evaluations - before == len(origins) and len(batch.data) == len(wanted)
    for g, p in zip(grads, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.allclose(g, p, atol=1e-6) and g.abs().max() > 0


def test_the_loop_pays_for_what_is_kept() -> None:
    """Sampling costs the same whatever is pruned; the update costs the kept steps alone."""
    spent = {}
    for name, method in CASES.items():
        toy = Toy()
        recipe = method.recipe(toy.times(STEPS))
        policy, parameters = prepare(toy, None, recipe.roles)
        list(fit(toy, Scorer(toy, {"r": Bright()}), Prompts(["a", "b"]), recipe, OPTIONS, policy=policy,
                 parameters=parameters))  # fmt: skip
        spent[name] = policy.ledger.evaluations
    sampled = 4 * (1 + 2 + 2 + 4 + 8 + 8)  # four trees, six levels
    assert spent["none"] == sampled + 4 * (1 + 2 + 2 + 4 + 8)  # nodes of levels 0 to 4, from which trained steps start
    assert spent["best"] == sampled + 4 * (1 + 2 + 2 + 4 + 4)
    assert spent["depth"] == sampled + 4 * (1 + 2 + 2)
    assert spent["both"] == sampled + 4 * (1 + 4 + 4)
    assert sampled + 2 * 4 * 2 <= spent["extremes"] < spent["none"]


def test_depths_slide_towards_the_noise() -> None:
    """Fifteen to eighteen of twenty at first, one less every thirty iterations, down to the last split."""
    window = LeftOut(torch.linspace(1, 0, 21), 15, 19, period=30, stop=9)
    seen = []
    for i in range(300):
        if i % 30 == 0:
            seen.append(window.bounds)
        window.observe(None)
    assert seen == [(k, k + 4) for k in (15, 14, 13, 12, 11, 10, 9, 9, 9, 9)]
    assert [k for k in range(20) if window.trained(k, 0.5, 0.4)] == [*range(9), *range(13, 20)]


def test_whom_width_pruning_keeps() -> None:
    """One leaf of each pair of siblings, the better one; without any split all of them."""
    _, _, e, _ = grown(PLAIN)
    kept, total = best_siblings(e), e.total
    assert kept.reshape(16, 2).sum(1).tolist() == [1] * 16
    assert torch.equal(kept.reshape(16, 2).int().argmax(1), total.reshape(16, 2).argmax(1))
    chain = replace(e, trajectory=replace(e.trajectory, levels=e.trajectory.levels[-2:], times=e.trajectory.times[-2:]))
    assert best_siblings(chain).all()
    assert extremes(1, 1)  # on chains its steps are those of the samples: tests of test_policy_gradient.py


@pytest.mark.parametrize(("method", "words"), [
    (TreeGRPO(splits=(0, 1), prune_depth=(4, 9)), "depths to prune"),
    (TreeGRPO(splits=(0, 1), prune_depth=(3, 3)), "depths to prune"),
    (TreeGRPO(splits=(0, 1), prune_width="extremes", keep=0), "at least one leaf"),
])  # fmt: skip
def test_what_does_not_fit(method: TreeGRPO, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        method.recipe(torch.linspace(1, 0, STEPS + 1, dtype=torch.float64))
