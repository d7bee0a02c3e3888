"""Credit: published normalisations by hand, trees against brute force, gains of completions, and who is left out."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from worlds import F64, Net, Normal

from flowalign.credit import Edges, Gains, Group, Normalise, Tree, group_mean
from flowalign.experience import Experience
from flowalign.kernels import EulerMaruyama
from flowalign.laws import Constant
from flowalign.noise import Noise
from flowalign.policy import Policy
from flowalign.rollout import rollout
from flowalign.selection import Branch, Chosen, Selection
from flowalign.trajectory import Nodes

TIMES = torch.linspace(1, 0, 5, dtype=F64)
KERNEL = EulerMaruyama(Constant(0.5))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def score(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return torch.sin(x).sum(1) + row


def experience(rows: int = 4, select: Selection | None = None, denoiser=None, group=None, **extra) -> Experience:
    policy = Policy(denoiser or Normal())
    tree = rollout(policy, KERNEL, TIMES, Nodes.enter(draw(rows, 3)), noise=Noise(0), select=select)
    leaves = tree.leaves
    rewards = {"a": score(leaves.x, leaves.row), "b": leaves.x[:, 0] ** 2}
    group = torch.arange(rows) // 2 if group is None else group
    return Experience(
        policy=policy, trajectory=tree, cond=None, group=group, rewards=rewards, weights={"a": 1.0, "b": 0.5},
        scores=lambda x, row: {"a": score(x, row), "b": x[:, 0] ** 2}, **extra,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# normalisation

R = torch.tensor([1.0, 2.0, 4.0, 10.0, 10.5], dtype=F64)
G = torch.tensor([0, 0, 0, 2, 2])
MEAN = torch.tensor([7 / 3, 7 / 3, 7 / 3, 10.25, 10.25], dtype=F64)


def test_group_mean():
    assert torch.allclose(group_mean(R, G, 4), torch.tensor([7 / 3, 0.0, 10.25, 0.0], dtype=F64))
    for n in (3, 7, 12):
        for value in (0.1, 0.3, 1000.1):
            assert group_mean(torch.full((n,), value), torch.zeros(n, dtype=torch.long), 1)[0] == torch.tensor(value)


def test_published_normalisations():
    gap = R - MEAN
    flow_grpo = Normalise(scale="batch", eps=1e-4, clamp=None)(R, G)
    assert torch.allclose(flow_grpo, gap / (R.std(correction=0) + 1e-4), atol=1e-14)
    dance = Normalise(unbiased=True, eps=1e-8, clamp=None)(R, G)
    std = torch.cat([R[:3].std().expand(3), R[3:].std().expand(2)])
    assert torch.allclose(dance, gap / (std + 1e-8), atol=1e-14)
    population = torch.cat([R[:3].std(correction=0).expand(3), R[3:].std(correction=0).expand(2)])
    assert torch.allclose(Normalise()(R, G), gap / (population + 1e-4), atol=1e-14)
    assert torch.allclose(Normalise(scale="none")(R, G), gap.clamp(-5, 5), atol=1e-14)
    wide = Normalise("batch", "batch", unbiased=True, eps=0.5, clamp=0.7)(R, G)
    assert torch.allclose(wide, ((R - R.mean()) / (R.std() + 0.5)).clamp(-0.7, 0.7), atol=1e-14)
    assert torch.equal(Normalise("none", "none", clamp=None)(R, G), R)
    assert Normalise() == Normalise("group", "group", False, 1e-4, 5.0)
    assert torch.allclose(Normalise(clamp=0.5)(R, G).abs().max(), torch.tensor(0.5, dtype=F64))
    big = Normalise("none", "none")(torch.tensor([-9.0, 9.0]), torch.tensor([0, 0]))
    assert big.tolist() == [-5.0, 5.0]


def test_the_batch_may_be_larger_than_what_this_process_holds():
    whole = torch.cat([R, draw(6)])
    got = Normalise("batch", "batch", eps=0.1, clamp=None)(R, G, whole)
    assert torch.allclose(got, (R - whole.mean()) / (whole.std(correction=0) + 0.1), atol=1e-14)


@pytest.mark.parametrize("n", [2, 3, 7, 12])
@pytest.mark.parametrize("value", [0.1, 0.3, 1000.1])
@pytest.mark.parametrize(
    "rule", [Normalise(unbiased=True, eps=1e-8), Normalise("batch", "batch", eps=1e-8), Normalise()]
)
def test_a_group_without_variance_gets_exactly_nothing(n, value, rule):
    """In float32 the mean of seven times .1 is not .1: with DanceGRPO's eps round-off would count as an advantage."""
    got = rule(torch.full((n,), value), torch.zeros(n, dtype=torch.long))
    assert torch.equal(got, torch.zeros(n))


def test_a_sample_alone():
    for rule in (Normalise(), Normalise(unbiased=True), Normalise("batch", "batch", unbiased=True)):
        assert torch.equal(rule(torch.tensor([3.0]), torch.tensor([0])), torch.zeros(1))


def test_unknown_values_count_for_nothing():
    values, group = torch.cat([R, torch.tensor([torch.nan, torch.nan])]), torch.cat([G, torch.tensor([0, 1])])
    for rule in (Normalise(), Normalise("batch", "batch"), Normalise(unbiased=True)):
        got = rule(values, group)
        assert torch.allclose(got[:5], rule(R, G)) and torch.isnan(got[5:]).all()
        assert torch.allclose(rule(R, G, values), rule(R, G, R))
    assert torch.isnan(Normalise()(values[5:], group[5:])).all()
    assert torch.isnan(values[5:]).all()  # the input is left alone


# ---------------------------------------------------------------------------------------------------------------------
# chains


def test_group_credit_is_the_leafs_advantage_on_every_step():
    e = experience()
    total = e.rewards["a"] + 0.5 * e.rewards["b"]
    assert torch.allclose(e.total, total)
    advantage = Normalise()(total, e.group)
    levels = Group()(e)
    assert len(levels) == 5 and all(torch.allclose(level, advantage) for level in levels)
    # a group may hold several rows, and a row several leaves
    branched = experience(select=Branch({0: 2, 2: 3}))
    want = Normalise(scale="batch")(branched.total, branched.group[branched.trajectory.leaves.row])
    rule = Group(Normalise(scale="batch"))
    assert torch.equal(rule.leaves(branched), want)
    got = rule(branched)
    assert torch.allclose(got[2], want.reshape(-1, 3).mean(1)) and torch.allclose(got[0], want.reshape(-1, 6).mean(1))


def test_per_reward_normalises_before_it_sums():
    e = experience()
    want = Normalise()(e.rewards["a"], e.group) + 0.5 * Normalise()(e.rewards["b"], e.group)
    assert torch.allclose(Group(per_reward=True).leaves(e), want)
    assert not torch.allclose(want, Group().leaves(e))
    assert Group() == Group(Normalise(), False)


# ---------------------------------------------------------------------------------------------------------------------
# trees


def test_tree_credit_normalises_each_depth():
    e = experience(rows=4, select=Branch({0: 2, 1: 3}))
    levels = Tree()(e)
    leaves = e.total.reshape(4, 2, 3)
    at = [leaves.mean((1, 2)), leaves.mean(2).flatten(), leaves.flatten()]
    for k, value in zip((0, 1, 2, 3, 4), (at[0], at[1], at[2], at[2], at[2]), strict=True):
        group = e.group[e.trajectory.at(k).row]
        assert torch.allclose(levels[k], Normalise(unbiased=True, eps=1e-8)(value, group), atol=1e-9), k
    assert Tree() == Tree(Normalise(unbiased=True, eps=1e-8, least=1e-6), "mean")


def test_edges_back_up_advantages_and_not_rewards():
    """TreeGRPO: the advantage of a leaf in its group, averaged upwards by likelihood; no depth is normalised again."""
    e = experience(rows=4, select=Branch({0: 2, 2: 3}))
    tree, dims = e.trajectory, 3
    by_group = e.total.reshape(2, 12)
    leaf = ((by_group - by_group.mean(1, keepdim=True)) / (by_group.std(1, keepdim=True) + 1e-8)).flatten()

    def edge(level: int, node: int) -> float:
        if level == 4:
            return float(leaf[node])
        below = tree.at(level + 1)
        mine = (below.parent == node).nonzero().flatten().tolist()
        share = torch.softmax(torch.stack([below.log_prob[i] / dims for i in mine]), 0)
        return sum(float(w) * edge(level + 1, i) for w, i in zip(share, mine, strict=True))

    levels = Edges()(e)
    for k in range(5):
        assert torch.allclose(levels[k], torch.tensor([edge(k, i) for i in range(len(tree.at(k)))], dtype=F64)), k
    spread = [float(levels[k].reshape(2, -1).std(1).mean()) for k in (1, 4)]
    assert spread[0] < 0.8 * spread[1], "the early edges, whose leaves disagree, count for less"
    other = Tree(how="probability")(e)
    assert not torch.allclose(other[1], levels[1], atol=0.05) and torch.allclose(other[4], levels[4])
    flat = Edges()(replace(e, rewards={"a": torch.full((24,), 0.1), "b": torch.zeros(24)}))
    assert all(torch.equal(v, torch.zeros_like(v)) for v in flat), "a group without variance teaches nothing"


def test_nodes_that_differ_by_round_off_alone_have_no_advantage():
    """BranchGRPO: 0 where the std is below 1e-6: the mean of .3, .6, .7 is another float than that of .7, .3, .6."""
    e = experience(rows=2, select=Branch({0: 4, 1: 3}), group=torch.arange(2))
    sets = torch.tensor([[0.3, 0.6, 0.7], [0.7, 0.3, 0.6], [0.6, 0.3, 0.7], [0.7, 0.6, 0.3]])
    total = torch.cat([sets.flatten(), sets.flatten() + torch.arange(12) // 3 * 0.1])
    levels = Tree()(replace(e, rewards={"a": total, "b": 0 * total}))
    means = (sets[:, 0] + sets[:, 1] + sets[:, 2]) / 3
    assert 0 < means.std() < 1e-6, "the sums do differ"
    assert torch.equal(levels[1][:4], torch.zeros(4)) and (levels[1][4:].abs() > 0.3).all()
    assert (levels[2][:12].abs() > 0.3).all(), "the leaves do too"


def test_branches_that_died_out_are_neither_credited_nor_averaged_in():
    class Prune(Selection):
        """Only the first node of each row goes on, twice."""

        def __call__(self, level, log_w, row, n_rows, noise):
            parents = torch.tensor([int((row == r).nonzero()[0]) for r in range(n_rows) for _ in range(2)])
            return Chosen(parents, log_w.new_zeros(len(parents)), log_w.new_zeros(n_rows))

    e = experience(rows=4, select=Prune())
    for rule in (Tree(), Group()):
        levels = rule(e)
        dead = [torch.isnan(v) for v in levels]
        assert not dead[0].any() and not dead[4].any() and int(dead[2].sum()) == 4
        assert not torch.isnan(torch.stack([v[~d].sum() for v, d in zip(levels, dead, strict=True)])).any()
        steps = e.trajectory.transitions(levels)
        assert len(steps) == 4 * 3 + 8 and not torch.isnan(steps.weight).any()
    # a NaN on a living node is a fault, and is passed on for the guards to see
    levels = Group()(e)
    levels[4][3] = torch.nan
    assert torch.isnan(e.trajectory.transitions(levels).weight).any()


def test_staggered_entries_have_no_credit_before_they_exist():
    policy = Policy(Normal())
    tree = rollout(policy, KERNEL, TIMES, {2: Nodes.enter(draw(3, 2))}, noise=Noise(0))
    e = Experience(
        policy=policy, trajectory=tree, cond=None, group=torch.zeros(3, dtype=torch.long),
        rewards={"a": tree.leaves.x[:, 0]}, weights={"a": 1.0}, scores=lambda x, row: {"a": x[:, 0]},
    )  # fmt: skip
    assert Tree()(e)[:2] == [None, None] and Tree()(e)[2] is not None


# ---------------------------------------------------------------------------------------------------------------------
# gains


@pytest.mark.parametrize("steps", [None, 1, 2])
def test_gains_are_differences_of_completions(steps):
    e = experience(denoiser=Net(3).double())
    net, tree = e.policy.denoiser, e.trajectory
    values = []
    for k in range(4):
        x, t = tree.at(k).x, float(TIMES[k])
        grid = TIMES[k:].tolist() if steps is None else [t * (1 - i / steps) for i in range(steps + 1)]
        for a, b in pairwise(grid):
            x = EulerMaruyama()(x, net.posterior(x, a), a, b)[0].mean
        values.append((score(x, tree.at(k).row) + 0.5 * x[:, 0] ** 2).detach())
    values.append(e.total)
    gains = Gains(steps=steps).gains(e)
    assert len(gains) == 4
    for k in range(4):
        assert torch.allclose(gains[k], values[k + 1] - values[k], atol=1e-12), k
    levels = Gains(steps=steps)(e)
    assert levels[0] is None and len(levels) == 5
    for k in range(4):
        assert torch.allclose(levels[k + 1], Normalise()(gains[k], e.group), atol=1e-12)
    total = torch.stack(gains).sum(0)
    assert torch.allclose(total, values[-1] - values[0])  # they telescope: nothing is lost


def test_gains_of_a_tree_follow_parents():
    e = experience(select=Branch({1: 2}))
    rewards = e.completions()
    gains = Gains().gains(e)
    assert torch.allclose(gains[1], rewards[2] - rewards[1].repeat_interleave(2))
    assert Gains() == Gains(Normalise(), None)


def test_credits_keep_no_state():
    for credit in (Group(), Tree(), Edges(), Gains()):
        assert credit.state_dict() == {}
        credit.load_state_dict({})
        with pytest.raises(ValueError, match="keeps no state"):
            credit.load_state_dict({"x": torch.zeros(1)})
    assert math.isclose(float(Group().normalise.eps), 1e-4)
