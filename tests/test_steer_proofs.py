"""Closed-form proofs of searches: evidence and its error, trees without bias, walked samples, memory and resumption."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from flowalign.genealogy import evidence_error, evidence_variance, family
from flowalign.methods.dts import DTS
from flowalign.methods.fk_steering import FKSteering
from flowalign.methods.flow_nrg import FlowNRG, Objective
from flowalign.methods.particles import noisy_kernel, rows_of
from flowalign.methods.promises import Foreseen, promise, spread_of
from flowalign.methods.tree import Tree
from flowalign.methods.tree_node import soft_mean
from flowalign.potentials import Difference, Immediate
from flowalign.selection import SCHEMES, Resample
from flowalign.values import Draws
from tests import searching
from tests.test_steering import KERNEL, TIMES, WORLD, exact_log_z, exact_mean, task
from tests.worlds import F64, Normal, TwoPrompts, chain, output


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_difference_potential_leaves_the_evidence_unbiased(scheme: str, n: int) -> None:
    """The default potential too: every scheme and threshold (the other potentials are in test_potentials)."""
    world = TwoPrompts(copies={2: 2000, 4: 1500, 16: 400}[n], n=n)
    for seed, threshold in enumerate((0.0, 0.5, 2.0)):
        tree = world.run(seed, potential=Difference(1.5), select=Resample(scheme, threshold))
        world.check(tree.log_evidence(), 1.5)


def test_draws_around_the_mean_are_those_of_the_posterior() -> None:
    """Of a Gaussian whose deviation is told, std² of x0 given x_t; the soft mean knows their number and λ."""
    world = Normal(0.0, 0.6)
    for t in (0.2, 0.5, 0.9):
        assert torch.allclose(spread_of(world.process, 0.6)(t), torch.as_tensor(world.spread(t)))
    rows = rows_of(task(1), per_sample=False)
    value = promise(rows, 2.0, draws=5, data=0.6)
    assert isinstance(value, Draws) and value.noise.shape == (5, 1) and value.scale == 2.0
    assert len(set(value.noise.flatten().tolist())) == 5


def test_a_learned_promise_is_the_weighted_value_and_the_reward_at_data() -> None:
    """Rows are looked up as prompts; values are weighted and added; at data time the judge has the word."""
    values = [Objective(lambda x, t, p: x[:, 0] * t + 10 * p, 2.0), Objective(lambda x, t, p: x[:, 0] ** 2, -0.5)]
    value = Foreseen(values, torch.tensor([3, 7]), lambda x, row: x[:, 0] + 100 * row)
    x, row = torch.tensor([[1.0], [2.0]], dtype=F64), torch.tensor([1, 0])
    posterior = WORLD.posterior(x, 0.5)
    assert value(x, posterior, 0.5, row).tolist() == [2 * 70.5 - 0.5, 2 * 31.0 - 2.0]
    assert value(x, posterior, 0.0, row).tolist() == [101.0, 2.0]


def test_learned_values_leave_the_evidence_unbiased(tmp_path: Path) -> None:
    """Particles judged by what flow-nrg taught a network: E[Ẑ] = Z of the sampler as without a look on the way, and the
    judge is asked about finished samples alone."""
    file, lam, n = tmp_path / "values.safetensors", 1.0, 250

    def bright(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return 0.5 * x.flatten(1).sum(1)

    teacher = searching.task(bright, 1, 1, steps=8)
    next(FlowNRG(collect=256, train=200, width=16, save=str(file)).search(teacher))
    world = Normal(0.5, 0.8)
    for name, method in {
        "learned": FKSteering(4, scale=lam, learned=str(file)),
        "blind": FKSteering(4, scale=lam, threshold=0.0),  # never resampled: weighted samples of the base
    }.items():
        t = searching.task(bright, n, 1, steps=8)
        t = replace(t, draw=replace(t.draw, prompts=["p0"] * n))  # every system is of the prompt that was learnt
        found = next(method.search(t))
        mean, var = output(world, chain(world, noisy_kernel(world.process, 0.7), t.times), 1.0)
        exact = 12 * (lam * 0.5 * float(mean) + 0.5 * (lam * 0.5) ** 2 * float(var))
        ratio = (found.log_z - exact).exp()
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / n**0.5
        assert t.policy.ledger.rewards == 4 * n * (1 if name == "learned" else 9)
    with pytest.raises(ValueError, match="values of r, none of other"):
        promise(rows_of(searching.task({"other": searching.linear}), per_sample=False), 1.0, learned=str(file))
    (tmp_path / "wrong").write_bytes(b"not values")
    with pytest.raises(ValueError, match="is no file of latent values"):
        next(FKSteering(learned=str(tmp_path / "wrong")).search(searching.task(searching.linear)))
    with pytest.raises(ValueError, match="choose one of lookahead"):
        FKSteering(learned=str(file), draws=2)


def test_the_error_of_log_z_is_read_off_the_genealogy() -> None:
    """Lee & Whiteley's V against the spread of Ẑ/Z over runs: unbiased for multinomial, right for the defaults."""
    for n, scheme, threshold in ((8, "multinomial", 2.0), (8, "systematic", 0.5), (16, "systematic", 0.5)):
        world = TwoPrompts(copies=500, n=n, steps=3)
        tree = world.run(1, potential=Immediate(1.5), select=Resample(scheme, threshold))
        spread = (tree.log_evidence().reshape(500, 2) - world.log_z(1.5)).exp().var(0)
        told = evidence_variance(tree).reshape(500, 2)
        error = told.std(0) / 500**0.5 + 0.12 * spread
        assert ((told.mean(0) - spread).abs() < 4 * error).all(), (told.mean(0), spread)
        if threshold < 1:
            assert ((told.mean(0) / spread - 1).abs() < 0.2).all()
            sure = evidence_error(tree)
            assert torch.allclose(sure.nan_to_num() ** 2, told.flatten().clamp_min(0), atol=1e-12)
    tree = TwoPrompts(copies=3, n=5).run(0, potential=Difference(1.0))
    w = tree.weights().reshape(6, 5)
    assert torch.allclose(evidence_error(tree) ** 2, (5 * (w**2).sum(1) - 1) / 4, rtol=1e-5)


def test_a_lookahead_chooses_without_biasing_the_tree() -> None:
    """Selection by the posterior mean's reward: E[exp(λ v_root)] = Z, where selection by the tree's values is low."""
    lam, n, z = 2.0, 200, {}
    for select in ("lookahead", "boltzmann"):
        method = DTS(scale=lam, select=select, widen=1.0, power=0.6)
        t = task(n)
        tree = Tree(method.tree(t).rows, KERNEL, TIMES, lam, look=select == "lookahead")
        for _ in range(8):
            method.round(t, tree)
        z[select] = (lam * torch.tensor([r.value for r in tree.roots], dtype=F64) - exact_log_z(lam)).exp()
        if select == "lookahead":  # every inner node was looked at once
            looks = [node.look for _, _, node in tree.nodes() if 0 <= node.level < len(TIMES) - 1]
            assert all(v is not None for v in looks)
    ratio = z["lookahead"]
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / n**0.5
    assert z["boltzmann"].mean() < ratio.mean()


def test_total_variation_of_walked_samples_falls_with_the_budget() -> None:
    """The exact law of a walk, pooled over trees, against the tilted law of the sampler, in eight equal bins."""
    lam, trees = 1.3, 150
    mean, var = output(WORLD, chain(WORLD, KERNEL, TIMES), 1.0)
    law = torch.distributions.Normal(exact_mean(lam), var.sqrt())
    edges = law.icdf(torch.linspace(0, 1, 9, dtype=F64)[1:-1])
    method = DTS(scale=lam, widen=1.0, power=0.8)
    t = task(trees)
    tree, tv = method.tree(t), []
    for rounds in (1, 6, 24):
        while tree.rounds < rounds:
            method.round(t, tree)
        mass = torch.zeros(8, dtype=F64)
        for row in range(trees):
            for node, chance in tree.leaves(row):
                mass[int(torch.bucketize(node.x[0, 0], edges))] += chance / trees
        tv.append(float(0.5 * (mass - 0.125).abs().sum()))
    noise = 0.05  # of 150 samples in eight bins
    assert tv[0] > 0.25 and tv[1] < 0.75 * tv[0] and tv[2] < tv[1] + 0.01 and tv[2] < 0.12 + noise, tv
    assert abs(float(mean) - exact_mean(0.0)) < 1e-9


def grow(tree: Tree, method: DTS, t, rounds: int) -> Tree:
    while tree.rounds < rounds:
        method.round(t, tree)
    return tree


def values(tree: Tree) -> list[tuple[int, float, int]]:
    return [(n.level, n.value, n.visits) for _, _, n in tree.nodes()]


def test_a_saved_tree_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Structure, values and states; through a file; and what it was not saved with is refused."""
    method, whole, parts = DTS(scale=2.0, widen=1.0, power=0.7), task(3), task(3)
    want = grow(method.tree(whole), method, whole, 14)
    half = grow(method.tree(parts), method, parts, 6)
    torch.save(half.state_dict(), tmp_path / "tree.pt")
    again = replace(task(3), folder=tmp_path)
    got = method.tree(again)
    assert got.rounds == 6 and values(got) == values(half) and got.size == half.size
    grow(got, method, again, 14)
    assert values(got) == values(want)
    for a, b in zip(got.trajectory().levels, want.trajectory().levels, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.parent, b.parent)
    assert again.policy.ledger.evaluations == whole.policy.ledger.evaluations - parts.policy.ledger.evaluations
    with pytest.raises(ValueError, match="this search has 2, 8 and 2"):
        method.tree(replace(task(2), folder=tmp_path))


def test_a_tree_keeps_to_its_memory() -> None:
    """The least likely branches are forgotten, values stay what they were, every row keeps a way down to a leaf."""
    method, free = DTS(scale=2.0, widen=1.0, power=0.7), task(4)
    whole = grow(method.tree(free), method, free, 30)
    limit = whole.size / 3
    t = task(4)
    small = Tree(method.tree(t).rows, KERNEL, TIMES, 2.0, limit=limit)
    for _ in range(30):
        method.round(t, small)
        assert small.size <= limit
    g = torch.Generator().manual_seed(0)
    for row, root in enumerate(small.roots):
        assert root.visits == 30 and small.walk(row, g).x is not None
        assert sum(p for _, p in small.leaves(row)) == pytest.approx(1.0)
    for _, _, node in small.nodes():
        if node.children:
            assert node.value == pytest.approx(soft_mean([c.value for c in node.children], 2.0))
    assert small.size == sum(n.bytes() for _, _, n in small.nodes()) and sum(small.forgotten) > 0
    kept = [small.trajectory().at(k) for k in range(len(TIMES))]
    assert all(torch.equal(b.row, a.row[b.parent]) for a, b in pairwise(kept))


def test_a_last_step_without_noise_is_not_expanded() -> None:
    """DDIM's step to data is deterministic: a second child would be a copy, so the level before gets it."""
    from flowalign.kernels import Ancestral
    from flowalign.laws import Ddim

    method, t = DTS(scale=2.0, widen=1.0, power=0.3), task(2)
    tree = Tree(method.tree(t).rows, Ancestral(Ddim(1.0)), TIMES, 2.0)
    grow(tree, method, t, 25)
    parents = [n for _, _, n in tree.nodes() if n.level == len(TIMES) - 2]
    assert parents and all(len(n.children) == 1 for n in parents)
    leaves = torch.cat([n.x for _, _, n in tree.nodes() if n.level == len(TIMES) - 1])
    assert len(leaves.unique()) == len(leaves)


def test_families_are_laid_out() -> None:
    """Slots of a particle system, a tidy tree, lines of ancestors, and who is left out."""
    found = next(FKSteering(6, scale=3.0, threshold=2.0).search(task(2)))
    f = family(found.trajectory, 1)
    assert f.levels == tuple(range(9)) and len(f.members) == 6 * 9 and f.left_out == 0 and f.height == 6
    for m in f.members:
        assert (m.parent < 0) == (m.column == 0)
        if m.parent >= 0:
            above = f.members[m.parent]
            assert above.column == m.column - 1 and above.index == int(found.trajectory.at(m.level).parent[m.index])
            assert above.alive or not m.alive
    assert [len({m.y for m in f.members if m.column == c}) for c in range(9)] == [6] * 9
    lines = f.lineages()
    assert len(lines) == 6 and all(len(line) == 9 for line in lines)
    method = DTS(scale=2.0, widen=1.0, power=0.6)
    t = replace(task(2), keep=True)
    tree = grow(method.tree(t), method, t, 20).trajectory()
    f = family(tree, 0, columns=5, most=8)
    assert f.left_out == 12 and len(f.levels) == 5 and f.levels[0] == 0 and f.levels[-1] == 8
    assert all(m.alive for m in f.members) and len(f.lineages()) == 8
    ends = sorted(m.y for m in f.members if m.column == 4)
    assert ends == [float(i) for i in range(8)]
    for m in f.members:
        kids = [c for c in f.members if c.parent >= 0 and f.members[c.parent] is m]
        assert not kids or m.y == pytest.approx(sum(c.y for c in kids) / len(kids))
    assert tree.at(3).posterior is not None  # pictures of the intermediate states
