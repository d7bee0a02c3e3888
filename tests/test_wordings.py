"""Wordings of one request share a group: every rule compares and chooses among all of its samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowalign.batches import pairs
from flowalign.collect import Collector, collect
from flowalign.experience import Experience
from flowalign.fit import _summarise
from flowalign.methods.base import Training
from flowalign.methods.dance_grpo import DanceGRPO
from flowalign.methods.dense_grpo import DenseGRPO
from flowalign.methods.euphonium import Euphonium
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.methods.mix_grpo import MixGRPO
from flowalign.methods.talk2move import Talk2Move
from flowalign.methods.tp_grpo import TPGRPO
from flowalign.methods.tree_grpo import TreeGRPO
from flowalign.minibatch import minibatches
from flowalign.objectives.base import Objective
from flowalign.options import FitOptions
from flowalign.source import Draw, Prompt, Prompts
from flowalign.thinning import extremes, live_groups, with_best
from flowalign.trajectory import Transitions
from tests.credit_parts import STEPS, parts

PROMPTS = [Prompt("a", variants=("a dark",)), Prompt("b")]


def sampled(method: Training) -> tuple[Collector, Draw, Experience]:
    """Eight samples a group: four of "a", four of "a dark", whose rewards have the other sign, and eight of "b"."""
    _, _, collector = parts(method)
    draw = Prompts(PROMPTS).draw(0, 2, 8)
    return collector, draw, collect(collector, draw, 0)


def the(draw: Draw, *words: str) -> Tensor:
    """Rows of these prompts."""
    return torch.tensor([i for i, p in enumerate(draw.prompts) if p in words])


@pytest.mark.parametrize("method", [
    FlowGRPO(kl=0.0), DanceGRPO(eta=0.5), MixGRPO(), DenseGRPO(kl=0.0, rounds=0), TPGRPO(), Euphonium(eta=0.5, width=8),
    TreeGRPO(eta=0.5, splits=(0,)), TreeGRPO(eta=0.5, splits=(0,), backup="probability"),
], ids=lambda m: m.name)  # fmt: skip
def test_advantages_are_centred_over_all_wordings(method: Training) -> None:
    """At every step the credits of a group cancel, and those of one wording alone do not."""
    collector, draw, e = sampled(method)
    found = 0
    for k, credit in enumerate(collector.recipe.credit(e)):
        if credit is None or k == 0:
            continue
        row, credit = e.trajectory.at(k).row, credit.reshape(len(credit), -1)
        assert (credit.abs() < 5).all(), "nothing is cut"
        for words in (("a", "a dark"), ("b",)):
            assert credit[torch.isin(row, the(draw, *words))].mean(0).abs().max() < 1e-3, k
        found += int((credit[row == the(draw, "a")].mean(0).abs() > 0.02).all())
    assert found > 0


def steps_of(e: Experience, weight: Tensor) -> Transitions:
    return e.trajectory.transitions([None] + [weight] * STEPS)


def test_choices_are_made_in_the_whole_group() -> None:
    """Best and worst samples, the teacher, a preference pair: of the request, whoever's wording they are of."""
    _, draw, e = sampled(FlowGRPO(kl=0.0))
    row, total = e.trajectory.leaves.row, e.total
    steps = steps_of(e, total)
    kept, taught = extremes(1, 1)(steps, e), with_best(steps, e)
    for words in (("a", "a dark"), ("b",)):
        mine = torch.isin(row, the(draw, *words)).nonzero().flatten()
        best, worst = int(mine[total[mine].argmax()]), int(mine[total[mine].argmin()])
        assert set(kept.child[torch.isin(kept.row, the(draw, *words))].tolist()) == {best, worst}
        target = taught.target[torch.isin(taught.row, the(draw, *words))]
        assert torch.equal(target, e.trajectory.leaves.x[best].expand_as(target))
    assert int(mine[0]) != best, "not just the first"
    chosen = pairs(e, Objective.times)
    assert len(chosen) == 2, "one pair of each request, not of each wording"


def test_a_group_lives_while_anything_in_it_is_credited() -> None:
    """Whichever wording, sign or column it is: only a group without any credit is left out, in every update."""
    collector, draw, e = sampled(FlowGRPO(kl=0.0))
    row = e.trajectory.leaves.row
    quiet = torch.where(torch.isin(row, the(draw, "a dark")), torch.linspace(-2.0, 1.0, 16), 0.0)
    balanced = torch.zeros(16).index_fill(0, (row == the(draw, "b")).nonzero().flatten()[:2], 1.0)
    balanced[(row == the(draw, "b")).nonzero().flatten()[1]] = -1.0
    second = torch.stack([torch.zeros(16), balanced], 1)
    for weight, words in ((quiet, ("a", "a dark")), (balanced, ("b",)), (second, ("b",)), (-second, ("b",))):
        assert set(live_groups(steps_of(e, weight), e).row.tolist()) == set(the(draw, *words).tolist())
    e.cache["credit"] = [None] + [quiet] * STEPS
    for update in (0, 1):
        (batch,) = minibatches(
            collector.recipe, collector, e, draw, FitOptions(filter_groups=True, batch=1000), 0, update
        )
        assert set(batch.data.row.tolist()) == set(the(draw, "a", "a dark").tolist())


def test_spread_is_measured_over_all_wordings() -> None:
    """The variance that chooses Talk2Move's exit, and the spread that is reported."""
    collector, draw, e = sampled(Talk2Move(exits=(2,)))
    (exit_,) = collector.recipe.learners
    exit_.before(collector, Prompts(PROMPTS), FitOptions(groups=2, size=8))
    e = collect(collector, draw, -1)
    row = e.trajectory.leaves.row
    parts = [e.total[torch.isin(row, the(draw, *words))] for words in (("a", "a dark"), ("b",))]
    assert exit_.variances[2] == pytest.approx(float(sum(p.var(correction=0) for p in parts) / 2), rel=1e-3)
    assert _summarise(e)["reward_std"] == pytest.approx(float(sum(p.std(correction=0) for p in parts) / 2), rel=1e-4)


def test_the_exit_is_the_best_wherever_it_stands() -> None:
    """Its order among the candidates says nothing: the same one is chosen from any order."""
    chosen = set()
    for exits in ((1, 3, 5), (5, 3, 1), (3, 5, 1), (5, 1, 3)):
        collector, _, _ = sampled(Talk2Move(noise=0.7, exits=exits))
        (exit_,) = collector.recipe.learners
        exit_.before(collector, Prompts(PROMPTS), FitOptions(groups=2, size=8))
        chosen.add(exit_.step)
    assert len(chosen) == 1 and exit_.step == max(exit_.variances, key=exit_.variances.__getitem__)


def test_wordings_share_the_start_of_their_group() -> None:
    """DanceGRPO's one initial noise is the request's; its wordings draw steps of their own, others start apart."""
    _, draw, e = sampled(DanceGRPO(eta=0.5))
    x = {p: e.trajectory.at(0).x[i] for i, p in enumerate(draw.prompts)}
    assert torch.equal(x["a"], x["a dark"]) and not torch.allclose(x["a"], x["b"])
    noises = e.trajectory.at(1).x
    row = e.trajectory.at(1).row
    one, other = (noises[row == the(draw, w)] for w in ("a", "a dark"))
    assert len(one) == len(other) == 4 and not torch.allclose(one, other, atol=1e-2)
    _, draw, e = sampled(replace(DanceGRPO(eta=0.5), shared_noise=False))
    assert len(e.trajectory.at(0)) == 16
