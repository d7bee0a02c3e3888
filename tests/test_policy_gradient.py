"""The policy-gradient family: credit rules by hand and brute force, identities, every method learning on the toy."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowalign import checkpoint
from flowalign.cli import main
from flowalign.collect import Collector, collect
from flowalign.config import compose
from flowalign.credit import Normalise, Tree
from flowalign.experience import Experience
from flowalign.fit import fit
from flowalign.kernels import EulerMaruyama, Windowed
from flowalign.laws import Constant, FlowGrpo, Table
from flowalign.methods import METHODS, names, resolve
from flowalign.methods.b2_diffurl import B2DiffuRL
from flowalign.methods.dance_grpo import DanceGRPO
from flowalign.methods.ddpo import DDPO, History
from flowalign.methods.dense_grpo import Calibration, DenseGRPO
from flowalign.methods.euphonium import Euphonium
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.methods.g2rpo import G2RPO
from flowalign.methods.grpo_guard import GRPOGuard
from flowalign.methods.mix_grpo import MixGRPO, compressed
from flowalign.methods.rlcm import RLCM
from flowalign.methods.talk2move import Talk2Move
from flowalign.methods.tp_grpo import TPGRPO, turning_points
from flowalign.methods.tree_grpo import TreeGRPO
from flowalign.noise import Noise, Stream
from flowalign.objectives import Clip
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.prepare import prepare
from flowalign.rollout import rollout
from flowalign.scorer import Scorer
from flowalign.selection import Branch
from flowalign.source import Prompts
from flowalign.thinning import extremes, live_groups, random_steps, with_best
from flowalign.trajectory import Nodes, Transitions
from flowalign.valuenet import LatentValue, ValueLearner, word_ids
from flowalign.windows import Growing, Random, Sliding
from tests.toy import Bright, Toy
from tests.worlds import F64, Normal

WORLD = Normal(0.5, 0.4)
TIMES = torch.linspace(1, 0, 9, dtype=F64)
SDE = EulerMaruyama(FlowGrpo(0.7))
OPTIONS = FitOptions(iterations=24, groups=4, size=8, steps=6, lr=3e-3, batch=64, weight_decay=0.0)

SMALL = {
    "b2-diffurl": B2DiffuRL(width=4, clip=1e-2, stages=10, margin=0.0),
    "dance-grpo": DanceGRPO(eta=0.5, clip=1e-2, fraction=0.8),
    "dance-grpo-extremes": DanceGRPO(eta=0.5, clip=1e-2, keep=2, shared_noise=False),
    "ddpo": DDPO(clip=1e-2, least=8),
    "dense-grpo": DenseGRPO(clip=1e-2, kl=0.0, rounds=2),
    "euphonium": Euphonium(eta=0.5, clip=1e-2, width=16, scale=0.02),
    "flow-grpo": FlowGRPO(clip=1e-2, kl=0.0),
    "g2rpo": G2RPO(levels=(0, 1, 2), width=8, clip=1e-2),
    "grpo-guard": GRPOGuard(clip=1e-3),
    "mix-grpo": MixGRPO(width=3, period=4, clip=1e-2),
    "mix-grpo-flash": MixGRPO(width=2, period=4, clip=1e-2, flash=0.5),
    "mix-grpo-fast": MixGRPO(noise=0.8, noise_law="cps", width=2, strategy="random", clip=1e-2, shared_noise=False),
    "rlcm": RLCM(clip=1e-2),
    "rlcm-rebel": RLCM(loss="rebel", eta=0.05),
    "talk2move": Talk2Move(noise=0.7, exits=(2, 4), clip=1e-2),
    "tp-grpo": TPGRPO(clip=1e-2),
    "tree-grpo": TreeGRPO(eta=0.5, splits=(0, 2, 3), clip=1e-2),
    "tree-grpo-dynamic": TreeGRPO(eta=0.5, splits=(0, 1, 2), window=(0, 3), growth=1.0, reach=1.0, supervised=0.1),
    "tree-grpo-pruned": TreeGRPO(
        eta=0.5, splits=(0, 2, 3), clip=1e-2, prune_width="extremes", prune_depth=(4, 5), prune_period=4
    ),
}


def start(method, options: FitOptions = OPTIONS, seed: int = 0, **kwargs):
    toy = Toy(seed)
    recipe = method.recipe(toy.times(options.steps))
    policy, parameters = prepare(toy, None, recipe.roles, old=recipe.old, ema=0.9)
    scorer = Scorer(toy, {"bright": Bright()})
    return toy, fit(toy, scorer, Prompts(["a"]), recipe, options, policy=policy, parameters=parameters, **kwargs)


def test_every_training_method_is_tried() -> None:
    """A method without a row here would be one that nobody has seen learn."""
    tried = {name for name in METHODS if any(s == name or s.startswith(name + "-") for s in SMALL)}
    assert {n for n in names("training") if "grpo" in n or n in ("ddpo", "rlcm", "g2rpo", "euphonium")} <= tried


def judged(toy: Toy) -> torch.Tensor:
    """Rewards of the ODE from 256 fixed noises: the policy alone, without its exploration."""
    z = torch.randn(256, 3, 2, 2, generator=torch.Generator().manual_seed(9))
    cond = toy.encode(["a"])
    ends = rollout(Policy(toy), EulerMaruyama(), toy.times(6), Nodes.enter(z), noise=Noise(0)).leaves.x
    return Bright()(toy.decode(ends, cond), ["a"] * 256)


@pytest.mark.parametrize("name", SMALL)
def test_learns(name: str) -> None:
    """On the same noises the trained policy's rewards beat the base's by more than 5 standard errors, paired."""
    toy, metrics = start(SMALL[name])
    before = judged(toy)
    assert len(list(metrics)) == OPTIONS.iterations
    gain = judged(toy) - before
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5 and gain.mean() > 0.005


@pytest.mark.parametrize("name", SMALL)
def test_resumes_bitwise(name: str, tmp_path: Path) -> None:
    """Windows, tables, histories, exit steps and value networks all survive a restart."""
    o = replace(OPTIONS, iterations=6, checkpoint_every=1)
    whole, metrics = start(SMALL[name], o, folder=tmp_path / "a")
    list(metrics)
    _, metrics = start(SMALL[name], o, folder=tmp_path / "b")
    next(metrics), next(metrics), next(metrics)
    metrics.close()
    cut, metrics = start(SMALL[name], o, folder=tmp_path / "b", resume=True)
    assert len(list(metrics)) == 3
    for p, q in zip(whole.denoiser.parameters(), cut.denoiser.parameters(), strict=True):
        assert torch.equal(p, q)
    a, b = (checkpoint.load(checkpoint.latest(tmp_path / n)) for n in "ab")
    assert repr(a["learners"]) == repr(b["learners"]) and repr(a["credit"]) == repr(b["credit"])


# ------------------------------------------------------------------------------------------------ credit rules


def by_hand(r: list[float], first: bool) -> list[float]:
    """Turning points, step by step, as the paper says it."""
    sign = lambda z: (z > 0) - (z < 0)  # noqa: E731
    d = [b - a for a, b in itertools.pairwise(r)]
    s = [sign(x) * sign(r[-1] - r[0]) for x in d]
    out = []
    for k in range(len(d)):
        turn = s[k] > 0 and (s[k - 1] < 0 if k else first) and sign(d[k]) * sign(r[-1] - r[k + 1]) > 0
        out.append(r[-1] - r[k] if turn else d[k])
    return out


@pytest.mark.parametrize("first", [False, True])
def test_turning_points_of_every_sign_pattern(first: bool) -> None:
    """All 3^4 patterns of rises, falls and rests, against the rule written out."""
    for moves in itertools.product((-1.0, 0.0, 1.0), repeat=4):
        sizes = [0.3, 0.5, 0.2, 0.7]
        r = [0.1]
        for m, z in zip(moves, sizes, strict=True):
            r.append(r[-1] + m * z)
        got = turning_points(torch.tensor(r, dtype=F64)[:, None], first)[:, 0]
        assert torch.allclose(got, torch.tensor(by_hand(r, first), dtype=F64), atol=1e-12), (moves, r)


def test_granularities_by_brute_force() -> None:
    """G²RPO's credit: completions on each strided grid, one by one, normalised per stride and summed."""
    toy, method = Toy(), G2RPO(levels=(1,), width=8, strides=(1, 2))
    recipe = method.recipe(toy.times(6))
    policy, _ = prepare(toy, None, recipe.roles)
    e = collect(
        Collector(toy, Scorer(toy, {"bright": Bright()}), policy, recipe, 6, 0), Prompts(["a"]).draw(0, 1, 8), 0
    )
    grid, nodes, expected = toy.times(6), e.trajectory.at(2), torch.zeros(8)
    for times in (grid[2:], grid[[2, 3, 5, 6]]):
        r = torch.stack([
            toy.decode(rollout(Policy(toy), EulerMaruyama(), times, Nodes.enter(nodes.x[i : i + 1]), e.cond,
                               noise=Noise(0)).leaves.x, e.cond).mean() for i in range(8)
        ])  # fmt: skip
        expected += (r - r.mean()) / (r.std() + 1e-8)
    credit = recipe.credit(e)
    assert torch.allclose(credit[2], expected.clamp(-5, 5), atol=2e-3)
    assert all(c is None for k, c in enumerate(credit) if k != 2)


def world_experience(tree, group: torch.Tensor, total: torch.Tensor) -> Experience:
    return Experience(Policy(WORLD), tree, None, group, {"r": total}, {"r": 1.0}, lambda x, i: {"r": x[:, 0]})


def test_tree_credit_by_brute_force() -> None:
    """Each node's advantage is the mean of its own leaves, normalised among the nodes of its depth."""
    tree = rollout(Policy(WORLD), SDE, TIMES, Nodes.enter(torch.randn(2, 1, dtype=F64)), noise=Noise(0),
                   select=Branch({0: 2, 3: 3}))  # fmt: skip
    total = torch.randn(12, dtype=F64)
    credit = Tree()(world_experience(tree, torch.tensor([0, 1]), total))
    for k in range(9):
        owner = tree.lineage()[k]
        means = torch.stack([total[owner == i].mean() for i in range(len(tree.at(k)))])
        for g in (0, 1):
            mine = tree.at(k).row == g
            m = means[mine]
            expected = (m - m.mean()) / (m.std() + 1e-8) if len(m) > 1 else torch.zeros(1, dtype=F64)
            assert torch.allclose(credit[k][mine], expected.clamp(-5, 5), atol=1e-9)


def test_one_branch_tree_is_a_chain() -> None:
    """A tree that splits once, at its root, is a group of chains: same samples, same credit."""
    a = rollout(
        Policy(WORLD), SDE, TIMES, Nodes.enter(torch.ones(1, 1, dtype=F64)), noise=Noise(0), select=Branch({0: 4})
    )
    chains = Nodes.enter(torch.ones(4, 1, dtype=F64), torch.zeros(4, dtype=torch.long))
    b = rollout(Policy(WORLD), SDE, TIMES, chains, noise=Noise(0))
    assert torch.equal(a.leaves.x, b.leaves.x)
    total = a.leaves.x[:, 0]
    x, y = (Tree()(world_experience(t, torch.tensor([0]), total)) for t in (a, b))
    assert all(torch.equal(p, q) for p, q in zip(x[1:], y[1:], strict=True))


def test_history_by_hand() -> None:
    """DDPO: a prompt is compared with its own last rewards once it has enough of them, else with the batch."""
    toy = Toy()
    tree = rollout(Policy(toy), SDE, toy.times(2), Nodes.enter(torch.randn(4, 3, 2, 2), torch.tensor([0, 0, 1, 1])),
                   toy.encode(["a", "b"]), noise=Noise(0))  # fmt: skip
    credit = History(size=3, least=3, clamp=10.0)
    rounds = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 0.0]]
    for total in rounds:
        e = Experience(Policy(toy), tree, toy.encode(["a", "b"]), torch.tensor([0, 1]),
                       {"r": torch.tensor(total)}, {"r": 1.0}, lambda x, i: {})  # fmt: skip
        out = credit(e)[-1]
    a, b = torch.tensor([2.0, 5.0, 6.0]), torch.tensor([4.0, 0.0, 0.0])
    expected = [(5 - a.mean()) / a.std(correction=0), (6 - a.mean()) / a.std(correction=0)]
    expected += [(0 - b.mean()) / b.std(correction=0)] * 2
    assert torch.allclose(out, torch.stack(expected), atol=1e-4)
    fresh = History(size=3, least=3)
    fresh.load_state_dict(credit.state_dict())
    assert fresh.seen == credit.seen == {"a": [2.0, 5.0, 6.0], "b": [4.0, 0.0, 0.0]}


def test_history_is_the_prompts_own_and_cuts_at_ten() -> None:
    """What a prompt was worth is found again wherever its row is; an outlier of 12 standard deviations counts as 10."""
    toy = Toy()
    credit = History(size=200, least=2)
    for prompts, total in ((["a", "b"], [1.0] * 150 + [7.0] * 2), (["b", "a"], [7.0] * 2 + [2.0])):
        row = torch.tensor(
            [prompts.index(p) for p in (["a"] * 150 + ["b"] * 2 if prompts[0] == "a" else ["b"] * 2 + ["a"])]
        )
        x = Nodes.enter(torch.zeros(len(row), 3, 2, 2), row)
        tree = rollout(Policy(toy), SDE, toy.times(2), x, toy.encode(prompts), noise=Noise(0))
        e = Experience(Policy(toy), tree, toy.encode(prompts), torch.tensor([0, 1]),
                       {"r": torch.tensor(total)}, {"r": 1.0}, lambda x, i: {})  # fmt: skip
        out = credit(e)[-1]
    assert out.tolist() == pytest.approx([0.0, 0.0, 10.0], abs=1e-3)
    assert len(credit.seen["a"]) == 151 and credit.seen["b"] == [7.0] * 4


def test_calibration_finds_the_level() -> None:
    """ψ rises while signs are balanced and falls where noise drowns them: it settles where balance ends."""
    right = torch.tensor([0.30, 0.80], dtype=F64)
    table = Table(torch.tensor([1.0, 0.5]), torch.tensor([0.6, 0.6], dtype=F64))
    calibration = Calibration(table, gains=None, rounds=0, tolerance=2.0, step=0.01)
    for _ in range(60):
        balanced = torch.tensor([1.0, -1.0] * 12)
        drowned = -torch.ones(24)
        calibration.update([balanced if psi < r else drowned for psi, r in zip(table.values, right, strict=True)])
    assert (table.values - right).abs().max() < 0.011


# ------------------------------------------------------------------------------------------------ identities


def test_guard_centres_the_ratio() -> None:
    """The guarded log-ratio has mean 0 and the same spread at every step, whatever the step's noise."""
    n, shift = 40_000, 0.03
    spreads = []
    for std in (0.02, 0.1, 0.5):
        mean = torch.zeros(n, 2, dtype=F64)
        x = mean + std * torch.randn(n, 2, dtype=F64)
        old = torch.distributions.Normal(mean, std).log_prob(x).sum(1)
        one = torch.ones(n)
        steps = Transitions(mean, x, one, one * 0.5, one.long() * 0, one.long() * 0, old, mean=mean)
        from flowalign.gaussian import Gaussian

        r = Clip(SDE, ratio="guard").log_ratio(Gaussian(mean + shift, torch.tensor(std, dtype=F64)), steps)
        assert abs(r.mean()) < 4 * r.std() / n**0.5
        spreads.append(r.std())
    exact = shift / 2**0.5  # √(mean d² / D)
    assert max(abs(s - exact) for s in spreads) < 4 * exact / (2 * n) ** 0.5


def test_policy_gradient_is_the_score_identity() -> None:
    """At ratio 1, ∇loss = -E[A ∇log p] = -∇E[r]: for a linear reward and a shift of one step's mean, -its slope."""
    n = 100_000
    theta = torch.zeros((), dtype=F64, requires_grad=True)

    class Moved:
        process = WORLD.process

        def posterior(self, x, t, cond=None):
            v = WORLD.posterior(x, t).velocity + theta
            return self.process.posterior(x, t, v=v)

    tree = rollout(Policy(Moved()), SDE, torch.tensor([0.6, 0.5], dtype=F64), Nodes.enter(torch.zeros(n, 1, dtype=F64)),
                   noise=Stream(torch.Generator().manual_seed(0)))  # fmt: skip
    reward = 2.0 * tree.leaves.x[:, 0]
    steps = tree.transitions([None, reward - reward.mean()])
    (g,) = torch.autograd.grad(Clip(SDE, None, "density")(Policy(Moved()), steps).terms["policy"], theta)
    law, _ = SDE(torch.zeros(1, 1, dtype=F64), Moved().posterior(torch.zeros(1, 1, dtype=F64), 0.6), 0.6, 0.5)
    (slope,) = torch.autograd.grad(law.mean.sum(), theta)
    assert abs(g + 2.0 * slope) < 4 * 2.0 * abs(slope) * 2**0.5 / n**0.5


def test_euphonium_without_guidance_is_dance_grpo() -> None:
    """No guidance and no process column: the same weights after training, bit for bit."""
    a, run = start(Euphonium(eta=0.4, scale=0.0, process=0.0, clip=1e-2))
    list(run)
    b, run = start(DanceGRPO(eta=0.4, clip=1e-2))
    list(run)
    for p, q in zip(a.denoiser.parameters(), b.denoiser.parameters(), strict=True):
        assert torch.equal(p, q)


def test_euphonium_recovers_flow_grpo() -> None:
    """On Flow-GRPO's noise, with its normalisation and without guidance: Flow-GRPO's weights, bit for bit."""

    a, run = start(Euphonium(eta=0.7, noise_law="flow", std="batch", scale=0.0, process=0.0, clip=1e-2, fraction=1.0,
                             shared_noise=False))  # fmt: skip
    list(run)
    b, run = start(FlowGRPO(noise=0.7, kl=0.0, clip=1e-2))
    list(run)
    for p, q in zip(a.denoiser.parameters(), b.denoiser.parameters(), strict=True):
        assert torch.equal(p, q)


def test_window_of_all_steps_is_no_window() -> None:
    """Windowed over everything equals the kernel itself."""
    x = Nodes.enter(torch.randn(5, 1, dtype=F64))
    everywhere = Windowed(SDE, Sliding(TIMES, 8, period=1))
    a, b = (rollout(Policy(WORLD), k, TIMES, x, noise=Noise(1)) for k in (SDE, everywhere))
    assert torch.equal(a.leaves.x, b.leaves.x)
    steps = a.transitions([None] + [torch.ones(5, dtype=F64)] * 8)
    p, q = (Clip(k, 1e-2)(Policy(WORLD), steps).terms["policy"] for k in (SDE, everywhere))
    assert torch.equal(p, q)


def test_trees_share_prefixes() -> None:
    """The tree costs exactly its nodes: 1+2·2+... instead of leaves × steps."""
    toy, method = Toy(), TreeGRPO(eta=0.5, splits=(0, 2, 3))
    recipe = method.recipe(toy.times(6))
    policy, _ = prepare(toy, None, recipe.roles)
    collect(Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, 6, 0), Prompts(["a"]).draw(0, 2, 8), 0)
    assert policy.ledger.evaluations == 2 * (1 + 2 + 2 + 4 + 8 + 8)


# ------------------------------------------------------------------------------------------------ machinery


def steps_of(n: int = 6, rows: int = 2):
    tree = rollout(Policy(WORLD), SDE, TIMES, Nodes.enter(torch.randn(n * rows, 1, dtype=F64),
                   torch.arange(rows).repeat_interleave(n)), noise=Noise(0))  # fmt: skip
    total = tree.leaves.x[:, 0]
    e = world_experience(tree, torch.arange(rows), total)
    return tree, e, tree.transitions([None] + [Normalise()(total, e.group[tree.leaves.row])] * 8)


def test_random_steps_keep_a_fraction_of_each_sample() -> None:
    _, e, steps = steps_of()
    kept = random_steps(0.5)(steps, e)
    assert (torch.bincount(kept.child) == 4).all() and len(set(kept.level[kept.child == 0].tolist())) == 4
    assert not torch.equal(kept.level[kept.child == 0], kept.level[kept.child == 1])
    for other in (replace(e, iteration=1), replace(e, seed=1)):
        assert not torch.equal(
            kept.level * 100 + kept.child, (lambda k: k.level * 100 + k.child)(random_steps(0.5)(steps, other))
        )


def test_extremes_and_live_groups_and_targets() -> None:
    tree, e, steps = steps_of()
    kept = extremes(1, 1)(steps, e)
    for g in (0, 1):
        mine = (tree.leaves.row == g).nonzero().flatten()
        r = e.total[mine]
        assert set(kept.child[kept.row == g].tolist()) == {int(mine[r.argmax()]), int(mine[r.argmin()])}
    dull = replace(steps, weight=torch.where(steps.row == 0, 0.0, steps.weight))
    assert set(live_groups(dull, e).row.tolist()) == {1}
    best = with_best(steps, e)
    assert torch.equal(best.target[best.row == 1][0], tree.leaves.x[6:][e.total[6:].argmax()])


def test_the_best_leaf_teaches_its_own_ancestors_alone() -> None:
    """On a tree: of each group and level exactly the node on the way to the best leaf, found by walking up from it."""
    tree = rollout(Policy(WORLD), SDE, TIMES, Nodes.enter(torch.randn(2, 1, dtype=F64)), noise=Noise(0),
                   select=Branch({0: 2, 3: 3}))  # fmt: skip
    e = world_experience(tree, torch.tensor([0, 1]), torch.randn(12, dtype=F64))
    taught = with_best(tree.transitions([None, *(torch.ones(len(n)) for n in tree.levels[1:])]), e)
    leaves, groups = tree.leaves, e.group[tree.leaves.row]
    for g in groups.unique().tolist():
        mine = (groups == g).nonzero().flatten()
        node, want = int(mine[e.total[mine].argmax()]), set()
        for level in range(len(tree.levels) - 1, tree.first, -1):
            want.add((level - 1, node))
            node = int(tree.at(level).parent[node])
        here = taught.taught & (e.group[taught.row] == g)
        assert {(k, c) for k, c in zip(taught.level[here].tolist(), taught.child[here].tolist(), strict=True)} == want
    assert 0 < taught.taught.float().mean() < 0.5 and len(leaves) > len(groups.unique())


def test_windows_move_as_told() -> None:
    slide = Sliding(TIMES, 3, stride=2, period=2, stop=7)
    seen = []
    for _ in range(8):
        seen.append(slide.bounds[0])
        slide.observe(None)
    assert seen == [0, 0, 2, 2, 4, 4, 0, 0]
    starts = set()
    draw = Random(TIMES, 2)
    for _ in range(60):
        starts.add(draw.bounds[0])
        draw.observe(None)
    assert starts == {0, 1, 2}
    grow = Growing(TIMES, 6, 8, stages=3, period=2)
    widths = []
    for _ in range(8):
        widths.append(grow.bounds[1] - grow.bounds[0])
        grow.observe(None)
    assert widths == [6, 6, 7, 7, 8, 8, 8, 8]
    blurred = float(torch.tensor(TIMES[2].item(), dtype=torch.float32))
    assert Sliding(TIMES, 3)(blurred, 0.0) and not Sliding(TIMES, 2)(blurred, 0.0)


def test_compressed_grid_keeps_its_ends() -> None:
    grid = torch.linspace(1, 0, 26, dtype=F64)
    short = compressed(grid, 5, 0.4)
    assert torch.equal(short[:6], grid[:6]) and short[-1] == 0 and len(short) == 6 + 8
    assert torch.equal(compressed(grid, 5, 1.0), grid)


def test_talk2move_exits_where_the_variance_is() -> None:
    """The exit is the candidate whose rewards spread most, and the run then costs exit + 1 calls a sample."""
    method = Talk2Move(noise=0.7, exits=(1, 3, 5), clip=1e-2)
    toy = Toy()
    recipe = method.recipe(toy.times(6))
    policy, _ = prepare(toy, None, recipe.roles)
    collector = Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, 6, 0)
    exit_ = recipe.learners[0]
    exit_.before(collector, Prompts(["a"]), replace(OPTIONS, groups=8))
    assert policy.ledger.evaluations == 64 * (5 + 1), "all candidates share the longest one's chain"
    assert collector.scorer.ledger.rewards == collector.scorer.ledger.decodes == 64 * 3
    assert exit_.step == max(exit_.variances, key=exit_.variances.get) and len(exit_.variances) == 3
    policy.ledger.evaluations = 0
    collect(collector, Prompts(["a"]).draw(0, 2, 4), 0)
    assert policy.ledger.evaluations == 8 * (exit_.step + 1) and not collector.recipe.keep


def test_value_network_learns_and_differentiates() -> None:
    """It predicts a reward that depends on state and prompt, and its gradient is a finite difference."""
    learner = ValueLearner(width=16, lr=5e-3, passes=3)
    toy = Toy()
    policy, _ = prepare(toy, None)
    recipe = FlowGRPO(kl=0.0).recipe(toy.times(6))
    collector = Collector(toy, Scorer(toy, {"b": Bright()}), policy, replace(recipe, learners=(learner,)), 6, 0)
    losses = [
        learner.observe(collect(collector, Prompts(["a", "b dark"]).draw(i, 4, 16), i))["value/loss"] for i in range(30)
    ]
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])
    x, t, row = torch.randn(4, 3, 2, 2), torch.full((4,), 0.4), torch.zeros(4, dtype=torch.long)
    g, d = learner.gradient(x, t, row), torch.randn(4, 3, 2, 2)
    h = 1e-2
    fd = (learner(x + h * d, t, row) - learner(x - h * d, t, row)) / (2 * h)
    assert torch.allclose(fd, (g * d).flatten(1).sum(1), rtol=0.05, atol=2e-3)
    fresh = ValueLearner(width=16)
    fresh.load_state_dict(learner.state_dict())
    fresh.enter(learner.prompts)
    assert torch.equal(fresh(x, t, row), learner(x, t, row))


def test_value_network_shapes_and_words() -> None:
    for shape in ((4, 16), (4, 8, 8), (4, 3, 8, 8)):
        out = LatentValue(shape, 8)(torch.randn(2, *shape), torch.tensor([0.1, 0.9]), word_ids(["a b", "c"]))
        assert out.shape == (2,)
    assert torch.equal(word_ids(["a b"])[0], word_ids(["A b", "c"])[0])
    with pytest.raises(ValueError, match="states must be"):
        LatentValue((4,))


def test_process_credit_adds_losses() -> None:
    """Two credit columns give the sum of two clipped losses, not the loss of their sum."""
    _, _, steps = steps_of()
    two = replace(steps, weight=torch.stack([steps.weight, -2 * steps.weight], 1))
    policy, moved = Policy(WORLD), replace(steps, log_prob=steps.log_prob - 0.3)
    loss = lambda s, w: Clip(SDE, 1e-2)(policy, replace(s, weight=w)).terms["policy"]  # noqa: E731
    both = loss(moved, two.weight)
    assert torch.allclose(both, loss(moved, steps.weight) + loss(moved, -2 * steps.weight))
    assert not torch.allclose(both, loss(moved, -steps.weight))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (TreeGRPO(splits=(7,)), "copies"),
        (G2RPO(levels=(9,)), "levels must lie"),
        (MixGRPO(width=9), "does not fit"),
        (MixGRPO(width=3, stop=2), "use 3 to 5"),
        (MixGRPO(width=3, stop=6, strategy="random"), "use 3 to 5"),
        (Talk2Move(exits=(9,)), "exit steps"),
        (FlowGRPO(window=(3, 3)), "window"),
    ],
)
def test_settings_that_do_not_fit(method, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        method.recipe(torch.linspace(1, 0, 7, dtype=F64))


def test_presets_make_recipes() -> None:
    """Published and demo settings exist for every training method and fit their own number of steps."""
    for name in names("training"):
        presets = resolve(name).presets()
        assert {"published", "demo"} <= set(presets), name
        for preset in presets.values():
            preset.method.recipe(torch.linspace(1, 0, preset.fit.steps + 1, dtype=F64))


def test_methods_are_listed_with_their_presets(capsys) -> None:
    """``flowalign methods --json``: every method, its reference, and presets that a configuration file can hold."""
    main(["methods", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(METHODS)
    for name in names("training"):
        assert "arxiv" in found[name]["reference"].lower() and found[name]["summary"], name
        for key, preset in found[name]["presets"].items():
            config = compose({"method": preset["method"], "fit": preset["fit"]}, name, key)
            assert config.method == resolve(name).presets()[key].method, (name, key)
    main(["methods", "flow-grpo", "--json"])
    assert set(json.loads(capsys.readouterr().out)) == {"flow-grpo"}


def test_constant_law_is_dance() -> None:
    """DanceGRPO's kernel is the constant law, and the ODE into data."""
    kernel = DanceGRPO(eta=0.3).recipe(TIMES).kernel
    assert isinstance(kernel, Windowed) and kernel.inside == EulerMaruyama(Constant(0.3))
    assert kernel.outside == EulerMaruyama()
