"""The clipped loss by hand: every KL scale, Guard's weight and bias, the range that follows A, the teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowalign.credit import Tree, likely
from flowalign.experience import Experience
from flowalign.kernels import Ancestral, EulerMaruyama, Kernel, Windowed
from flowalign.laws import Constant, Cps, FlowGrpo
from flowalign.methods.g2rpo import Granular
from flowalign.noise import Noise
from flowalign.objectives import Clip
from flowalign.policy import Policy, Switch
from flowalign.potentials import Difference
from flowalign.rollout import rollout
from flowalign.selection import Branch, Resample
from flowalign.trajectory import Nodes
from flowalign.valuenet import ValueLearner
from flowalign.values import Learned
from flowalign.windows import Cycle
from tests.worlds import F64, Normal

WORLD = Normal(0.5, 0.4)
TIMES = torch.linspace(1, 0, 9, dtype=F64)
SDE = EulerMaruyama(FlowGrpo(0.7))


class Moved:
    """The world with a velocity that is off by ``delta`` while it plays the current role."""

    process = WORLD.process

    def __init__(self, delta: float) -> None:
        self.delta = torch.tensor(delta, dtype=F64)

    def posterior(self, x, t, cond=None):
        return self.process.posterior(x, t, v=WORLD.posterior(x, t).velocity + self.delta)


class Base:
    """Sets the shift to zero for the length of a call."""

    def __init__(self, world: Moved) -> None:
        self.world = world

    def __enter__(self) -> None:
        self.kept, self.world.delta = self.world.delta, torch.zeros((), dtype=F64)

    def __exit__(self, *_: object) -> None:
        self.world.delta = self.kept


def steps(n: int = 6, kernel: Kernel = SDE):
    x = torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    tree = rollout(Policy(WORLD), kernel, TIMES, Nodes.enter(x), noise=Noise(0), keep=True)
    flat = tree.transitions([None] + [torch.linspace(-2, 2, n, dtype=F64)] * 8)
    return flat[(flat.s > 0).nonzero().flatten()]


@pytest.mark.parametrize("scale", ["exact", "flow_grpo", "velocity"])
def test_kl_scales(scale: str) -> None:
    """exact: that of torch.distributions per dimension; flow_grpo: Δμ²/2g², without Δt; velocity: Δv²."""
    world, batch = Moved(0.3), steps()
    policy = Policy(world, {"reference": Switch(lambda: Base(world))})
    found = Clip(SDE, 1e-2, kl=1.0, kl_scale=scale)(policy, batch).terms["kl"]
    law, _ = SDE(batch.x, world.posterior(batch.x, batch.t), batch.t, batch.s)
    base, _ = SDE(batch.x, WORLD.posterior(batch.x, batch.t), batch.t, batch.s)
    dist = lambda g: torch.distributions.Normal(g.mean, g.std.expand_as(g.mean))  # noqa: E731
    exact = torch.distributions.kl_divergence(dist(law), dist(base)).mean(1)
    g2 = law.std.reshape(-1) ** 2 / (batch.t - batch.s)
    published = ((law.mean - base.mean) ** 2).mean(1) / (2 * g2)
    want = {"exact": exact.mean(), "flow_grpo": published.mean(), "velocity": torch.tensor(0.09, dtype=F64)}[scale]
    assert torch.allclose(found, want) and found > 0


@pytest.mark.parametrize(("kernel", "rate"), [
    (EulerMaruyama(Constant(0.4)), True), (Windowed(SDE, lambda t, s: t > 0.4), True), (Ancestral(Cps(0.8)), False),
    (Windowed(Ancestral(Cps(0.8)), lambda t, s: t > 0.4), False),
], ids=["dance", "window", "cps", "cps-window"])  # fmt: skip
def test_the_published_kl_scale_follows_the_noise(kernel: Kernel, rate: bool) -> None:
    """Flow-GRPO's code divides by what its step calls the noise: g² of the SDE, the whole variance of CPS."""
    world, batch = Moved(0.3), steps(kernel=kernel)
    batch = batch[((batch.s > 0) & (batch.t > 0.4)).nonzero().flatten()]
    policy = Policy(world, {"reference": Switch(lambda: Base(world))})
    found = Clip(kernel, 1e-2, kl=1.0)(policy, batch).terms["kl"]
    law, _ = kernel(batch.x, world.posterior(batch.x, batch.t), batch.t, batch.s)
    base, _ = kernel(batch.x, WORLD.posterior(batch.x, batch.t), batch.t, batch.s)
    noise = law.std.reshape(-1) ** 2 / ((batch.t - batch.s) if rate else 1)
    assert torch.allclose(found, (((law.mean - base.mean) ** 2).mean(1) / (2 * noise)).mean()) and found > 0


def test_guard_by_hand() -> None:
    """ρ = exp{[(log p - log p_old)/D + mean (μ-μ_old)²/2std²] std}, per sample, and the loss over t - s."""
    world, batch = Moved(0.2), steps()
    loss = Clip(SDE, None, "guard")(Policy(world), batch).terms["policy"]
    by_hand = []
    for i in range(len(batch)):
        t, s = float(batch.t[i]), float(batch.s[i])
        x = batch.x[i : i + 1]
        law, _ = SDE(x, world.posterior(x, t), t, s)
        old, _ = SDE(x, WORLD.posterior(x, t), t, s)
        delta = (law.log_prob(batch.x_next[i : i + 1]) - old.log_prob(batch.x_next[i : i + 1])) / 2
        bias = ((law.mean - old.mean) ** 2).mean() / (2 * law.std**2)
        by_hand.append(-batch.weight[i] * ((delta + bias) * law.std).exp() / (t - s))
    assert torch.allclose(loss, torch.stack([b.reshape(()) for b in by_hand]).mean())


def test_range_follows_the_advantage() -> None:
    """ε (1 + reach · min(|A|, 1)) at either side; ranges may differ below and above."""
    ratio, advantage = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([[0.5], [3.0], [-0.5], [-3.0]])
    loss = Clip(SDE, (0.1, 0.2), reach=1.0).surrogate(ratio, advantage).flatten()
    want = [-0.5 * (1 + 0.2 * 1.5), -3.0 * (1 + 0.2 * 2), 0.5 * (1 - 0.1 * 1.5), 3.0 * (1 - 0.1 * 2)]
    assert torch.allclose(loss, torch.tensor(want))
    assert torch.allclose(Clip(SDE, None).surrogate(ratio, advantage), -advantage * ratio[:, None])


def test_what_is_called_clipped_follows_the_advantage_too() -> None:
    """The metric counts the ratios outside the range that their own advantage has, for each column of credit."""
    world, batch = Moved(0.3), steps()
    dull = torch.zeros_like(batch.weight)
    for weight in (batch.weight, torch.stack([batch.weight, dull], 1)):
        loss = Clip(SDE, 0.01, reach=30.0)
        out = loss(Policy(world), replace(batch, weight=weight)).metrics["clipped"]
        law, _ = SDE(batch.x, world.posterior(batch.x, batch.t), batch.t, batch.s)
        gap = (((law.log_prob(batch.x_next) - batch.log_prob) / 2).exp() - 1).abs()[:, None]
        outside = (gap > 0.01 * (1 + 30 * weight.reshape(len(batch), -1).abs().clamp_max(1))).double()
        assert float(out) == pytest.approx(float(outside.mean())) and 0 < outside.mean() < 1
        assert outside.mean() < (gap > 0.01).double().mean() - 0.1, "the widened range lets more through"


@pytest.mark.parametrize("reach", [0.0, 1.0])
def test_beyond_the_range_there_is_no_gradient(reach: float) -> None:
    """The published loss: -A ρ ∇log ρ where nothing is clipped, 0 elsewhere; log ρ is a mean over dimensions."""
    world, batch = Moved(0.3), steps()
    eps, total, stopped, pushed = 0.02, 0.0, 0, 0

    def slope(i: int) -> tuple[float, float]:
        world.delta = torch.tensor(0.3, dtype=F64, requires_grad=True)
        t, s, one = batch.t[i : i + 1], batch.s[i : i + 1], batch.x[i : i + 1]
        law, _ = SDE(one, world.posterior(one, t), t, s)
        log_ratio = (law.log_prob(batch.x_next[i : i + 1]) - batch.log_prob[i]).sum() / 2
        return float(log_ratio.detach().exp()), float(torch.autograd.grad(log_ratio, world.delta)[0])

    for i in range(len(batch)):
        (ratio, g), a = slope(i), float(batch.weight[i])
        wide = eps * (1 + reach * min(abs(a), 1))
        held = (a > 0 and ratio > 1 + wide) or (a < 0 and ratio < 1 - wide)
        stopped, pushed = stopped + held, pushed + (abs(ratio - 1) > wide and not held)
        total += 0.0 if held else -a * ratio * g / len(batch)
    assert stopped > 3 and pushed > 3, "some are held, others are let back into the range"
    world.delta = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(Clip(SDE, eps, reach=reach)(Policy(world), batch).terms["policy"], world.delta)
    assert float(found) == pytest.approx(total, rel=1e-9)
    held = batch[torch.tensor([i for i in range(len(batch)) if batch.weight[i] * (slope(i)[0] - 1) > 0.1])]
    world.delta = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (none,) = torch.autograd.grad(Clip(SDE, 1e-4, reach=reach)(Policy(world), held).terms["policy"], world.delta)
    assert len(held) > 3 and float(none) == 0


def test_a_ratio_per_dimension_is_the_density_over_their_number() -> None:
    """At ratio 1 the published per-dimension ratio has 1/D of the policy gradient, on states of any shape."""
    world = Moved(0.0)
    for shape in ((2,), (3, 4, 5)):
        x = torch.randn(6, *shape, dtype=F64, generator=torch.Generator().manual_seed(1))
        tree = rollout(Policy(WORLD), SDE, TIMES, Nodes.enter(x), noise=Noise(0))
        batch = tree.transitions([None] + [torch.linspace(-2, 2, 6, dtype=F64)] * 8, lambda k, t, s: s > 0)
        grads = []
        for ratio in ("density", "per_dim"):
            world.delta = torch.zeros((), dtype=F64, requires_grad=True)
            loss = Clip(SDE, 1e-2, ratio)(Policy(world), batch).terms["policy"]
            grads.append(float(torch.autograd.grad(loss, world.delta)[0]))
        assert grads[1] == pytest.approx(grads[0] / torch.Size(shape).numel(), rel=1e-9) and abs(grads[0]) > 1e-3


def test_the_teacher_is_needed_less_by_the_good() -> None:
    """LayerTuning-RL: λ mean σ(-A) ‖x̂0 - target‖²/D: a dynamically weighted process reward beside the policy's loss."""
    batch = steps()
    batch = replace(batch, target=torch.full_like(batch.x, 0.9))
    terms = Clip(SDE, 1e-2, supervised=0.3)(Policy(WORLD), batch).terms
    x0 = WORLD.posterior(batch.x, batch.t).x0
    want = 0.3 * (torch.sigmoid(-batch.weight) * ((x0 - 0.9) ** 2).mean(1)).mean()
    assert torch.allclose(terms["supervised"], want)
    led = torch.arange(len(batch)) % 3 == 0
    part = Clip(SDE, 1e-2, supervised=0.3)(Policy(WORLD), replace(batch, taught=led)).terms["supervised"]
    each = torch.sigmoid(-batch.weight) * ((x0 - 0.9) ** 2).mean(1)
    assert torch.allclose(part, 0.3 * each[led].sum() / len(batch)), "steps that led elsewhere are not taught"
    assert "supervised" not in Clip(SDE, 1e-2)(Policy(WORLD), batch).terms


@pytest.mark.parametrize("settings", [
    {"ratio": "density"}, {"ratio": "per_dim"}, {"ratio": "mse"}, {"ratio": "guard"}, {"supervised": 0.7},
    {"kl": 1.0, "kl_scale": "exact"}, {"kl": 1.0}, {"kl": 1.0, "kl_scale": "velocity"}, {"ratio": "guard", "kl": 0.5},
], ids=str)  # fmt: skip
def test_every_term_has_the_gradient_of_its_value(settings: dict) -> None:
    """By finite differences in the velocity: nothing that depends on the policy is cut from the graph."""
    world, batch = Moved(0.2), steps()
    batch = replace(batch, target=torch.full_like(batch.x, 0.9))
    policy = Policy(world, {"reference": Switch(lambda: Base(world))})
    loss = Clip(SDE, None, **settings)

    def total(delta: float) -> torch.Tensor:
        world.delta = torch.tensor(delta, dtype=F64, requires_grad=True)
        terms = loss(policy, batch).terms
        assert all(v.requires_grad for v in terms.values()), "each of them alone"
        return torch.stack(list(terms.values())).sum()

    value = total(0.2)
    (g,) = torch.autograd.grad(value, world.delta)
    up, down = (float(total(0.2 + h).detach()) for h in (1e-5, -1e-5))
    assert float(g) == pytest.approx((up - down) / 2e-5, rel=1e-5) and abs(float(g)) > 1e-3


def experience(tree, rewards: dict[str, torch.Tensor], weights: dict[str, float], rows: int) -> Experience:
    return Experience(Policy(WORLD), tree, None, torch.arange(rows), rewards, weights, lambda x, i: {})


def test_backup_by_likelihood() -> None:
    """Siblings are averaged with the softmax of their log-densities per dimension, by recursion over the tree."""
    tree = rollout(Policy(WORLD), SDE, TIMES, Nodes.enter(torch.randn(1, 2, dtype=F64)), noise=Noise(0),
                   select=Branch({0: 2, 2: 3}))  # fmt: skip
    total = torch.randn(6, dtype=F64)

    def value(level: int, node: int) -> float:
        if level == 8:
            return float(total[node])
        below = tree.at(level + 1)
        mine = (below.parent == node).nonzero().flatten().tolist()
        weight = torch.softmax(torch.stack([below.log_prob[i] / 2 for i in mine]), 0)
        return sum(float(w) * value(level + 1, i) for w, i in zip(weight, mine, strict=True))

    found = likely(tree, total)
    for level in range(9):
        assert torch.allclose(
            found[level], torch.tensor([value(level, i) for i in range(len(tree.at(level)))], dtype=F64)
        )
    assert not torch.allclose(found[0], total.mean())
    credit = Tree(how="probability")(experience(tree, {"r": total}, {"r": 1.0}, 1))
    v = found[4]
    assert torch.allclose(credit[4], ((v - v.mean()) / (v.std() + 1e-8)).clamp(-5, 5))


def test_granularities_normalise_each_reward() -> None:
    """G²RPO with two rewards: each is normalised in the branch before they are weighted and added."""
    tree = rollout(Policy(WORLD), SDE, TIMES, Nodes.enter(torch.randn(1, 1, dtype=F64)), noise=Noise(0),
                   select=Branch({2: 6}))  # fmt: skip
    rewards = {"a": torch.randn(6, dtype=F64), "b": 100 * torch.randn(6, dtype=F64)}
    e = experience(tree, rewards, {"a": 1.0, "b": 0.5}, 1)
    z = {k: (r - r.mean()) / (r.std() + 1e-8) for k, r in rewards.items()}
    credit = Granular(Cycle(TIMES, (2,)), strides=(1,))(e)
    assert torch.allclose(credit[3], z["a"] + 0.5 * z["b"], atol=1e-6)


def test_granularities_compare_the_siblings_of_a_branch() -> None:
    """Two branches of one prompt differ by their noises too: each is centred by itself; what stands out is cut at 5."""
    one = Nodes.enter(torch.randn(2, 1, dtype=F64), torch.zeros(2).long())
    tree = rollout(Policy(WORLD), SDE, TIMES, one, noise=Noise(0), select=Branch({2: 40}))
    r = torch.randn(80, dtype=F64, generator=torch.Generator().manual_seed(3))
    r[7], r[40:] = 50.0, 10 + 3 * r[40:]
    credit = Granular(Cycle(TIMES, (2,)), strides=(1,))(experience(tree, {"r": r}, {"r": 1.0}, 1))[3]
    z = torch.cat([(v - v.mean()) / v.std() for v in (r[:40], r[40:])])
    assert z[7] > 5 and torch.allclose(credit, z.clamp(-5, 5), atol=1e-6)


@pytest.mark.parametrize(("level", "stride", "left"), [(1, 2, (2, 3, 5, 7, 8)), (2, 2, (3, 4, 6, 8)),
                                                       (2, 3, (3, 4, 7, 8)), (6, 3, (7, 8)), (7, 2, (8,))])  # fmt: skip
def test_a_coarse_completion_always_reaches_data(level: int, stride: int, left: tuple[int, ...]) -> None:
    """The next time after the step, every ``stride``-th from it on, and data time whether or not that lands on it."""
    tree = rollout(Policy(WORLD), SDE, TIMES, Nodes.enter(torch.randn(1, 1, dtype=F64)), noise=Noise(0),
                   select=Branch({level: 5}))  # fmt: skip
    x = tree.at(level + 1).x
    if len(left) > 1:
        x = rollout(Policy(WORLD), EulerMaruyama(), TIMES[list(left)], Nodes.enter(x), noise=Noise(0)).leaves.x
    e = experience(tree, {"r": tree.leaves.x[:, 0]}, {"r": 0.5}, 1)
    e = replace(e, scores=lambda x, i: {"r": (5 * x[:, 0]).sin()})
    v = (5 * x[:, 0]).sin()  # not linear, or every grid of this linear world would give the same advantages
    want = 0.5 * (v - v.mean()) / (v.std() + 1e-8)
    assert torch.allclose(Granular(Cycle(TIMES, (level,)), strides=(stride,))(e)[level + 1], want, atol=1e-6)


def test_a_learnt_value_steers_particles() -> None:
    """What the rollouts taught weighs particles too: resampled by it, they end higher than without."""
    learner = ValueLearner(width=16, lr=1e-2, passes=4)
    learner.enter(["a"])
    tree = rollout(Policy(Image()), SDE, TIMES, start(256), noise=Noise(1))
    e = Experience(Policy(Image()), tree, Prompt(), torch.zeros(1).long(), {"r": reward(tree.leaves.x)}, {"r": 1.0},
                   lambda x, i: {})  # fmt: skip
    first = learner.observe(e)["value/loss"]
    for _ in range(15):
        last = learner.observe(e)["value/loss"]
    assert last < 0.7 * first
    kwargs = {"noise": Noise(2), "n_rows": 1}
    plain = rollout(Policy(Image()), SDE, TIMES, start(256), **kwargs)
    tilted = rollout(Policy(Image()), SDE, TIMES, start(256), value=Learned(learner), potential=Difference(20.0),
                     select=Resample(), **kwargs)  # fmt: skip
    gap = reward(tilted.leaves.x).mean() - reward(plain.leaves.x).mean()
    assert gap > 5 * reward(plain.leaves.x).std() / 256**0.5


class Image:
    """The world with states (1, 4, 4), which a value network can look at."""

    process = WORLD.process

    def posterior(self, x, t, cond=None):
        return WORLD.posterior(x, t)


class Prompt:
    prompts = ("a",)


def start(n: int) -> Nodes:
    return Nodes.enter(torch.randn(n, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(5)),
                       torch.zeros(n, dtype=torch.long))  # fmt: skip


def reward(x: torch.Tensor) -> torch.Tensor:
    return x.mean((1, 2, 3))
