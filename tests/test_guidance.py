"""Guides: their gradients, that a twisted proposal is paid for by its weight, and that the optimal one is free."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from worlds import (
    F64,
    ExactReverse,
    Net,
    Normal,
    Quad,
    TwoPrompts,
    cosine,
    log_mean_exp,
)

from flowalign.guidance import Along, Twist
from flowalign.kernels import Ancestral, EulerMaruyama
from flowalign.laws import Constant, Ddim, FlowGrpo, Memoryless
from flowalign.noise import Noise, Stream
from flowalign.policy import Policy
from flowalign.potentials import Difference
from flowalign.process import Karras, Posterior, Rectified
from flowalign.rollout import rollout
from flowalign.selection import Resample
from flowalign.trajectory import Nodes
from flowalign.values import Tweedie, Value

TIMES = torch.linspace(1, 0, 7, dtype=F64)
LATER = torch.linspace(0.95, 0, 7, dtype=F64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def score(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return 1.3 * x[:, 0] - 0.2 * (x**2).sum(1)


def grown(policy, kernel, guide, times=LATER, **slots):
    start = Nodes.enter(draw(4, 2))
    return rollout(policy, kernel, times, start, torch.arange(4), noise=Noise(0), guide=guide, keep=True, **slots)


def test_twist_is_the_gradient_through_the_network():
    net = Net(2).double()
    tree = grown(Policy(net), EulerMaruyama(Constant(0.4)), Twist(2.5), value=Tweedie(score))
    for k in range(6):
        nodes, t, h = tree.at(k), float(LATER[k]), 1e-6
        for d in range(2):
            step = torch.zeros(2, dtype=F64)
            step[d] = h
            up, down = (score(net.posterior(nodes.x + e, t, nodes.row).x0, nodes.row) for e in (step, -step))
            assert torch.allclose(nodes.gradient[:, d], 2.5 * (up - down) / (2 * h), atol=1e-8)
        assert not nodes.gradient.requires_grad and not nodes.posterior.x0.requires_grad
        assert torch.allclose(nodes.value, score(nodes.posterior.x0, nodes.row))


@pytest.mark.parametrize("weighted", [True, False])
def test_a_proposal_shifts_the_mean_and_pays_for_it(weighted):
    def field(x, posterior, t, row):
        return posterior.x0 * 0.7 + t

    kernel = EulerMaruyama(Constant(0.4))
    tree = grown(Policy(Net(2).double()), kernel, Along(field, "proposal", weighted))
    log_w = torch.zeros(4, dtype=F64)
    for k in range(6):
        a, b = tree.at(k), tree.at(k + 1)
        shifted = a.step.shift(a.step.std**2 * field(a.x, a.posterior, float(LATER[k]), a.row))
        z = Noise(0).normal(k, a.row, torch.zeros(4, dtype=torch.long), (2,))
        assert torch.allclose(b.x, shifted.sample(z), atol=1e-14)
        assert torch.allclose(b.log_prob, a.step.log_prob(b.x), atol=1e-12)  # of the unguided law, always
        log_w = log_w + (a.step.log_prob(b.x) - shifted.log_prob(b.x)) * weighted
        assert torch.allclose(b.log_w, log_w, atol=1e-12)
    assert (log_w.abs().max() > 0.01) == weighted


def test_posterior_guidance_adds_to_the_score():
    def field(x, posterior, t, row):
        return torch.sin(x)

    for kernel in (EulerMaruyama(), EulerMaruyama(Constant(0.4)), Ancestral(Ddim(1.0))):
        tree = grown(Policy(Net(2).double()), kernel, Along(field))
        for k in range(6):
            a, b, (t, s) = tree.at(k), tree.at(k + 1), LATER[k : k + 2].tolist()
            law = kernel(a.x, a.posterior.guided(torch.sin(a.x)), t, s)[0]
            z = Noise(0).normal(k, a.row, torch.zeros(4, dtype=torch.long), (2,))
            assert torch.allclose(b.x, law.sample(z), atol=1e-14)
            assert not b.log_w.any()
            want = a.step.log_prob(b.x) if kernel.stochastic(t, s) else torch.zeros(4, dtype=F64)
            assert torch.allclose(b.log_prob, want)


def test_windows_limits_and_schedules():
    policy = Policy(Net(2).double())
    plain = grown(policy, EulerMaruyama(Constant(0.4)), None)
    late = Twist(lambda t: 10 * t, limit=0.05, window=lambda t: t < 0.5)
    tree = grown(policy, EulerMaruyama(Constant(0.4)), late, value=Tweedie(score))
    free = grown(
        policy, EulerMaruyama(Constant(0.4)), Twist(lambda t: 10 * t, window=late.window), value=Tweedie(score)
    )
    for k in range(6):
        t = float(LATER[k])
        assert (tree.at(k).gradient is not None) == (t < 0.5) == late.active(t)
        if t >= 0.5:
            assert torch.equal(tree.at(k).x, plain.at(k).x)
    first = next(k for k in range(6) if late.active(float(LATER[k])))
    norm, full = tree.at(first).gradient.norm(dim=1), free.at(first).gradient.norm(dim=1)
    assert torch.allclose(norm, full.clamp_max(0.05)) and (full > 0.05).any()
    direction = tree.at(first).gradient / norm[:, None] - free.at(first).gradient / full[:, None]
    assert direction.abs().max() < 1e-12
    short = Twist(1e-3, limit=5.0).gradient(*differentiable(), torch.zeros(4, dtype=torch.long), VALUE[0])
    assert torch.allclose(short, 1e-3 * torch.ones(4, 2, dtype=F64))  # a short gradient is left alone
    assert Along(lambda *a: a[0], window=lambda t: t > 0.5).active(0.6) and not Along(
        lambda *a: a[0], window=lambda t: t > 0.5
    ).active(0.4)  # fmt: skip
    assert Twist().active(0.1) and Along(lambda *a: a[0]).active(0.1)
    assert Twist().scale == 1.0 and Twist().where == "proposal" and Along(lambda *a: a[0]).where == "posterior"


VALUE: list[torch.Tensor] = [torch.zeros(0)]


def differentiable():
    x = draw(4, 2).requires_grad_()
    VALUE[0] = x.sum(1)
    return x, Posterior(x, x, Rectified(), 0.5), 0.5


def test_refusals():
    policy, start = Policy(Net(2).double()), Nodes.enter(draw(4, 2))
    for value in (None, Tweedie(lambda x, row: torch.zeros(len(x), dtype=F64))):
        with pytest.raises(ValueError, match="a gradient guide needs a differentiable value"):
            rollout(policy, EulerMaruyama(Constant()), TIMES, start, noise=Noise(0), value=value, guide=Twist())
    with pytest.raises(ValueError, match=r"this kernel draws no noise from t = 1 to 0\.83"):
        rollout(policy, EulerMaruyama(), TIMES, start, noise=Noise(0), guide=Along(lambda *a: a[0], "proposal"))


def test_gradient_evaluations_are_booked():
    policy = Policy(Net(2).double())
    grown(policy, EulerMaruyama(Constant(0.4)), Twist(1.0, window=lambda t: t < 0.5), value=Tweedie(score))
    active = sum(float(t) < 0.5 for t in LATER[:-1])
    assert policy.ledger.evaluations == 24 and policy.ledger.gradients == 4 * active
    policy = Policy(Net(2).double())
    grown(policy, EulerMaruyama(Constant(0.4)), Along(lambda x, *a: x))
    assert policy.ledger.evaluations == 24 and policy.ledger.gradients == 0


KERNELS = {
    "ddpm": Ancestral(Ddim(1.0)),
    "constant": EulerMaruyama(Constant(0.5)),
    "flow-grpo": EulerMaruyama(FlowGrpo()),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("guide", [Twist(1.5), Twist(4.0, limit=0.6), Twist(1.5, window=lambda t: t < 0.6)])
def test_a_twisted_proposal_leaves_the_evidence_unbiased(kernel, guide):
    for n, threshold in ((2, 0.5), (4, 0.0), (4, 2.0)):
        world = TwoPrompts(copies=2500, n=n, kernel=kernel)
        tree = world.run(3, potential=Difference(1.5), guide=guide, select=Resample("systematic", threshold))
        world.check(tree.log_evidence(), 1.5)


def test_an_unpaid_twist_is_caught():
    world = TwoPrompts(copies=2500)
    unpaid = Along(lambda x, p, t, row: torch.full_like(x, 0.8), "proposal", weighted=False)
    with pytest.raises(AssertionError, match="E"):
        world.check(world.run(potential=Difference(1.5), guide=unpaid).log_evidence(), 1.5)
    paid = Along(unpaid.field, "proposal")
    world.check(world.run(potential=Difference(1.5), guide=paid).log_evidence(), 1.5)


def test_twisting_lowers_the_variance():
    world = TwoPrompts(copies=1500)
    plain = world.ratios(world.run(potential=Difference(2.0)).log_evidence(), 2.0)[1]
    twist = world.ratios(world.run(potential=Difference(2.0), guide=Twist(2.0)).log_evidence(), 2.0)[1]
    assert (twist < 0.8 * plain).all()


class ExactValue(Value):
    """``V_t`` of a linear reward on a ``Normal``, in log units."""

    def __init__(self, world: Normal, h: float) -> None:
        self.world, self.h = world, h

    def __call__(self, x, posterior, t, row):
        q = Quad(torch.zeros(1, 1, dtype=F64), torch.tensor([self.h], dtype=F64))
        return log_mean_exp(q, posterior.x0, (self.world.spread(t) ** 2).reshape(1, 1))


class AtData(ExactValue):
    """At data time the value is the reward itself."""

    def __call__(self, x, posterior, t, row):
        return self.h * x[:, 0] if t == 0 else super().__call__(x, posterior, t, row)


@pytest.mark.parametrize("process", [Rectified(), cosine(0.0, torch.pi / 2), Karras(300.0, 3.0)])
def test_the_optimal_twist_gives_equal_weights_and_the_exact_evidence(process):
    """Zero variance (E7): proposal ``p(x_s|x_t) exp V_s``, value V_t, started where V is flat."""
    h, world = 1.4, Normal(0.7, 0.5, process)
    times = TIMES.tolist()

    def slope(x, posterior, t, row):
        s = next(b for a, b in pairwise(times) if a == t)
        a, _ = process(s)
        return torch.full_like(x, h * float(a * world.std**2 / world.moments(s)[1]))

    start = Nodes.enter(world.start(draw(50, 1)), torch.zeros(50, dtype=torch.long))
    flat = isinstance(process, Karras)  # σ_max = 300 is not quite pure noise
    for select in (None, Resample("multinomial", 2.0)):
        tree = rollout(
            Policy(world), ExactReverse(world), TIMES, start, noise=Noise(1), select=select,
            value=AtData(world, h), potential=Difference(1.0), guide=Along(slope, "proposal"),
        )  # fmt: skip
        log_z = h * world.mean + 0.5 * h**2 * world.std**2
        for k in range(7):
            spread = tree.at(k).log_w - tree.at(k).log_w.mean()
            assert spread.abs().max() < (1e-2 if flat else 1e-12)
        assert float(tree.log_evidence()) == pytest.approx(log_z, abs=1e-3 if flat else 1e-11)
        assert tree.leaves.x.std() > 0.3  # and they are samples, not copies


def test_memoryless_twist_reaches_the_tilted_target():
    """With the exact gradient of V_t and the memoryless law, unweighted samples have the tilted mean (Doob)."""
    h, world, n = 1.4, Normal(), 10000
    times = torch.linspace(1, 0, 61, dtype=F64)

    def slope(x, posterior, t, row):
        a, _ = world.process(t)
        return torch.full_like(x, h * float(a * world.std**2 / world.moments(t)[1]))

    start = Nodes.enter(world.start(draw(n, 1)), torch.zeros(n, dtype=torch.long))
    ends = {}
    for law in (Memoryless(), FlowGrpo(0.7)):
        tree = rollout(
            Policy(world), EulerMaruyama(law), times, start, noise=Stream(torch.Generator().manual_seed(3)),
            guide=Along(slope, "proposal", weighted=False),
        )  # fmt: skip
        ends[type(law)] = float(tree.leaves.x.mean())
    target = world.mean + h * world.std**2
    assert abs(ends[Memoryless] - target) < 0.025 and abs(ends[FlowGrpo] - target) > 0.1
