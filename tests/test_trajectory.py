"""Genealogies: bookkeeping, credit carried back against brute force, and trees that grow by grafting."""

from __future__ import annotations

import math

import pytest
import torch
from worlds import F64, Normal

from flowalign.gaussian import Gaussian
from flowalign.kernels import Ancestral, SecondOrder
from flowalign.laws import Ddim
from flowalign.noise import Noise
from flowalign.policy import Policy
from flowalign.process import Posterior, Rectified
from flowalign.rollout import rollout
from flowalign.selection import Branch
from flowalign.trajectory import Nodes, Trajectory, pick, ranks, row_lse

RF = Rectified()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def nodes(parents: list[int], row: list[int] | None = None, seed: int = 0) -> Nodes:
    n = len(parents)
    base = Nodes.enter(draw(n, 1, seed=seed), torch.tensor(row or [0] * n))
    return Nodes(**(vars(base) | {"parent": torch.tensor(parents)}))


def ragged() -> Trajectory:
    """Four levels; node 1 of level 1 dies out, and node 2 of level 2 entered there."""
    levels = (
        nodes([-1, -1]),
        nodes([0, 0, 1], seed=1),
        nodes([0, 2, -1, 2], seed=2),
        nodes([0, 0, 1, 2, 3, 3, 3], seed=3),
    )
    return Trajectory(torch.tensor([1.0, 0.7, 0.3, 0.0], dtype=F64), levels, torch.zeros(1, dtype=F64))


def brute(tree: Trajectory, values: torch.Tensor, level: int, node: int, how) -> float:
    """Value of a node by recursion over its descendants."""
    last = len(tree.levels) - 1
    if level == last:
        return float(values[node])

    def leaves(k: int, i: int) -> list[float]:
        if k == last:
            return [float(values[i])]
        return [v for j in (tree.at(k + 1).parent == i).nonzero().flatten().tolist() for v in leaves(k + 1, j)]

    under = leaves(level, node)
    if not under:
        return math.nan
    if how == "mean":
        return sum(under) / len(under)
    if how == "max":
        return max(under)
    children = (tree.at(level + 1).parent == node).nonzero().flatten().tolist()
    known = [v for v in (brute(tree, values, level + 1, j, how) for j in children) if not math.isnan(v)]
    return math.log(sum(math.exp(how * v) for v in known) / len(known)) / how


def check_backup(tree: Trajectory, values: torch.Tensor) -> None:
    for how in ("mean", "max", 1.0, 3.5, -2.0):
        got = tree.backup(values, how)
        for k in range(tree.first, len(tree.levels)):
            want = torch.tensor([brute(tree, values, k, i, how) for i in range(len(tree.at(k)))], dtype=F64)
            assert torch.allclose(got[k], want, atol=1e-12, equal_nan=True), (how, k)
        assert all(v is None for v in got[: tree.first])


def test_backup_of_a_ragged_tree():
    tree = ragged()
    values = draw(7, seed=4)
    check_backup(tree, values)
    assert torch.isnan(tree.backup(values)[1][1]) and not torch.isnan(tree.backup(values)[0]).any()
    assert torch.equal(tree.backup(values)[0], tree.backup(values, "mean")[0])
    assert torch.equal(tree.backup(values)[-1], values)


def test_backup_of_random_trees():
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        levels, size = [nodes([-1] * 3)], 3
        for _ in range(4):
            n = int(torch.randint(2, 7, (1,), generator=g))
            levels.append(nodes((torch.randint(-1, size, (n,), generator=g)).tolist()))
            size = n
        tree = Trajectory(torch.linspace(1, 0, 5, dtype=F64), tuple(levels), torch.zeros(1, dtype=F64))
        check_backup(tree, draw(size, seed=seed))


def test_soft_backup_survives_large_values():
    tree = ragged()
    values = draw(7) * 1000
    assert torch.isfinite(tree.backup(values, 10.0)[0]).all()
    grown = tree.backup(values + 5, 2.0)[0]
    assert torch.allclose(grown, tree.backup(values, 2.0)[0] + 5)


def test_lineage():
    lines = ragged().lineage()
    assert [line.tolist() for line in lines] == [
        [0, 0, 1, -1, 1, 1, 1], [0, 0, 2, -1, 2, 2, 2], [0, 0, 1, 2, 3, 3, 3], [0, 1, 2, 3, 4, 5, 6],
    ]  # fmt: skip
    late = Trajectory(torch.linspace(1, 0, 4), (None, None, nodes([-1, -1]), nodes([1, 0])), torch.zeros(1))
    assert [line.tolist() for line in late.lineage()] == [[-1, -1], [-1, -1], [1, 0], [0, 1]]
    assert late.first == 2 and late.n_rows == 1 and len(late.leaves) == 2
    with pytest.raises(IndexError, match="level 1 has no nodes; the first level with any is 2"):
        late.at(1)


def test_ranks_and_row_sums():
    assert ranks(torch.tensor([1, 0, 1, 1, 0, 2])).tolist() == [0, 0, 1, 2, 1, 0]
    row = torch.tensor([0, 2, 0, 2])
    lw = torch.tensor([1.0, -torch.inf, 2.0, 700.0], dtype=F64)
    got = row_lse(lw, row, 4)
    assert torch.allclose(got, torch.tensor([math.log(math.e + math.e**2), -math.inf, 700.0, -math.inf], dtype=F64))
    assert torch.allclose(row_lse(lw - 5000, row, 4)[0], got[0] - 5000)
    lw = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(row_lse(lw, torch.zeros(2, dtype=torch.long), 1).sum(), lw)
    assert torch.allclose(g, lw.detach().softmax(0))
    tree = (torch.arange(3), [torch.arange(6).reshape(3, 2), None], "x")
    index = torch.tensor([2, 0])
    got = pick(tree, index)
    assert got[0].tolist() == [2, 0] and got[1][0].tolist() == [[4, 5], [0, 1]] and got[1][1] is None and got[2] == "x"


def test_evidence_and_weights():
    leaves = nodes([0, 0, 1, 1, 1], [0, 0, 1, 1, 1])
    leaves = Nodes(**(vars(leaves) | {"log_w": torch.tensor([0.0, math.log(3), 1.0, 1.0, 1.0], dtype=F64)}))
    tree = Trajectory(torch.tensor([1.0, 0.0]), (nodes([-1, -1], [0, 1]), leaves), torch.tensor([0.5, -1.0], dtype=F64))
    assert torch.allclose(tree.log_evidence(), torch.tensor([0.5 + math.log(2), 0.0], dtype=F64))
    assert torch.allclose(tree.weights(), torch.tensor([0.25, 0.75, 1 / 3, 1 / 3, 1 / 3], dtype=F64))


def test_nodes_enter_select_and_bare():
    x = draw(3, 2).float()
    fresh = Nodes.enter(x)
    assert fresh.row.tolist() == [0, 1, 2] and fresh.parent.tolist() == [-1] * 3 == fresh.origin.tolist()
    assert torch.equal(fresh.log_w, torch.zeros(3)) and torch.equal(fresh.log_prob, torch.zeros(3)) and len(fresh) == 3
    assert Nodes.enter(x.bfloat16()).log_w.dtype == torch.float32
    entered = Nodes.enter(x, torch.tensor([1, 1, 0]), torch.tensor([5, 6, 7]))
    assert entered.row.tolist() == [1, 1, 0] and entered.origin.tolist() == [5, 6, 7]
    full = full_nodes(3)
    some = full[torch.tensor([2, 0])]
    assert torch.equal(some.posterior.x0, full.posterior.x0[[2, 0]]) and torch.equal(some.x, full.x[[2, 0]])
    assert torch.equal(some.step.mean, full.step.mean[[2, 0]]) and torch.equal(some.carry[0], full.carry[0][[2, 0]])
    bare = full.bare()
    assert bare.posterior is bare.gradient is bare.step is bare.carry is None and bare.value is full.value


def full_nodes(n: int, std: torch.Tensor | None = None, seed: int = 0) -> Nodes:
    x = draw(n, 2, seed=seed)
    law = Gaussian(x * 2, torch.full((), 0.5, dtype=F64) if std is None else std)
    known = {
        "posterior": Posterior(x, -x, RF, 0.5, x * 3, x * 4), "value": x[:, 0], "gradient": x + 1, "step": law,
        "carry": (x, x[:, 0]), "trace": (x[:, 0], None),
    }  # fmt: skip
    return Nodes(**(vars(Nodes.enter(x)) | known))


def test_join():
    a, b = full_nodes(2), full_nodes(3, draw(3, 1, seed=5).exp(), seed=1)
    both = a.join(b)
    assert len(both) == 5 and torch.equal(both.x, torch.cat([a.x, b.x])) and both.row.tolist() == [0, 1, 0, 1, 2]
    for name in ("x0", "eps", "v", "output"):
        want = torch.cat([getattr(a.posterior, name), getattr(b.posterior, name)])
        assert torch.equal(getattr(both.posterior, name), want)
    assert both.posterior.t == 0.5 and both.posterior.process is RF
    assert torch.equal(both.step.mean, torch.cat([a.step.mean, b.step.mean]))
    assert torch.equal(both.step.std, torch.cat([torch.full((2, 1), 0.5, dtype=F64), b.step.std]))
    assert torch.equal(both.carry[1], torch.cat([a.carry[1], b.carry[1]])) and both.trace[1] is None
    # what only one side knows is dropped, except the kernel's memory: NaN says "none"
    fresh = Nodes.enter(draw(2, 2, seed=7))
    mixed = a.join(fresh)
    assert mixed.posterior is mixed.value is mixed.step is mixed.trace is None
    assert torch.equal(mixed.carry[0][:2], a.carry[0]) and torch.isnan(mixed.carry[0][2:]).all()
    assert torch.isnan(fresh.join(a).carry[1][:2]).all() and torch.equal(fresh.join(a).carry[1][2:], a.carry[1])
    assert fresh.join(fresh).carry is None
    # posteriors at different times keep their own
    other = Nodes(**(vars(b) | {"posterior": Posterior(b.x, -b.x, RF, 0.25, b.x, b.x)}))
    assert a.join(other).posterior.t.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25]
    each = Nodes(**(vars(b) | {"posterior": Posterior(b.x, -b.x, RF, torch.tensor([0.1, 0.2, 0.3], dtype=F64))}))
    assert a.join(each).posterior.t.tolist() == [0.5, 0.5, 0.1, 0.2, 0.3] and a.join(each).posterior.v is None


def test_transitions():
    tree = ragged()
    flat = tree.transitions()
    assert len(flat) == 3 + 3 + 7
    assert flat.level.tolist() == [0] * 3 + [1] * 3 + [2] * 7
    assert flat.t.tolist() == [1.0] * 3 + [0.7] * 3 + [0.3] * 7 and flat.s.tolist() == [0.7] * 3 + [0.3] * 3 + [0.0] * 7
    assert torch.equal(flat.x[:3], tree.at(0).x[[0, 0, 1]]) and torch.equal(flat.x_next[:3], tree.at(1).x)
    assert torch.equal(flat.x[3:6], tree.at(1).x[[0, 2, 2]]) and torch.equal(flat.x_next[3:6], tree.at(2).x[[0, 1, 3]])
    assert flat.weight is None and flat.mean is None and flat.carry is None
    credit = [None, draw(3, seed=5), None, draw(7, 2, seed=6)]
    some = tree.transitions([None, draw(3, seed=5), draw(4, seed=6), draw(7, seed=7)], lambda k, t, s: k != 0)
    assert some.level.tolist() == [1] * 3 + [2] * 7
    assert torch.equal(some.weight, torch.cat([draw(4, seed=6)[[0, 1, 3]], draw(7, seed=7)]))
    last = tree.transitions([None, None, None, credit[3]])
    assert torch.equal(last.weight, credit[3]) and last.level.tolist() == [2] * 7
    seen = []
    tree.transitions(where=lambda k, t, s: seen.append((k, t, s)) or True)
    assert seen == [(0, 1.0, 0.7), (1, 0.7, 0.3), (2, 0.3, 0.0)]
    part = flat[torch.tensor([4, 0])]
    assert part.level.tolist() == [1, 0] and torch.equal(part.x, flat.x[[4, 0]])
    for nothing in ({"where": lambda k, t, s: False}, {"weights": [None] * 4}):
        with pytest.raises(ValueError, match="no step of this rollout can be trained on"):
            tree.transitions(**nothing)


def test_transitions_keep_the_mean_and_memory_where_the_rollout_kept_them():
    world = Normal()
    times = torch.linspace(1, 0, 4, dtype=F64)
    start = Nodes.enter(world.start(draw(3, 2)))
    tree = rollout(Policy(world), Ancestral(Ddim()), times, start, noise=Noise(0), keep=True)
    flat = tree.transitions()
    assert torch.equal(flat.mean, torch.cat([tree.at(k).step.mean for k in range(3)]))
    solved = rollout(Policy(world), SecondOrder(), times, start, noise=Noise(0), keep=True).transitions(
        where=lambda k, t, s: k > 0
    )
    assert solved.carry[0].shape == (6, 2) and solved.carry[1].shape == (6,)
    assert rollout(Policy(world), SecondOrder(), times, start, noise=Noise(0)).transitions().carry is None


def test_grafting_grows_a_search_tree():
    """Grow twice from nodes of a tree; the graft's backup is that of one tree, by brute force."""
    world, kernel = Normal(), Ancestral(Ddim())
    times = torch.linspace(1, 0, 5, dtype=F64)
    start = Nodes.enter(world.start(draw(2, 1)), torch.tensor([0, 1]))
    tree = rollout(Policy(world), kernel, times, start, noise=Noise(0), select=Branch({1: 2}))
    log_z = tree.log_z
    for round_, (level, origin) in enumerate([(2, [0, 1, 1]), (3, [2, 0])]):
        at = tree.at(level - 1)
        source = torch.tensor(origin)
        entry = Nodes.enter(draw(len(origin), 1, seed=9 + round_), at.row[source], source)
        grown = rollout(Policy(world), kernel, times, {level: entry}, noise=Noise(5 + round_), n_rows=2)
        before = tree
        tree = tree.graft(grown)
        n = len(before.at(level))
        assert torch.equal(tree.at(level).parent[n:], source) and torch.equal(tree.at(level).row[n:], at.row[source])
        assert torch.equal(tree.at(level).parent[:n], before.at(level).parent)
        assert torch.equal(tree.at(level + 1).parent[len(before.at(level + 1)) :], torch.arange(len(origin)) + n)
        assert torch.equal(tree.leaves.x, torch.cat([before.leaves.x, grown.leaves.x]))
        assert tree.log_z is log_z and tree.first == 0
    assert len(tree.leaves) == 4 + 3 + 2
    check_backup(tree, draw(9, seed=3))
    roots = torch.stack([tree.lineage()[0], tree.leaves.row])
    assert torch.equal(roots[0], roots[1])  # every leaf still descends from its own prompt


def test_full_tree_value_is_unbiased():
    """steering.md E11: E[exp λV_root] = Z for a full tree, whatever its widths."""
    from worlds import chain, chain_log_z, riccati

    world, kernel, times = Normal(), Ancestral(Ddim()), torch.linspace(1, 0, 4, dtype=F64)
    links = chain(world, kernel, times)
    z = chain_log_z(world, riccati(links, 0.0, 1.2), 1.0).exp()
    n = 3000
    start = Nodes.enter(world.start(draw(n, 1)), torch.arange(n))
    tree = rollout(Policy(world), kernel, times, start, noise=Noise(1), select=Branch({0: 2, 1: 2, 2: 1}))
    root = (0.6 * tree.backup(2.0 * tree.leaves.x[:, 0], 0.6)[0]).exp()
    error = root.std() / n**0.5
    assert error < 0.02 * z and abs(root.mean() - z) < 4 * error
