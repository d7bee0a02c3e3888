"""What the latent value network is taught and asked, with a network in its place that writes down what it sees."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flowalign.experience import Experience
from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo
from flowalign.noise import Noise
from flowalign.policy import Policy
from flowalign.rollout import rollout
from flowalign.selection import Branch
from flowalign.trajectory import Nodes
from flowalign.valuenet import ValueLearner, word_ids
from tests.toy import Toy, ToyCondition

PROMPTS = ("a red square", "two blue")
STEPS = 4


class Seen(nn.Module):
    """Answers a known function of state, time and words, and keeps what it was asked."""

    shape = (3, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        self.asked.append((x.detach(), t, words))
        return x.flatten(1).mean(1) + t.to(x) + words.to(x).sum(1) / 1e4 + self.zero


def learner(**settings: int) -> ValueLearner:
    out = ValueLearner(passes=1, **settings)
    out.network, out.optimizer = Seen(), torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    return out


def tree(iteration: int = 0) -> Experience:
    """Two prompts, a root each, four leaves each: their rewards are told apart at every level."""
    toy, cond = Toy(), ToyCondition(PROMPTS)
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(iteration))
    grown = rollout(Policy(toy), EulerMaruyama(FlowGrpo(0.7)), toy.times(STEPS), Nodes.enter(x), cond,
                    noise=Noise(iteration), select=Branch({0: 2, 2: 2}))  # fmt: skip
    total = torch.tensor([1.0, 2.0, 4.0, 7.0, 20.0, 23.0, 27.0, 36.0]) + 3 * iteration
    return Experience(
        Policy(toy), grown, cond, torch.arange(2), {"r": total}, {"r": 1.0}, lambda x, i: {}, 5, iteration
    )


def by_walking(e: Experience) -> list[tuple[Tensor, float, int, float]]:
    """State, time, row and mean reward of its own leaves, of every node of the tree."""
    out, lineage = [], e.trajectory.lineage()
    for k in range(STEPS + 1):
        nodes = e.trajectory.at(k)
        for i in range(len(nodes)):
            out.append((nodes.x[i], 1 - k / STEPS, int(nodes.row[i]), float(e.total[lineage[k] == i].mean())))
    return out


def test_every_state_is_taught_what_came_of_it() -> None:
    """Each node once, at its own time, under its own prompt; the target is its leaves' mean, in units of the spread."""
    value, e = learner(batch=100), tree()
    nodes, words = by_walking(e), word_ids(PROMPTS)
    loss = value.observe(e)["value/loss"]
    ((x, t, w),) = value.network.asked
    assert len(x) == len(nodes) == 2 + 4 + 4 + 8 + 8
    mean, std = float(e.total.mean()), float(e.total.std(correction=0))
    errors = []
    for state, time, row, target in nodes:
        (i,) = [i for i in range(len(x)) if torch.equal(x[i], state) and abs(float(t[i]) - time) < 1e-9]
        assert torch.equal(w[i], words[row])
        said = float(state.mean() + time + words[row].sum() / 1e4)
        errors.append((said - (target - mean) / std) ** 2)
    assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_scale_and_order_follow_the_iterations() -> None:
    """Mean and variance move a tenth of the way; the states' order is another each time."""
    value, orders = learner(batch=100), []
    for iteration in (0, 1):
        e = tree(iteration)
        value.observe(e)
        states = torch.cat([e.trajectory.at(k).x for k in range(STEPS + 1)])
        x = value.network.asked[-1][0]
        orders.append([next(j for j in range(len(x)) if torch.equal(states[j], row)) for row in x])
    mean = 15.0 + 0.1 * 3.0
    first, second = (float(v) for v in (tree(0).total.var(correction=0), ((e.total - mean) ** 2).mean()))
    assert value.mean == pytest.approx(mean) and value.std == pytest.approx((0.9 * first + 0.1 * second) ** 0.5)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(26)) and orders[0] != orders[1]
    small = learner(batch=10)
    small.observe(tree())
    assert [len(x) for x, _, _ in small.network.asked] == [10, 10, 6]


def answers(value: ValueLearner) -> Tensor:
    value.enter(PROMPTS)
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return value(x, torch.tensor([0.9, 0.6, 0.4, 0.1]), torch.tensor([0, 1, 0, 1]))


def paid(iteration: int, *rewards: float) -> Experience:
    """The tree of an iteration with other rewards."""
    return replace(tree(iteration), rewards={"r": torch.tensor(rewards)})


@pytest.mark.parametrize("level", [1.0, 0.0, 5.0])
def test_an_iteration_of_equal_rewards_teaches_nothing(level: float) -> None:
    """All succeed, or all fail: neither the scale nor the network nor the optimiser's memory moves."""
    value = ValueLearner(width=8)
    for i in range(3):
        value.observe(paid(i, 1, 0, 1, 1, 0, 0, 1, 0))
    before, state = answers(value), copy.deepcopy(value.state_dict())
    for i in range(3, 6):
        assert value.observe(paid(i, *[level] * 8)) == {}
    assert torch.equal(answers(value), before) and value.state_dict()["scale"] == state["scale"]
    for a, b in zip(value.optimizer.state_dict()["state"].values(), state["optimizer"]["state"].values(), strict=True):
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    fresh = ValueLearner(width=8)
    assert fresh.observe(paid(0, *[level] * 8)) == {} and torch.equal(answers(fresh), torch.zeros(4))


def test_targets_stay_bounded_however_rewards_jump() -> None:
    """One failure among successes, then rewards a thousand times as large: a mean squared target of 10 at the most."""
    value = learner(batch=100)
    for i in range(40):
        value.observe(paid(i, 1, 1, 1, 1, 1, 1, 1, 1 - 1e-3))
    for i, scale in enumerate((1.0, 1e3, 1e-3)):
        r = torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1]) * scale
        assert "value/loss" in value.observe(paid(50 + i, *r.tolist()))
        assert float((((r - value.mean) / value.std) ** 2).mean()) <= 10 + 1e-6


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_the_scale_of_the_first_rewards_is_theirs(scale: float) -> None:
    """Tiny and huge rewards are told apart alike: the first iteration sets mean and deviation, the next ones follow."""
    value = learner(batch=100)
    r = torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1])
    value.observe(paid(0, *(scale * r).tolist()))
    assert value.mean == pytest.approx(scale * 0.625)
    assert value.std == pytest.approx(scale * float(r.std(correction=0)), rel=1e-5)


def test_a_deviation_of_one_is_not_taken_for_the_first() -> None:
    """Rewards whose spread happens to be 1: the second iteration moves the mean by a tenth, as any other."""
    value = learner(batch=100)
    value.observe(paid(0, 1, -1, 1, -1, 1, -1, 1, -1))
    assert value.std == pytest.approx(1.0)
    value.observe(paid(1, 3, 1, 3, 1, 3, 1, 3, 1))
    assert value.mean == pytest.approx(0.2)


def test_it_answers_in_units_of_the_reward() -> None:
    """V = mean + std · network, of each state's own prompt and time; its gradient is that of the sum, by row."""
    value = learner()
    value.mean, value.std = 5.0, 3.0
    value.enter(["nothing", *PROMPTS])
    x, t, row = torch.randn(3, 3, 2, 2), torch.tensor([0.9, 0.5, 0.1]), torch.tensor([2, 1, 2])
    words = word_ids([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    want = 5.0 + 3.0 * (x.flatten(1).mean(1) + t + words.sum(1) / 1e4)
    assert torch.allclose(value(x, t, row), want, rtol=1e-6)
    assert torch.allclose(value.gradient(x, t, row), torch.full_like(x, 3.0 / 12))
    fresh = ValueLearner()
    fresh.enter(PROMPTS)
    assert torch.equal(fresh(x, t, row * 0), torch.zeros(3)) and torch.equal(fresh.gradient(x, t, row * 0), x * 0)


def test_the_network_sees_state_time_and_words() -> None:
    """Each of the three moves its answer; padding does not."""
    torch.manual_seed(0)
    value = ValueLearner(width=8)
    value.prepare((3, 2, 2))
    value.enter(["a red square", "a red circle", "a red square"])
    x, t, row = torch.randn(1, 3, 2, 2), torch.tensor([0.4]), torch.tensor([0])
    base = value(x, t, row)
    for other in (value(x + 0.5, t, row), value(x, t + 0.3, row), value(x, t, row + 1)):
        assert (other - base).abs() > 1e-4
    assert torch.equal(value(x, t, row + 2), base)
    assert torch.allclose(value(x.repeat(2, 1, 1, 1), t.repeat(2), torch.tensor([0, 1]))[0], base[0], atol=1e-6)
