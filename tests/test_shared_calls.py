"""No network call is made twice, and none that is not used: counted, and the same numbers come out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from flowalign.collect import Collector, collect
from flowalign.credit import Gains
from flowalign.fit import fit
from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo
from flowalign.methods.dance_grpo import DanceGRPO
from flowalign.methods.ddpo import DDPO, History
from flowalign.methods.dense_grpo import Calibration, DenseGRPO
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.methods.g2rpo import G2RPO
from flowalign.methods.mix_grpo import MixGRPO
from flowalign.methods.tp_grpo import TPGRPO
from flowalign.methods.tree_grpo import TreeGRPO
from flowalign.minibatch import minibatches
from flowalign.objectives import Clip
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.prepare import prepare
from flowalign.scorer import Scorer
from flowalign.source import Prompt, Prompts, make_draw
from tests.toy import Bright, Toy

STEPS = 6
OPTIONS = FitOptions(iterations=1, groups=2, size=8, steps=STEPS, batch=1000, lr=1e-3)


class Calls(Toy):
    """A toy that writes down how many states each forward pass was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def posterior(self, x, t, cond):
        self.sizes.append(len(x))
        return super().posterior(x, t, cond)


def once(method, options: FitOptions = OPTIONS, prompts=("a", "b")):
    """One iteration; returns the toy, the policy and the metrics."""
    toy = Calls()
    recipe = method.recipe(toy.times(options.steps))
    policy, parameters = prepare(toy, None, recipe.roles)
    scorer = Scorer(toy, {"r": Bright()})
    metrics = list(fit(toy, scorer, Prompts(list(prompts)), recipe, options, policy=policy, parameters=parameters))
    return toy, policy, metrics


def sampled(method, size: int = 8):
    toy = Calls()
    recipe = method.recipe(toy.times(STEPS))
    policy, parameters = prepare(toy, None, recipe.roles)
    collector = Collector(toy, Scorer(toy, {"r": Bright()}), policy, recipe, STEPS, 0)
    draw = Prompts(["a", "b dark"]).draw(0, 2, size)
    return toy, collector, draw, collect(collector, draw, 0), parameters


def test_a_shared_start_is_evaluated_once() -> None:
    """DanceGRPO: two starts, sixteen samples of five further levels; the update too asks once about each start."""
    toy, policy, _ = once(DanceGRPO(eta=0.5, fraction=1.0))
    assert toy.sizes == [2, 16, 16, 16, 16, 16, 2 + 4 * 16]
    assert policy.ledger.evaluations == sum(toy.sizes)
    apart, _, _ = once(DanceGRPO(eta=0.5, fraction=1.0, shared_noise=False))
    assert apart.sizes == [16] * 6 + [5 * 16]


def test_a_shared_start_stays_shared_until_the_window() -> None:
    """MixGRPO with the window at steps 2 and 3: nothing is drawn before it, so a group is one sample until then."""
    method = MixGRPO(width=2, period=1)
    toy = Calls()
    recipe = method.recipe(toy.times(STEPS))
    recipe.learners[0].iteration = 2
    assert recipe.learners[0].bounds == (2, 4)
    policy, _ = prepare(toy, None, recipe.roles)
    collector = Collector(toy, Scorer(toy, {"r": Bright()}), policy, recipe, STEPS, 0)
    draw = Prompts(["a", "b"]).draw(0, 2, 8)
    e = collect(collector, draw, 0)
    assert toy.sizes == [2, 2, 2, 16, 16, 16]
    (batch,) = minibatches(recipe, collector, e, draw, OPTIONS, 0, 0)
    recipe.objective(policy, batch.data, batch.cond)
    assert len(batch.data) == 2 * 16 and toy.sizes[-1] == 2 + 16


def test_a_shared_start_gives_the_same_samples() -> None:
    """Sixteen copies of two starts, each evaluated on its own, lead to the same states."""
    _, _, _, e, _ = sampled(DanceGRPO(eta=0.5))
    _, _, _, apart, _ = sampled(replace(DanceGRPO(eta=0.5), shared_noise=False))
    row = apart.trajectory.leaves.row
    assert torch.equal(e.trajectory.leaves.row, row) and len(e.trajectory.at(0)) == 2
    toy, kernel = Toy(), DanceGRPO(eta=0.5).recipe(Toy().times(STEPS)).kernel
    x = e.trajectory.at(0).x[row]
    for k in range(STEPS - 1):  # the last step draws none
        t, s = e.trajectory.times[k : k + 2].tolist()
        law, _ = kernel(x, toy.posterior(x, t, None), t, s)
        noise = (e.trajectory.at(k + 1).x - law.mean) / law.std
        other = apart.trajectory.at(k)
        law2, _ = kernel(other.x, toy.posterior(other.x, t, None), t, s)
        assert torch.allclose(noise, (apart.trajectory.at(k + 1).x - law2.mean) / law2.std, atol=1e-4), "same noises"
        x = e.trajectory.at(k + 1).x


@pytest.mark.parametrize("method", [
    G2RPO(levels=(1,), width=8, clip=1e-2), TreeGRPO(eta=0.5, splits=(0, 2), clip=1e-2), DanceGRPO(eta=0.5, clip=1e-2),
])  # fmt: skip
def test_siblings_share_their_call_in_the_update(method) -> None:
    """Loss and gradient are those of asking about each step on its own, in fewer evaluations; order keeps siblings."""
    toy, collector, draw, e, parameters = sampled(method)
    batches = minibatches(collector.recipe, collector, e, draw, replace(OPTIONS, batch=12), 0, 0)
    assert sum(len(b.data) for b in batches) > 12
    clip, saved = collector.recipe.objective, 0
    for b in batches:
        steps = b.data
        toy.sizes.clear()
        one = clip(collector.policy, steps, b.cond).terms["policy"]
        distinct = {(int(k), int(p)) for k, p in zip(steps.level, steps.parent, strict=True)}
        assert toy.sizes == [len(distinct)]
        saved += len(steps) - len(distinct)
        each = clip(Policy(toy), replace(steps, parent=None), b.cond).terms["policy"]
        assert toy.sizes[-1] == len(steps) and torch.allclose(one, each, atol=1e-6)
        for g, h in zip(torch.autograd.grad(one, parameters), torch.autograd.grad(each, parameters), strict=True):
            assert torch.allclose(g, h, atol=2e-5)
    assert saved > 0
    seen = [(int(k), int(p)) for b in batches for k, p in zip(b.data.level, b.data.parent, strict=True)]
    changes = sum(a != b for a, b in pairwise(seen)) + 1
    assert changes == len(set(seen)), "the steps from one state lie together"


def test_one_call_serves_a_whole_group() -> None:
    """G²RPO: one forward pass per prompt until the branch and one in the update, whatever the size of the group."""
    toy, _, _ = once(G2RPO(levels=(2,), width=8, strides=(1,), clip=1e-2))
    assert toy.sizes == [2, 2, 2, 16, 16, 16, 2]


def test_no_reference_pass_without_kl() -> None:
    """The reference is asked once a step where there is a penalty, and never where there is none."""
    without, _, _ = once(FlowGRPO(kl=0.0, clip=1e-2))
    assert without.sizes == [16] * 6 + [80]
    penalised, policy, _ = once(FlowGRPO(kl=0.1, clip=1e-2))
    assert penalised.sizes == [16] * 6 + [80, 80] and "reference" in policy.roles
    tree, _, _ = once(replace(TreeGRPO(eta=0.5, splits=(0, 1), clip=1e-2)), replace(OPTIONS, size=4))
    assert tree.sizes == [2, 4, 8, 8, 8, 8, 2 + 4 + 3 * 8], "two trees of four leaves: levels, then their parents"


@pytest.mark.parametrize("method", [DenseGRPO(rounds=0, kl=0.0, clip=1e-2), TPGRPO(clip=1e-2)])
def test_completions_run_as_one_staircase(method) -> None:
    """The ODEs of all levels are K calls in sequence, each level joining those under way, and not K (K + 1) / 2."""
    toy, collector, _, e, _ = sampled(method)
    toy.sizes.clear()
    e.completions()
    last = STEPS if isinstance(method, DenseGRPO) else STEPS - 1  # TP-GRPO's last step is the ODE's: nothing to ask
    assert toy.sizes == [16 * min(k + 1, last) for k in range(STEPS)]
    toy.sizes.clear()
    e.completions()
    collector.recipe.credit(e)
    assert toy.sizes == [], "asked for again they are there"
    short = Gains(steps=2)
    short(e)
    assert toy.sizes == [16 * STEPS] * 2, "two steps each: two calls for all levels"


def test_updates_and_batches() -> None:
    """K-repeat: equal sizes. Two updates ask again about the same steps; batches split an update, no step is lost."""
    method = FlowGRPO(kl=0.0, clip=1e-2)
    draw = Prompts(["a", "b", "c"]).draw(0, 2, 8)
    assert draw.samples.tolist() == [8, 8] and len(set(draw.prompts)) == 2
    toy, _, _ = once(method, replace(OPTIONS, updates=3))
    assert toy.sizes == [16] * 6 + [80] * 3
    toy, _, metrics = once(method, replace(OPTIONS, updates=2, batch=32, accumulate=2))
    assert toy.sizes == [16] * 6 + [32, 32, 16] * 2 and metrics[0]["ratio_gap"] > 0
    _, _, metrics = once(method, OPTIONS)
    assert metrics[0]["ratio_gap"] < 1e-5, "on-policy before the first step of the optimiser"
    _, collector, draw, e, _ = sampled(method)
    orders = []
    for update in (0, 1):
        (batch,) = minibatches(collector.recipe, collector, e, draw, OPTIONS, 0, update)
        orders.append(list(zip(batch.data.level.tolist(), batch.data.child.tolist(), strict=True)))
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1], "each update in an order of its own"


def test_unequal_groups_part_from_their_shared_starts() -> None:
    """Allocation by size: each prompt has one start and as many samples as it was given."""
    toy, collector, _, _, _ = sampled(DanceGRPO(eta=0.5))
    toy.sizes.clear()
    e = collect(collector, make_draw([Prompt("a"), Prompt("b")], [6, 2]), 0)
    assert torch.bincount(e.trajectory.leaves.row).tolist() == [6, 2] and toy.sizes == [2] + [8] * (STEPS - 1)


def test_an_iteration_is_credited_once_and_then_learnt_from() -> None:
    """However many updates: DDPO's history holds each reward once; a window moves when the iteration is over."""
    toy = Toy()
    for method in (DDPO(clip=1e-2, buffer=100, least=2), MixGRPO(width=1, period=1, clip=1e-2)):
        recipe = method.recipe(toy.times(STEPS))
        policy, parameters = prepare(toy, None, recipe.roles)
        options = replace(OPTIONS, iterations=2, updates=3, groups=1)
        metrics = list(fit(toy, Scorer(toy, {"r": Bright()}), Prompts(["a"]), recipe, options, policy=policy,
                           parameters=parameters))  # fmt: skip
        if isinstance(recipe.credit, History):
            assert len(recipe.credit.seen["a"]) == 2 * 8
        else:
            assert [m["window/first"] for m in metrics] == [0.0, 1.0] and recipe.learners[0].iteration == 2


def test_calibration_rounds_have_noises_of_their_own() -> None:
    """DenseGRPO: two rounds see two draws, neither of them the first iteration's."""
    _, collector, _, _, _ = sampled(DenseGRPO(rounds=0, kl=0.0))
    (calibration,) = collector.recipe.learners
    assert isinstance(calibration, Calibration)
    seen: list[torch.Tensor] = []
    calibration.rounds, calibration.update = 2, lambda gains: seen.append(torch.stack(gains))  # type: ignore[method-assign]
    calibration.before(collector, Prompts(["a"]), replace(OPTIONS, groups=1))
    now = torch.stack(Gains().gains(collect(collector, Prompts(["a"]).draw(0, 1, 8), 0)))
    assert len(seen) == 2 and not (seen[0] == seen[1]).any() and not (seen[0] == now).any()


def test_steps_without_a_known_origin_are_asked_about_one_by_one() -> None:
    """A batch made by hand has no parents: nothing is shared, nothing is guessed."""
    toy, collector, draw, e, _ = sampled(FlowGRPO(kl=0.0))
    (batch,) = minibatches(collector.recipe, collector, e, draw, OPTIONS, 0, 0)
    assert batch.data.sources() is None and replace(batch.data, parent=None).sources() is None
    Clip(EulerMaruyama(FlowGrpo(0.7)), 1e-2)(collector.policy, replace(batch.data, parent=None), batch.cond)
    assert toy.sizes[-1] == len(batch.data)
