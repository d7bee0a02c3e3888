"""Balance losses: ∇-DB and forward-looking balance vanish at the optimum of a Gaussian tilt, and are what they say.

The world is N(m, c²) with a linear reward: the optimal policy is the base plus one number per step, and the optimal
log-flows are the soft values of ``tests.worlds.riccati``, so that every residual can be brought to zero exactly.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from flowalign.adjoint import lean_adjoint, reward_gradient
from flowalign.batches import Paths, paths
from flowalign.experience import Experience
from flowalign.kernels import Ancestral, EulerMaruyama
from flowalign.laws import Ddim, FlowGrpo, Memoryless
from flowalign.lookahead import LookAhead, LookAheadGradient, PromptedFlow, strata
from flowalign.methods.forward_looking import ForwardLooking
from flowalign.methods.nabla_db import NablaDB
from flowalign.noise import Noise
from flowalign.objectives import AdjointMatching, TrajectoryBalance
from flowalign.objectives.local import LocalBalance
from flowalign.objectives.nabla import GradientBalance
from flowalign.policy import Policy, Weights
from flowalign.rollout import rollout
from flowalign.trajectory import Nodes
from tests.test_closure import LAM, SLOPE, WORLD, newton, noises, reward, trained
from tests.worlds import F64, Net, chain, riccati

STEPS = 8
TIMES = torch.linspace(1, 0, STEPS + 1, dtype=F64)
KERNELS = [EulerMaruyama(Memoryless()), EulerMaruyama(FlowGrpo(0.7))]


class SoftFlow(nn.Module):
    """The exact residual flow ``V_k(x) - λ α^p r(x̂0(x))`` of the linear reward, 0 at data time."""

    def __init__(self, policy: Policy, kernel, role: str = "current", power: float = 2.0) -> None:
        super().__init__()
        self.policy, self.power, self.role = policy, power, role
        self.values = riccati(chain(WORLD, kernel, TIMES), 0, LAM * SLOPE)

    def forward(self, x, t, row, cond):
        level = (t[:, None].to(x) - TIMES).abs().argmin(1)
        q = torch.stack([v.q for v in self.values])[level]
        c = torch.stack([v.c for v in self.values])[level]
        ahead = LAM * (1 - t) ** self.power * SLOPE * self.policy.posterior(x, t, None, self.role).x0[:, 0]
        return q * x[:, 0] + c - ahead


@cache
def solved(kernel) -> torch.Tensor:
    """The optimal number of each step."""
    policy, net = trained(TIMES)
    tree = rollout(policy, kernel, TIMES, Nodes.enter(noises(4)), noise=Noise(0))
    a = lean_adjoint(policy, kernel, tree, -LAM * reward_gradient(reward, tree.leaves.x, tree.leaves.row))
    newton(net, lambda: AdjointMatching(kernel)(policy, tree.transitions([None, *a[1:]])).terms["adjoint"])
    return net.shift.detach()


def optimum(kernel, seed: int = 1):
    """The policy that samples the chain's tilt, and paths it was not sampled from."""
    policy, net = trained(TIMES)
    net.shift.data = solved(kernel).clone()
    off = rollout(
        policy, kernel, TIMES, Nodes.enter(3 * noises(32, seed)), noise=Noise(seed), role="reference", keep=True
    )
    return policy, net, off


def experience(policy: Policy, tree, rows: int | None = None, cond=None) -> Experience:
    n = tree.n_rows if rows is None else rows
    return Experience(
        policy, tree, cond, torch.zeros(n, dtype=torch.long), {"r": reward(tree.leaves.x)}, {"r": 1.0},
        lambda x, i: {"r": reward(x)},
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- ∇-DB


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nabla_residuals_vanish_at_the_optimum(kernel, scaled: bool) -> None:
    """Both, at every step of any path, with the exact residual flow; and neither does away from it."""
    policy, net, tree = optimum(kernel)
    e = experience(policy, tree)
    loss = GradientBalance(kernel, scaled=scaled)
    loss.flow = SoftFlow(policy, kernel)
    batch = tree.transitions(LookAheadGradient(LAM)(e))
    ahead, behind, _ = loss.residuals(policy, batch)
    assert ahead.abs().max() < 1e-10 and behind.abs().max() < 1e-10
    assert loss(policy, batch).terms["forward"] < 1e-20
    net.shift.data += 0.01
    ahead, behind, _ = loss.residuals(policy, batch)
    assert ahead.abs().max() > 1e-3 and behind.abs().max() > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
def test_nabla_identities(kernel) -> None:
    """The forward score is λ c times the slope of the rest of the chain; at data time F is left out and R̃ is λ ∇r."""
    policy, _, tree = optimum(kernel)
    batch = tree.transitions(LookAheadGradient(LAM)(experience(policy, tree)))
    loss = GradientBalance(kernel, scaled=False)
    ahead, behind, _ = loss.residuals(policy, batch)  # no flow: what is left is ∇F itself
    links = chain(WORLD, kernel, TIMES)
    left = [torch.stack([link.A for link in links[k:]] + [torch.ones((), dtype=F64)]).prod() for k in range(STEPS + 1)]
    before, after = batch.weight.unbind(1)
    for k in range(STEPS):
        mine = batch.level == k
        assert torch.allclose(ahead[mine] + after[mine], LAM * SLOPE * left[k + 1].expand(32, 1), atol=1e-10)
        assert torch.allclose(before[mine] - behind[mine], LAM * SLOPE * left[k].expand(32, 1), atol=1e-10)
    last = batch.level == STEPS - 1
    assert ahead[last].abs().max() < 1e-10 and torch.allclose(after[last], torch.full((32, 1), LAM * SLOPE, dtype=F64))
    assert behind[last].abs().max() > 1e-3  # the last step's reverse residual is no zero target: it is ∇F of before it
    assert (before[batch.level == 0] == 0).all()  # pure noise promises nothing


def test_nabla_leaves_atoms_out() -> None:
    """DDPM's step into clean data draws no noise: its residual is 0, and so is its gradient; nothing is NaN."""
    kernel = Ancestral(Ddim(1.0))
    policy, net = trained(TIMES)
    tree = rollout(policy, kernel, TIMES, Nodes.enter(noises(8)), noise=Noise(0))
    batch = tree.transitions(LookAheadGradient(LAM)(experience(policy, tree)))
    ahead, behind, _ = GradientBalance(kernel).residuals(policy, batch)
    last = batch.level == STEPS - 1
    assert (ahead[last] == 0).all() and (behind[last] == 0).all() and (ahead[~last] != 0).any()
    (g,) = torch.autograd.grad(GradientBalance(kernel)(policy, batch).terms["reverse"], net.shift)
    assert torch.isfinite(g).all()


class Curved(nn.Module):
    """A residual flow that is nobody's answer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 7).double(), nn.Linear(7, 1).double()

    def forward(self, x, t, row, cond):
        return self.outer(torch.tanh(self.inner(torch.cat([x, t[:, None].to(x)], 1))))[:, 0]


def moved(kernel):
    """A small network away from its base, a rollout of it and its experience."""
    torch.manual_seed(0)
    net = Net(dim=2, rows=1).double()
    parameters = list(net.parameters())
    policy = Policy(net, {n: Weights(parameters) for n in ("reference", "old")})
    with torch.no_grad():
        for p in parameters:
            p += 0.2 * torch.randn_like(p)
    row = torch.zeros(6, dtype=torch.long)
    z = torch.randn(6, 2, dtype=F64)
    tree = rollout(
        policy, kernel, TIMES, Nodes.enter(z, row), torch.zeros(1, dtype=torch.long), noise=Noise(0), keep=True
    )
    e = Experience(
        policy, tree, torch.zeros(1, dtype=torch.long), row[:1], {"r": torch.sin(2 * tree.leaves.x).sum(1)}, {"r": 1.0},
        lambda x, i: {"r": torch.sin(2 * x).sum(1)},
    )  # fmt: skip
    return policy, parameters, e


def gap(loss, parameters, h: float = 1e-5) -> tuple[float, float]:
    """The gradient along a random direction, and its distance from a central difference."""
    g = torch.Generator().manual_seed(2)
    ways = [torch.randn(p.shape, generator=g, dtype=F64) for p in parameters]
    grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
    exact = sum((a * b).sum() for a, b in zip(grads, ways, strict=True) if a is not None)
    ends = []
    for sign in (1, -1):
        for p, way in zip(parameters, ways, strict=True):
            p.data += sign * h * way
        ends.append(loss().detach())
        for p, way in zip(parameters, ways, strict=True):
            p.data -= sign * h * way
    return float(exact), float(abs(exact - (ends[0] - ends[1]) / (2 * h)))


@pytest.mark.parametrize("reverse", [0.0, 0.7])
def test_nabla_gradient_is_the_finite_difference(reverse: float) -> None:
    """Of every term, by the policy's weights and by the flow's, second derivatives and all."""
    kernel = KERNELS[0]
    policy, parameters, e = moved(kernel)
    torch.manual_seed(1)
    loss = GradientBalance(kernel, reverse=reverse, stay=0.3, flow=lambda shape: Curved())
    loss.prepare((2,))
    batch = e.trajectory.transitions(LookAheadGradient(1.3)(e))
    every = [*parameters, *loss.parameters()]
    assert len(every) == len(parameters) + 4
    slope, off = gap(lambda: torch.stack(list(loss(policy, batch, e.cond).terms.values())).sum(), every)
    assert abs(slope) > 1e-2 and off < 1e-7 * max(1.0, abs(slope))
    assert set(loss(policy, batch, e.cond).terms) == {"forward", "stay"} | ({"reverse"} if reverse else set())


class Attentive(Net):
    """The network with fused attention over its coordinates, as real denoisers have it."""

    def forward(self, x, t, row):
        v = super().forward(x, t, row)
        q = v[:, None, :, None].repeat(1, 1, 1, 8)
        return v + torch.nn.functional.scaled_dot_product_attention(q, q, q)[:, 0, :, 0]


def test_reverse_residual_through_attention() -> None:
    """Fused attention kernels have no second derivative: the reverse residual must not meet one."""
    torch.manual_seed(0)
    net = Attentive(dim=2, rows=1)
    policy = Policy(net, {"reference": Weights(list(net.parameters()))})
    cond = torch.zeros(1, dtype=torch.long)
    tree = rollout(policy, KERNELS[0], TIMES, Nodes.enter(torch.randn(3, 2), cond.repeat(3)), cond, noise=Noise(0))
    levels = [None, *[torch.zeros(3, 2, 2)] * STEPS]
    with torch.no_grad():
        net.outer.weight += 0.1
    loss = GradientBalance(KERNELS[0])(policy, tree.transitions(levels), cond).terms["reverse"]
    (g,) = torch.autograd.grad(loss, net.outer.weight)
    assert torch.isfinite(g).all() and g.abs().max() > 0


def test_look_ahead_gradient_is_the_finite_difference() -> None:
    """∇R̃ goes through the network, the reward and α^p; at data time it is λ ∇r."""
    policy, _, e = moved(KERNELS[0])
    credit = LookAheadGradient(1.3, power=1.0)
    for k in (2, STEPS):
        nodes = e.trajectory.at(k)
        way = torch.randn(6, 2, dtype=F64)
        t = float(TIMES[k])

        def promised(x: torch.Tensor, t: float = t, k: int = k, row: torch.Tensor = nodes.row) -> torch.Tensor:
            x0 = x if k == STEPS else policy.posterior(x, t, row).x0
            return 1.3 * (1 - t) * torch.sin(2 * x0).sum(1)

        difference = (promised(nodes.x + 1e-5 * way) - promised(nodes.x - 1e-5 * way)) / 2e-5
        assert ((credit.at(e, k) * way).sum(1) - difference).abs().max() < 1e-7


def test_strata_draw_one_step_in_each() -> None:
    """Equal parts of the chain, one step of each; another draw each iteration, the same when asked again."""
    chosen = strata(0.25, 20)
    draws = [chosen(0, i) for i in range(200)]
    assert all([k // 4 for k in d] == [0, 1, 2, 3, 4] for d in draws) and chosen(0, 7) == draws[7]
    assert {k for d in draws for k in d} == set(range(20))
    policy, _, e = moved(KERNELS[0])
    paid = policy.ledger.gradients
    out = LookAheadGradient(1.0, chosen=strata(0.25, STEPS))(e)
    wanted = strata(0.25, STEPS)(e.seed, e.iteration)
    assert [k for k, c in enumerate(out) if c is not None] == [k + 1 for k in wanted]
    assert policy.ledger.gradients - paid <= 6 * 4 < 6 * STEPS


# ---------------------------------------------------------------------------------------------------- forward-looking


def whole(e: Experience, scale: float = LAM, power: float = 2.0) -> Paths:
    return paths(e, LookAhead(scale, power)(e))


@pytest.mark.parametrize("span", [1, 3, STEPS, 50])
@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_looking_vanishes_at_the_optimum(kernel, span: int) -> None:
    """Every window of every off-policy path, but for log Z at the start: it is V_0 of what the chain remembers."""
    policy, net, tree = optimum(kernel)
    e = experience(policy, tree)
    loss = LocalBalance(kernel, span)
    loss.flow = SoftFlow(policy, kernel, "reference")  # the look-ahead is that of the weights that sampled
    r = loss.residual(policy, whole(e))
    v0 = loss.flow.values[0](tree.at(0).x[:, 0])
    assert r.shape == (max(STEPS - span, 0) + 1, 32)
    assert r[1:].abs().max() < 1e-10 if span < STEPS else len(r) == 1
    assert (r[0] + v0).abs().max() < 1e-10
    net.shift.data[-1] += 0.01
    assert loss.residual(policy, whole(e))[-1].abs().max() > 1e-4


def test_the_sum_of_local_residuals_is_the_balance_of_the_whole() -> None:
    """Windows telescope: whatever the flow and the look-ahead are, they cancel inside."""
    policy, _, e = moved(KERNELS[0])
    torch.manual_seed(1)
    local, tb = LocalBalance(KERNELS[0], 1, flow=lambda s: Curved()), TrajectoryBalance(KERNELS[0], 1.0)
    local.prepare((2,))
    batch = whole(e, 1.0)
    assert torch.allclose(
        local.residual(policy, batch, e.cond).sum(0), tb.residual(policy, paths(e), e.cond), atol=1e-12
    )


@pytest.mark.parametrize("log_z", ["vargrad", "learned"])
def test_the_longest_window_is_trajectory_balance(log_z: str) -> None:
    """Loss and gradient, for VarGrad and for a learned log Z."""
    kernel = KERNELS[1]
    policy, parameters, e = moved(kernel)
    local, tb = LocalBalance(kernel, STEPS, log_z), TrajectoryBalance(kernel, 1.7, log_z)
    if log_z == "learned":
        for m in (local, tb):
            m.log_z.table.data.fill_(0.4)
    batch = whole(e, 1.7)
    batch = replace(batch, reward=batch.reward)
    a, b = (m(policy, batch, e.cond).terms["balance"] for m in (local, tb))
    assert torch.allclose(a, b, atol=1e-12)
    ga, gb = (torch.autograd.grad(z, parameters[:2]) for z in (a, b))
    assert all(torch.allclose(x, y, atol=1e-10) for x, y in zip(ga, gb, strict=True))


def test_vargrad_takes_each_prompts_own_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts whose imbalances differ by a constant: none of it counts, and no prompt hears of the other's."""
    r = torch.tensor([1.0, 3.0, 10.0, 20.0], dtype=F64)
    row = torch.tensor([0, 0, 1, 1])
    batch = Paths(None, row, r, row, 1)
    monkeypatch.setattr(TrajectoryBalance, "residual", lambda self, policy, batch, cond=None: r)
    loss = TrajectoryBalance(KERNELS[0])(None, batch).terms["balance"]
    assert loss == (1 + 1 + 25 + 25) / 4
    windows = torch.stack([r, torch.tensor([0.0, 0.0, 0.0, 2.0], dtype=F64)])
    monkeypatch.setattr(LocalBalance, "residual", lambda self, policy, batch, cond=None: windows)
    assert LocalBalance(KERNELS[0])(None, batch).terms["balance"] == (1 + 1 + 25 + 25 + 4) / 8


def test_nabla_stays_near_the_last_iteration_and_not_the_base() -> None:
    """At the weights of the last iteration nothing is paid, however far the base is; away from them it is."""
    policy, parameters, e = moved(KERNELS[0])
    loss = GradientBalance(KERNELS[0], reverse=0.0, stay=1.0)
    batch = e.trajectory.transitions(LookAheadGradient(1.0)(e))
    assert loss(policy, batch, e.cond).terms["stay"] > 1e-4
    policy.roles["old"] = Weights(parameters)
    assert loss(policy, batch, e.cond).terms["stay"] == 0


@pytest.mark.parametrize("span", [1, 4])
def test_forward_looking_gradient_is_the_finite_difference(span: int) -> None:
    """By the policy, the flow and log Z; a minibatch of lineages in any order is part of the whole."""
    policy, parameters, e = moved(KERNELS[0])
    torch.manual_seed(1)
    loss = LocalBalance(KERNELS[0], span, "learned", lambda shape: Curved())
    loss.prepare((2,))
    every = [*parameters, *loss.double().parameters()]
    batch = whole(e, 0.8)
    slope, off = gap(lambda: loss(policy, batch, e.cond).terms["balance"], every)
    assert abs(slope) > 1e-2 and off < 1e-7 * max(1.0, abs(slope))
    index = torch.tensor([4, 1, 3])
    part, full = (loss.residual(policy, b, e.cond) for b in (batch[index], batch))
    assert torch.allclose(part, full[:, index], atol=1e-12)


def test_look_ahead_values() -> None:
    """λ α^p r(x̂0) on the way, λ r at the end, nothing at pure noise; kept posteriors are not asked for again."""
    policy, _, e = moved(KERNELS[0])
    paid = policy.ledger.evaluations
    out = LookAhead(1.5, 1.0)(e)
    assert policy.ledger.evaluations == paid and out[0] is None
    for k in range(1, STEPS + 1):
        ends = []
        for j in (k - 1, k):
            nodes = e.trajectory.at(j)
            x0 = nodes.x if j == STEPS else nodes.posterior.x0
            ends.append(1.5 * (1 - TIMES[j]) * torch.sin(2 * x0).sum(1))
        assert torch.allclose(out[k], torch.stack(ends, 1), atol=1e-12)


# -------------------------------------------------------------------------------------------------------------- parts


def test_the_prompted_flow_begins_with_nothing() -> None:
    """0 everywhere, with a gradient to learn from; the same in every process, whatever was drawn before."""

    class Words:
        prompts = ("a", "b")

    torch.manual_seed(7)
    a = PromptedFlow((3, 4, 4), 8)
    torch.manual_seed(8)
    b = PromptedFlow((3, 4, 4), 8)
    x, t, row = torch.randn(5, 3, 4, 4), torch.rand(5, dtype=F64), torch.tensor([0, 1, 1, 0, 0])
    out = a(x, t, row, Words())
    assert (out == 0).all() and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    (g,) = torch.autograd.grad(out.sum(), a.network.head[-1].weight)
    assert g.abs().max() > 0


def test_dice_follow_the_iteration() -> None:
    """The subset of a balance loss is drawn with the batch: by iteration and pass, and carried through minibatches."""
    _, _, e = moved(KERNELS[0])
    a, b = paths(e), paths(replace(e, iteration=1))
    assert torch.equal(a.dice, paths(e).dice) and not torch.equal(a.dice, b.dice)
    assert not torch.equal(a.dice, paths(e, None, 1).dice)
    loss = TrajectoryBalance(KERNELS[0], subset=0.5)
    index = torch.tensor([5, 2])
    live, part = loss._live(a), loss._live(a[index])
    picked = {(int(a.path[i]), int(a.steps.level[i])) for i in live.tolist()}
    small = {(int(index[a[index].path[i]]), int(a[index].steps.level[i])) for i in part.tolist()}
    assert len(live) == 6 * STEPS // 2 and small == {p for p in picked if p[0] in (5, 2)}
    with pytest.raises(ValueError, match="dice"):
        loss._live(replace(a, dice=None))


def test_bad_settings() -> None:
    kernel = KERNELS[0]
    policy, _, e = moved(kernel)
    with pytest.raises(ValueError, match="span must be"):
        LocalBalance(kernel, 0)
    with pytest.raises(ValueError, match="log_z must be"):
        LocalBalance(kernel, log_z="none")
    with pytest.raises(ValueError, match="must not be negative"):
        GradientBalance(kernel, reverse=-1.0)
    with pytest.raises(ValueError, match="LookAheadGradient"):
        GradientBalance(kernel)(policy, e.trajectory.transitions(), e.cond)
    with pytest.raises(ValueError, match="LookAhead"):
        LocalBalance(kernel)(policy, paths(e), e.cond)
    with pytest.raises(ValueError, match="fraction must"):
        NablaDB(fraction=0.0).recipe(TIMES)
    assert ForwardLooking(memoryless=False).recipe(TIMES).kernel == EulerMaruyama(FlowGrpo(0.7))
