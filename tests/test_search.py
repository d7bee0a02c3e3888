"""Searches: what they keep is the best of what they saw, at the cost that they say, and within a budget."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from flowalign.cli import main
from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo
from flowalign.ledger import Ledger
from flowalign.methods import rbf
from flowalign.methods.base import Steering
from flowalign.methods.beam import Beam
from flowalign.methods.best_of_n import BestOfN
from flowalign.methods.converted import Converted, Power, same_snr, vp_path
from flowalign.methods.noise_aware import Distil, Seen, Verifier, distil, within_rows
from flowalign.methods.noise_search import NoiseSearch, neighbours
from flowalign.methods.particles import roll, rows_of
from flowalign.methods.rbf import RBF, Walk
from flowalign.methods.ttsnap import TTSnap, cost, omega
from flowalign.noise import START
from flowalign.policy import Policy, final_posterior
from flowalign.prepare import Lora, prepare
from flowalign.process import Karras, Rectified
from flowalign.protocols import Card
from flowalign.rollout import rollout
from flowalign.steer import SearchFailed, steer
from flowalign.trajectory import Nodes
from flowalign.value_file import LatentValues
from flowalign.valuenet import word_ids
from tests.searching import linear, task
from tests.toy import Bright, Toy
from tests.worlds import F64, Normal


# -- noise search ----------------------------------------------------------------------------------------------------
def test_neighbours_lie_on_the_sphere() -> None:
    """Norm kept and cosine θ exactly, whatever the shape and the scale of the direction."""
    z, w = torch.randn(5, 3, 4, dtype=F64), 7 * torch.randn(5, 3, 4, dtype=F64)
    near = neighbours(z, w, 0.95)
    assert torch.allclose(near.flatten(1).norm(dim=1), z.flatten(1).norm(dim=1), atol=1e-12)
    cosine = (near * z).flatten(1).sum(1) / z.flatten(1).norm(dim=1) ** 2
    assert torch.allclose(cosine, torch.full((5,), 0.95, dtype=F64), atol=1e-12)


@pytest.mark.parametrize(
    "method", [NoiseSearch(rounds=5), NoiseSearch("random", 3, 2, 2)], ids=["zero-order", "random"]
)
def test_search_keeps_the_best_of_what_it_saw(method: NoiseSearch) -> None:
    """Each round yields, for every search, the running maximum of all that was judged: it never falls."""
    t = task(linear, prompts=3, samples=2)
    top, seen = torch.full((3,), -math.inf, dtype=F64), 0
    for found in method.search(t):
        for total, prompt in t.judge.asked[seen:]:
            for p in prompt.unique().tolist():
                top[p] = torch.maximum(top[p], total[prompt == p].max())
        seen = len(t.judge.asked)
        assert found.row.tolist() == [0, 0, 1, 1, 2, 2]
        assert torch.equal(found.total.reshape(3, 2).amax(1), top)
    assert torch.equal(linear(found.x, found.row), found.total)


def test_best_so_far_never_falls_and_restarts_pay() -> None:
    """Monotone by search, not only by prompt; with a restart the pivot moves although it did not win."""
    runs = {
        r: [f.total for f in NoiseSearch(rounds=12, pool=2, restart=r).search(task(linear, 4))] for r in (True, False)
    }
    for totals in runs.values():
        assert all((b >= a).all() for a, b in pairwise(totals))
        assert (totals[-1] > totals[0]).all()
    assert len(runs[True]) > len(runs[False]) == 13


def test_search_counts() -> None:
    """The ledger holds exactly what the settings say."""
    counts = {
        NoiseSearch("random", 3, 2, 2): (2 + 4 + 8) * 8,
        NoiseSearch(rounds=3, pool=4, restart=False): (1 + 12) * 8,
        # 2 states over 3 steps; then 3 renoised copies of each: levels 2→5, 4→7, 6→8
        NoiseSearch("paths", pool=2, renoisings=3, first=3): 2 * 3 + 6 * (3 + 3 + 2),
        Beam(2, 3, 3): 6 * 8,
    }
    for method, expected in counts.items():
        t = task(linear, prompts=2, samples=2)
        list(method.search(t))
        assert t.policy.ledger.evaluations == 4 * expected, method


@pytest.mark.parametrize("strategy", ["zero-order", "random"])
def test_pruned_local_search_is_the_same_for_less(strategy: str) -> None:
    """TTSnap inside a local search: where looks rank states exactly, pruning changes nothing but the cost."""
    whole = NoiseSearch(strategy, rounds=3, pool=8, restart=False)
    short = replace(whole, levels=(1, 4), keep=(0.5, 0.25))
    runs = [(t := task(linear, 2, 2), [f.total for f in m.search(t)]) for m in (whole, short)]
    assert torch.equal(torch.stack(runs[0][1]), torch.stack(runs[1][1]))
    first = 4 * 8 if strategy == "zero-order" else 0  # the pivots are not pruned
    assert runs[0][0].policy.ledger.evaluations == first + 4 * 3 * 8 * 8
    assert runs[1][0].policy.ledger.evaluations == first + 4 * 3 * (8 * 2 + 4 * 3 + 1 * 3)


def test_paths_keep_the_marginals() -> None:
    """Without a choice, re-noising and solving down leaves the data's mean and spread; the choice then raises them."""
    n, world = 1500, Normal(0.5, 0.8)
    free = list(NoiseSearch("paths", pool=1, renoisings=1, first=12, up=6, down=10).search(
        task(lambda x, r: x[:, 0], samples=n, shape=(1,), steps=40, world=world)
    ))[-1].x[:, 0]  # fmt: skip
    assert abs(free.mean() - 0.5) < 4 * 0.8 / n**0.5 and abs(free.std() - 0.8) < 4 * 0.8 / (2 * n) ** 0.5 + 0.02
    best = list(NoiseSearch("paths", pool=2, renoisings=2, first=4, up=1, down=3).search(
        task(lambda x, r: x[:, 0], samples=100, shape=(1,), world=world)
    ))[-1].x[:, 0]  # fmt: skip
    assert best.mean() > 0.5 + 0.8


def test_noise_search_settings() -> None:
    with pytest.raises(ValueError, match="at 1 every neighbour is the pivot"):
        NoiseSearch(theta=1.0)
    with pytest.raises(ValueError, match="up < down"):
        NoiseSearch("paths", up=3, down=3)
    with pytest.raises(ValueError, match="levels must rise"):
        NoiseSearch(levels=(2, 1), keep=(0.5, 0.5))
    with pytest.raises(ValueError, match="one dimension"):
        next(NoiseSearch().search(task(linear, shape=(1,))))
    with pytest.raises(ValueError, match="Lower first"):
        next(NoiseSearch("paths", first=8).search(task(linear)))


# -- beam ------------------------------------------------------------------------------------------------------------
def test_beam_branches_from_the_best() -> None:
    """At each choice the parents are the best two of each search by the reward of their posterior means."""
    t = task(linear, prompts=2, samples=2)
    method = Beam(2, 3, 3)
    tree = next(method.search(t)).trajectory
    kernel = EulerMaruyama(FlowGrpo(0.7))
    assert kernel == EulerMaruyama(FlowGrpo(method.noise))
    for level in (3, 6):
        nodes = tree.at(level)
        value = linear(t.policy.denoiser.posterior(nodes.x, float(tree.times[level])).x0, nodes.row // 2)
        for r in range(4):
            mine = (nodes.row == r).nonzero().flatten()
            top = set(mine[value[mine].argsort(descending=True)[:2]].tolist())
            children = tree.at(level + 1)
            assert set(children.parent[children.row == r].tolist()) == top
    assert torch.equal(tree.at(1).parent, torch.arange(24))


def test_one_beam_of_one_child_is_the_sampler() -> None:
    t = task(linear)
    found = next(Beam(1, 1, 2).search(t))
    rows = rows_of(t, per_sample=True)
    plain = roll(rows, EulerMaruyama(FlowGrpo(0.7)), rows.enter(1)).leaves.x
    assert torch.equal(found.x, plain)
    with pytest.raises(ValueError, match="stochastic"):
        next(Beam(noise=0.0).search(t))


# -- rollover budget forcing -----------------------------------------------------------------------------------------
def walked(method: RBF, t) -> tuple[Walk, torch.Tensor]:
    walk = Walk(method, rows_of(t, per_sample=True))
    with torch.no_grad():
        tree = walk.run()
    return walk, tree


def test_rbf_conserves_its_budget() -> None:
    """Quota in, tries and rest out, for every search by itself; the network was asked once per try before the last."""
    t = task(linear, prompts=2, samples=2)
    walk, tree = walked(RBF(3, 5, 2, "own", 0.7), t)
    tries = torch.stack(walk.tries)  # (levels, searches)
    assert torch.equal(tries.sum(0) + walk.spare, torch.full((4,), 5 * 8))
    assert (tries.cumsum(0) <= 5 * torch.arange(1, 9)[:, None]).all() and (tries >= 1).all()
    assert len(set(map(tuple, tries.T.tolist()))) > 1  # searches keep their own books
    assert t.policy.ledger.evaluations == 4 * 3 + int(tries[:-1].sum())
    assert tree.leaves.row.tolist() == [0, 1, 2, 3] and all(n.parent.tolist() == [0, 1, 2, 3] for n in tree.levels[1:])


def test_rbf_extremes() -> None:
    """A reward that always rises takes one batch a step; one that never does spends every quota and keeps the best."""
    calls = []

    def rising(x, row):
        calls.append(0)
        return torch.full((len(x),), float(len(calls)), dtype=F64)

    walk, _ = walked(RBF(2, 6, 2, "own", 0.7), task(rising, samples=2))
    assert (torch.stack(walk.tries) == 2).all() and walk.spare.tolist() == [32, 32]
    walk, _ = walked(RBF(2, 5, 2, "own", 0.7), task(lambda x, r: x.new_zeros(len(x)), samples=2))
    assert (torch.stack(walk.tries) == 5).all() and walk.spare.tolist() == [0, 0]


def test_rbf_holds_its_tries_against_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward once seen stays the bar, also where the walk went on from less; every batch has noise of its own."""
    bars, seeds = [], []
    step, advance = Walk._step, rbf.advance

    def watched(self, nodes, best, *rest):
        bars.append(best)
        return step(self, nodes, best, *rest)

    def drawn(*args, noise, **rest):
        seeds.append(noise.seed)
        return advance(*args, noise=noise, **rest)

    monkeypatch.setattr(Walk, "_step", watched)
    monkeypatch.setattr(rbf, "advance", drawn)
    calls = iter([5.0, *[0.0] * 100])
    walked(RBF(1, 3, 1, "own", 0.7), task(lambda x, r: torch.full((len(x),), next(calls), dtype=F64)))
    assert [float(b) for b in bars] == [5.0] * 8
    assert len(set(seeds)) == len(seeds) == 24


def test_rbf_climbs_and_lists_its_own_lineage() -> None:
    """States along the lineage are the parents of the next; rewards beat the plain sampler's."""
    t = task(linear, samples=30)
    found = next(RBF(4, 6, 2, "own", 0.7).search(t))
    plain = next(Beam(1, 1, 2).search(task(linear, samples=30)))
    assert found.total.mean() > plain.total.mean() + 4 * plain.total.std() / 30**0.5
    assert torch.equal(found.total, linear(found.x, found.row))
    with pytest.raises(ValueError, match="stochastic"):
        RBF(noise=0.0)


def test_rbf_starts_the_other_path_from_its_own_noise() -> None:
    """A model that starts from σ = 80 is walked from the same noise at the σ of the variance-preserving path."""
    t = task(linear, samples=2, world=Normal(0.5, 0.8, Karras(80.0, 7.0)), steps=2)
    t.pipeline.start = lambda z, first, c: 80 * z.double()
    walk, tree = walked(RBF(1, 1, 1), t)
    noise = walk.rows.noise.normal(START, torch.arange(2), torch.zeros(2, dtype=torch.long), (3, 2, 2))
    assert torch.allclose(tree.levels[0].x, vp_path()(1.0)[1] * noise.double(), rtol=1e-12)


@pytest.mark.parametrize("own", [Rectified(), Karras(400.0, 3.0)], ids=["rectified", "karras"])
def test_converted_is_the_same_network_on_another_path(own) -> None:
    """The conversion of a world's denoiser is that world's denoiser on the new path, exactly."""
    path = vp_path()
    seen, exact = Converted(Normal(0.7, 0.5, own), path), Normal(0.7, 0.5, path)
    x = torch.randn(6, 4, dtype=F64)
    for t in (0.999, 0.6, 0.2, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.95], dtype=F64)):
        a, b = seen.posterior(x, t, None), exact.posterior(x, t)
        assert torch.allclose(a.x0, b.x0, atol=1e-9) and torch.allclose(a.eps, b.eps, atol=1e-9)
    alpha, sigma = path(torch.tensor([0.3], dtype=F64))
    assert torch.allclose(same_snr(Rectified(), alpha, sigma), sigma / (alpha + sigma), atol=1e-12)


def test_vp_path_samples_the_data() -> None:
    """The paper's sampler, g = 3 t² on the converted path, ends at the data's mean and spread."""
    world = Normal(0.5, 0.8)
    kernel, times = EulerMaruyama(Power(3.0)), torch.linspace(1, 0, 101, dtype=F64)
    x = torch.randn(8_000, 1, dtype=F64)
    law = kernel(x, Converted(world, vp_path()).posterior(x, 0.5, None), 0.5, 0.4)[0]
    assert torch.allclose(law.std, torch.tensor(0.75 * 0.1**0.5, dtype=F64))
    from flowalign.noise import Stream

    policy = Policy(Converted(world, vp_path()))
    x = rollout(policy, kernel, times, Nodes.enter(x), noise=Stream(torch.Generator().manual_seed(1))).leaves.x
    assert abs(x.mean() - 0.5) < 0.03 and abs(x.std() - 0.8) < 0.03


# -- TTSnap ----------------------------------------------------------------------------------------------------------
def test_pruning_by_an_exact_value_loses_nothing() -> None:
    """A linear reward of a Gaussian flow ranks states at every level as it ranks their samples: pruned best-of-N is
    best-of-N, bit for bit, for the price that the formula names."""
    method = TTSnap(n=10, levels=(1, 4), keep=(0.5, 0.4))
    t = task(linear, prompts=2, samples=2)
    found = next(method.search(t))
    whole = next(TTSnap(n=10, levels=(), keep=()).search(free := task(linear, prompts=2, samples=2)))
    assert found.row.tolist() == [0] * 4 + [1] * 4
    for p in (0, 1):
        best = whole.total[whole.row == p].sort(descending=True).values[:4]
        assert torch.equal(found.total[found.row == p].sort(descending=True).values, best)
    assert t.policy.ledger.evaluations == pytest.approx(40 * cost(8, (1, 4), (0.5, 0.4)))
    assert t.policy.ledger.rewards == pytest.approx(40 * cost(8, (1, 4), (0.5, 0.4), 0.0, 1.0))
    assert free.policy.ledger.evaluations == 40 * 8 and free.policy.ledger.rewards == 40


def test_every_round_has_noise_of_its_own() -> None:
    """Rounds bring new candidates, and others than another seed does; asked again, a search finds the same."""
    method = TTSnap(n=3, levels=(), keep=(), rounds=3)
    rounds, again, other = ([f.x for f in method.search(task(linear, steps=2, seed=k))] for k in (0, 0, 1))
    assert len(rounds) == 3 and len(torch.cat([*rounds, *other]).flatten(1).unique(dim=0)) == 18
    assert torch.equal(torch.cat(rounds), torch.cat(again))


def test_honest_cost_of_the_published_schedule() -> None:
    """FLUX, 9.9 TFLOPs a step, 1.2 a verification, 2,000 in all: 32 candidates, not the simulator's 38."""
    published = TTSnap.presets()["published"].method
    each = cost(20, published.levels, published.keep, 9.9, 1.2)
    assert each == pytest.approx(9.9 * (3 + 0.4 * 4 + 0.16 * 5 + 0.08 * 8) + 1.2 * 1.64)
    assert int(2000 / each) == 32 and cost(20, (), (), 9.9, 1.2) == pytest.approx(199.2)
    assert cost(20, (2, 6), (1.0, 1.0), 9.9) == pytest.approx(198.0)  # no pruning is best-of-N: none is left out


def test_schedule_keeps_what_is_wanted() -> None:
    assert TTSnap(keep=(0.4, 0.4, 0.5)).schedule(100, 4) == {2: 40, 6: 16, 11: 8}
    assert TTSnap(keep=(0.4, 0.4, 0.5)).schedule(10, 4) == {2: 4, 6: 4, 11: 4}
    assert TTSnap(keep=(0.4, 0.4, 0.5)).schedule(2, 4) == {2: 2, 6: 2, 11: 2}
    # .29 * 100 is 28.999999999999996, and half of 29 is rounded down
    assert TTSnap(keep=(0.29, 0.5, 0.5)).schedule(100, 1) == {2: 29, 6: 14, 11: 7}


def test_omega() -> None:
    """Twice the rise of a straight reference is ω = 1; the reference itself 0; knots of either curve count."""
    line = [(10.0, 1.0), (20.0, 2.0), (30.0, 3.0)]
    assert omega(line, line) == pytest.approx(0.0)
    assert omega([(10.0, 1.0), (30.0, 5.0)], line) == pytest.approx(1.0)
    bump = [(10.0, 1.0), (15.0, 2.5), (20.0, 2.0), (30.0, 3.0)]
    assert omega(bump, line) == pytest.approx(0.5 * 10 * 1.0 / 20 / 1)  # a triangle of base 10 and height 1, over 20
    # both cover 20 to 30 alone: the curve rises from 2 to 5.5, the reference from 2 to 3; areas above 1, its first
    assert omega([(20.0, 2.0), (40.0, 9.0)], line) == pytest.approx((1 + 4.5) / (1 + 2) - 1)
    with pytest.raises(ValueError, match="share no budgets"):
        omega([(40.0, 1.0), (50.0, 2.0)], line)
    with pytest.raises(ValueError, match="gains nothing"):
        omega(line, [(10.0, 1.0), (30.0, 1.0)])


def test_ranks_are_summed_within_prompts() -> None:
    """Three scores of two prompts by hand; a reward in the thousands counts no more than one in hundredths."""
    row = torch.tensor([0, 1, 0, 1, 0, 1])
    score = torch.tensor([0.3, 9.0, 0.1, 7.0, 0.2, 8.0])
    assert within_rows(score, row).tolist() == [2, 2, 0, 0, 1, 1]
    rewards = {
        "big": lambda x, r: 1000 * x[:, 0, 0, 0],
        "small": lambda x, r: -0.01 * x[:, 0, 0, 0] + 0.01 * x[:, 0, 0, 1],
    }
    t = task(rewards, samples=3)
    rows = rows_of(t, per_sample=False)
    x = torch.zeros(3, 3, 2, 2, dtype=F64)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = torch.tensor([3.0, 2, 1]), torch.tensor([0.0, 5, 4.5])
    # ranks of big: 2 1 0; of small (-3, 3, 3.5 hundredths): 0 1 2
    posterior = replace(final_posterior(x, t.policy.process), t=0.5)
    assert Verifier(rows, ranks=True)(x, posterior, 0.5, torch.zeros(3, dtype=torch.long)).tolist() == [2, 2, 2]


def waves(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """A reward that the posterior mean gets wrong: it shrinks towards the mean, and waves are counted from there."""
    return (4 * x.mean((1, 2, 3))).cos()


def training(n: int, seed: int) -> tuple[list[Seen], torch.Tensor]:
    t = task(waves, samples=n, shape=(1, 2, 2), seed=seed)
    seen: list[Seen] = []
    found, seen = TTSnap(train=1, levels=(2, 4, 6), keep=(0.5,) * 3)._whole(rows_of(t, per_sample=False))
    return [replace(s, x0=s.x0.float()) for s in seen], found.total


def test_noise_aware_rewards_learn_what_shows_through() -> None:
    """On held-out samples the students' squared error is far below the clean reward's, at every level."""
    seen, truth = training(600, 1)
    aware = distil(seen, {"r": truth}, ["p"] * 600, Distil(epochs=12, lr=3e-3))
    fresh, target = training(500, 2)
    for s in fresh:
        student = s.scores["r"] + aware("r", s.x0, s.t, word_ids(["p"] * 500))
        assert (student - target).square().mean() < 0.3 * (s.scores["r"] - target).square().mean()


def test_curriculum_runs_from_clean_to_noisy() -> None:
    """The first level's student does not depend on the noisier ones that follow, whatever order they come in; the
    next starts from it; untrained students are their teacher."""
    seen, truth = training(64, 1)
    options = Distil(epochs=1, batch=16)
    whole = distil(seen, {"r": truth}, ["p"] * 64, options)
    assert whole.times == sorted(whole.times) and len(whole.networks["r"]) == 3
    clean = min(seen, key=lambda s: s.t)
    blank = [s if s is clean else replace(s, x0=torch.zeros_like(s.x0)) for s in seen]
    first = [distil(s, {"r": truth}, ["p"] * 64, options).networks["r"] for s in (seen, blank)]
    same = [
        all(map(torch.equal, a.state_dict().values(), b.state_dict().values())) for a, b in zip(*first, strict=True)
    ]
    assert same == [True, False, False]
    still = distil(seen, {"r": truth}, ["p"] * 64, replace(options, lr=1e-30))
    assert still("r", clean.x0, clean.t, word_ids(["p"] * 64)).abs().max() < 1e-20
    gap = [a - b for a, b in zip(whole.networks["r"][0].parameters(), whole.networks["r"][1].parameters(), strict=True)]
    assert 0 < max(float(g.detach().abs().max()) for g in gap) < 0.05  # a few small steps apart: not trained afresh
    order = distil(seen[::-1], {"r": truth}, ["p"] * 64, options)
    for a, b in zip(order.networks["r"], whole.networks["r"], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_noise_aware_rewards_are_saved_and_used(tmp_path: Path) -> None:
    """Written and read back they say the same; a run that trains one pays for it, a run that loads one does not."""
    file = tmp_path / "aware.safetensors"
    one = steer(Toy(), TTSnap(n=6, levels=(1,), keep=(0.5,), train=4, save=str(file)), Bright(), ["a"], steps=4)
    assert one.ledger.evaluations == 4 * 4 + 6 * 2 + 3 * 2 and one.ledger.rewards == 4 * 2 + 6 + 3
    assert one.ledger.decodes == one.ledger.rewards + 1  # and the result's own
    loaded = LatentValues.load(file)
    x0 = torch.randn(3, 3, 2, 2)
    assert loaded.times == [0.75] and loaded("bright", x0, 0.7, word_ids(["a"] * 3)).shape == (3,)
    two = steer(Toy(), TTSnap(n=6, levels=(1,), keep=(0.5,), aware=str(file)), Bright(), ["a"], steps=4)
    assert two.ledger.evaluations == 6 * 2 + 3 * 2
    with pytest.raises(ValueError, match="no value of reward 'other'"):
        loaded("other", x0, 0.7, word_ids(["a"] * 3))
    (tmp_path / "wrong").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="is no file of latent values"):
        LatentValues.load(tmp_path / "wrong")


def test_blind_students_cost_no_reward_calls() -> None:
    """A student that sees the state alone is trained without looking, and prunes without decoding."""
    t = task(linear, samples=2)
    method = TTSnap(n=4, levels=(2,), keep=(0.5,), train=4, distil=Distil(residual=False, epochs=1))
    found = list(method.search(t))
    assert len(found) == 2 and len(found[1].row) == 4
    assert t.policy.ledger.rewards == 8 + 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": (2, 1), "keep": (0.5, 0.5)}, "levels must rise"),
        ({"levels": (1,), "keep": (0.5, 0.5)}, "one keep each"),
        ({"levels": (1,), "keep": (0.0,)}, r"keep in \(0, 1\]"),
        ({"aware": "x", "train": 2}, "trained already"),
    ],
)
def test_ttsnap_settings(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TTSnap(**settings)
    with pytest.raises(ValueError, match="past the sampler's last step 7"):
        next(TTSnap(levels=(8,), keep=(0.5,)).search(task(linear)))


# -- all of them -----------------------------------------------------------------------------------------------------
ALL = [
    NoiseSearch(rounds=50), NoiseSearch("random", 50), NoiseSearch("paths", pool=1, renoisings=2, first=2),
    Beam(2, 2, 1), RBF(4, 50, 2, "own", 0.7), RBF(4, 50, 2), TTSnap(n=16, levels=(1, 2), keep=(0.5, 0.5), rounds=20),
]  # fmt: skip


@pytest.mark.parametrize("method", ALL, ids=lambda m: f"{m.name}-{getattr(m, 'strategy', getattr(m, 'path', ''))}")
def test_budget_is_kept(method: Steering) -> None:
    """No search spends more than its budget, and each then has results for every prompt."""
    found = steer(Toy(), method, Bright(), ["a", "c dark"], samples=2, steps=6, budget="150nfe")
    assert found.ledger.evaluations <= 150
    assert set(found.row.tolist()) == {0, 1} and torch.isfinite(found.total).all()
    assert torch.allclose(
        Bright()(found.media, ["c dark" if r else "a" for r in found.row.tolist()]), found.total, atol=1e-5
    )


class Breaks(Bright):
    """A reward that goes wrong at its fourth call."""

    calls = 0

    @property
    def card(self) -> Card:
        return Card("breaks", "until the fourth call", differentiable=True)

    def __call__(self, media, prompts, meta=None):
        Breaks.calls += 1
        return super().__call__(media, prompts) * (torch.nan if Breaks.calls > 3 else 1)


def test_partial_results_survive_a_broken_reward() -> None:
    Breaks.calls = 0
    with pytest.raises(SearchFailed, match="not finite") as failed:
        steer(Toy(), NoiseSearch("random", 8), Breaks(), ["a"], samples=2, steps=4)
    assert len(failed.value.found.total) == 2 and torch.isfinite(failed.value.found.total).all()


def tuned() -> tuple[Toy, Policy]:
    """A generator with an adapter that has learned something."""
    pipe = Toy()
    policy, parameters = prepare(pipe, Lora(4, 8, ("0", "2")))
    g = torch.Generator().manual_seed(5)
    for p in parameters:
        p.data = 0.5 * torch.randn(p.shape, generator=g)
    policy.ledger = Ledger()
    return pipe, policy


@pytest.mark.parametrize("method", [TTSnap(n=8, levels=(1, 2), keep=(0.5, 0.5), train=4), NoiseSearch(rounds=2)])
def test_searches_run_on_a_fine_tuned_model(method: Steering) -> None:
    """The adapter's samples are searched, not the base's, and its weights stay what they were."""
    pipe, policy = tuned()
    before = [p.clone() for p in pipe.denoiser.parameters()]
    found = steer(pipe, method, Bright(), ["a"], samples=2, steps=4, policy=policy)
    base = steer(Toy(), method, Bright(), ["a"], samples=2, steps=4)
    assert all(torch.equal(p, q) for p, q in zip(before, pipe.denoiser.parameters(), strict=True))
    whole = steer(pipe, BestOfN(n=1), Bright(), ["a"], samples=64, steps=4, policy=policy)
    assert not torch.allclose(found.total, base.total, atol=1e-3)
    assert whole.total.min() < found.total.min() and found.total.max() < whole.total.max() + whole.total.std()


COMMANDS = {
    "ttsnap": ["--method.n", "4", "--method.levels", "1", "2", "--method.keep", "0.5", "0.5", "--method.train", "2",
               "--method.distil.epochs", "1"],
    "noise-search": ["--method.strategy", "random", "--method.rounds", "2"],
    "rbf": ["--method.path", "vp", "--method.noise", "3"],
    "beam": ["--method.width", "1"],
    "reno": ["--method.iterations", "2", "--method.optimizer", "adamw", "--method.over", "all"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every search runs from the command line, its settings options, its results in a folder."""
    options = ["--pipeline", "tests.runworld:pipeline", "--reward", "tests.toy:Bright", "--prompts", "a dark night",
               "--samples", "2", "--steps", "4", "--output", str(tmp_path / "s")]  # fmt: skip
    main(["steer", name, *options, *COMMANDS[name]])
    summary = json.loads((tmp_path / "s/summary.json").read_text())
    assert [r["prompt"] for r in summary["results"]] == ["a dark night"] * 2
    assert summary["ledger"]["evaluations"] > 0 and "network evaluations" in capsys.readouterr().out
