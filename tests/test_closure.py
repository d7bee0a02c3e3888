"""Closure: every family of methods in at most 15 lines through the public types, checked against its known answer.

Written before any method file. If one of these needed a fork of the loop, the types would be wrong.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from flowalign.adjoint import lean_adjoint, reward_gradient
from flowalign.aggregate import MinNorm
from flowalign.batches import Leaves, Pairs, paths
from flowalign.credit import Gains
from flowalign.experience import Experience, completions
from flowalign.guidance import Along
from flowalign.kernels import EulerMaruyama, Windowed
from flowalign.laws import Constant, FlowGrpo, Memoryless
from flowalign.noise import Noise, Stream
from flowalign.objectives import AdjointMatching, Clip, DiffusionNFT, FlowDPO, TrajectoryBalance
from flowalign.policy import Policy, Weights
from flowalign.potentials import Difference
from flowalign.process import Posterior
from flowalign.rollout import Tape, advance, evaluate, rollout
from flowalign.selection import Branch, Resample
from flowalign.trajectory import Nodes
from flowalign.values import Tweedie
from tests.worlds import F64, Normal, chain, chain_log_z, output, riccati

WORLD = Normal(0.5, math.sqrt(0.7))  # the Gaussian of backprop_rewards.md A7
SDE, ODE = EulerMaruyama(FlowGrpo(0.7)), EulerMaruyama()
TIMES = torch.linspace(1, 0, 9, dtype=F64)
SLOPE, LAM = 0.8, 1.3


def grid(steps: int) -> torch.Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=F64)


def noises(n: int, seed: int = 0, dim: int = 1) -> torch.Tensor:
    return torch.randn(n, dim, dtype=F64, generator=torch.Generator().manual_seed(seed))


def reward(x: torch.Tensor, row: torch.Tensor | None = None) -> torch.Tensor:
    return SLOPE * x[:, 0]


def stream(seed: int = 1) -> Stream:
    return Stream(torch.Generator().manual_seed(seed))


def log_z(scale: float) -> torch.Tensor:
    """Exact log E exp(scale · reward) under the sampler's own output law."""
    return chain_log_z(WORLD, riccati(chain(WORLD, SDE, TIMES), 0, scale * SLOPE), 1.0)


class Shifted(nn.Module):
    """The Gaussian world with one trained number per step, added to the velocity: all that a linear reward needs."""

    process = WORLD.process

    def __init__(self, times: torch.Tensor) -> None:
        super().__init__()
        self.times, self.shift = times, nn.Parameter(torch.zeros(len(times) - 1, dtype=F64))

    def posterior(self, x: torch.Tensor, t: float | torch.Tensor, cond: object = None) -> Posterior:
        times = torch.as_tensor(t, dtype=F64).reshape(-1).expand(len(x))
        k = (times[:, None] - self.times[:-1]).abs().argmin(1)
        v = WORLD.posterior(x, t).velocity + self.shift[k].reshape(-1, *[1] * (x.ndim - 1))
        return self.process.posterior(x, t, v=v)


def trained(times: torch.Tensor) -> tuple[Policy, Shifted]:
    net = Shifted(times)
    return Policy(net, {name: Weights([net.shift]) for name in ("reference", "old")}), net


def experience(policy: Policy, tree, group: torch.Tensor | None = None) -> Experience:
    n = tree.n_rows
    group = torch.zeros(n, dtype=torch.long) if group is None else group
    return Experience(
        policy, tree, None, group, {"r": reward(tree.leaves.x)}, {"r": 1.0}, lambda x, i: {"r": reward(x)}
    )


def test_feynman_kac_two_prompts() -> None:
    """Two prompts with different rewards in one batch, each its own particle system: E[Ẑ] = Z of the sampler."""
    scale = torch.tensor([1.0, -0.6], dtype=F64).repeat(3000)  # rows alternate between the prompts
    row = torch.arange(6000).repeat_interleave(4)
    value = Tweedie(lambda x, i: scale[i] * reward(x))
    tree = rollout(
        Policy(WORLD), SDE, TIMES, Nodes.enter(WORLD.start(noises(24000)), row), noise=stream(), value=value,
        potential=Difference(LAM), select=Resample("systematic", 0.5),
    )  # fmt: skip
    for prompt, lam in enumerate((LAM, -0.6 * LAM)):
        z = (tree.log_evidence()[prompt::2] - log_z(lam)).exp()
        assert z.std() / len(z) ** 0.5 < 0.02
        assert abs(z.mean() - 1) < 4 * z.std() / len(z) ** 0.5


def test_diffusion_tree_sampling() -> None:
    """A tree grown in ragged batches from its own nodes; the soft value of the root is unbiased, no node runs twice."""
    policy, times = Policy(WORLD), TIMES.tolist()
    start = Nodes.enter(WORLD.start(noises(4000)))
    tree = rollout(policy, SDE, TIMES, start, noise=stream(), keep=True)
    for k in (0, 3, 6, 3):
        children = advance(
            policy, SDE, tree.at(k), times[k], times[k + 1], level=k, noise=stream(10 + k + len(tree.leaves))
        )[1]
        entry = Nodes.enter(children.x, children.row, origin=children.parent)
        tree = tree.graft(
            rollout(policy, SDE, TIMES, {k + 1: entry}, noise=stream(50 + k + len(tree.leaves)), n_rows=4000, keep=True)
        )
    z = (tree.backup(LAM * reward(tree.leaves.x), how=1.0)[0] - log_z(LAM)).exp()
    assert policy.ledger.evaluations == sum(len(tree.at(k)) for k in range(len(times) - 1))
    assert abs(z.mean() - 1) < 4 * z.std() / len(z) ** 0.5


def rollover(policy: Policy, x: torch.Tensor, quota: int) -> tuple[torch.Tensor, list[float], int]:
    """Rollover budget forcing (2503.19385): the first child that beats the best so far; unused tries roll over."""
    value, best, spare, path, tried = Tweedie(reward), -math.inf, 0, [], 0
    nodes, times = evaluate(policy, Nodes.enter(x), 1.0, value=value), TIMES.tolist()
    for k in range(len(times) - 2):
        kids, spare = None, spare + quota
        while spare and (kids is None or kids[0] <= best):
            child = advance(policy, SDE, nodes, times[k], times[k + 1], level=k, noise=Noise(tried))[1]
            child = evaluate(policy, child, times[k + 1], value=value)
            kids = max((float(child.value), child), kids or (-math.inf, child), key=lambda c: c[0])
            spare, tried = spare - 1, tried + 1
        best, nodes = max(best, kids[0]), kids[1]
        path.append(kids[0])
    return nodes.x, path, tried


def test_rollover_budget() -> None:
    """The budget is an exact bound, one try a step is the plain sampler, and more tries buy a better value."""
    one, many = [rollover(Policy(WORLD), noises(1), q) for q in (1, 12)]
    policy = Policy(WORLD)
    rollover(policy, noises(1), 12)
    assert one[2] == 7 and policy.ledger.evaluations == 1 + many[2] <= 1 + 7 * 12
    x = noises(1)
    for k, (t, s) in enumerate(zip(TIMES[:-2].tolist(), TIMES[1:-1].tolist(), strict=True)):
        x = advance(Policy(WORLD), SDE, Nodes.enter(x), t, s, level=k, noise=Noise(k))[1].x
    assert torch.equal(x, one[0])
    assert many[1][-1] > one[1][-1]


def test_dense_grpo() -> None:
    """Step gains by completion: equal to brute force one by one, and they telescope to the whole gain."""
    policy = Policy(WORLD)
    tree = rollout(policy, SDE, TIMES, Nodes.enter(noises(32)), noise=stream())
    gains = Gains().gains(experience(policy, tree, torch.arange(32)))
    for k in range(8):
        ends = [
            rollout(policy, ODE, TIMES[j:], Nodes.enter(tree.at(j).x), noise=stream()).leaves.x
            if j < 8
            else tree.leaves.x
            for j in (k, k + 1)
        ]
        assert torch.equal(gains[k], reward(ends[1]) - reward(ends[0]))
    whole = reward(tree.leaves.x) - reward(completions(policy, tree)[0])
    assert torch.allclose(torch.stack(gains).sum(0), whole, atol=1e-12)


def test_g2rpo() -> None:
    """One stochastic step in an ODE, from one shared evaluation: rewards then differ by that step's noise alone."""
    policy, k, group = Policy(WORLD), 3, 6
    anchor = rollout(policy, ODE, TIMES, Nodes.enter(noises(1)), noise=stream(), keep=True)
    paid = policy.ledger.evaluations
    kernel = Windowed(SDE, lambda t, s: t == TIMES[k].item())
    tree = rollout(policy, kernel, TIMES, {k: anchor.at(k)}, noise=Noise(3), select=Branch({k: group}), keep=True)
    assert policy.ledger.evaluations - paid == group * (8 - k - 1)  # the shared latent costs nothing more
    z = tree.at(k).step[torch.zeros(group, dtype=torch.long)].noise(tree.at(k + 1).x)[:, 0]
    r = reward(tree.leaves.x)
    fit = torch.linalg.lstsq(torch.stack([z, torch.ones(group, dtype=F64)], 1), r).solution
    assert torch.allclose(fit[0] * z + fit[1], r, atol=1e-12) and fit[0] > 0
    assert len(tree.transitions(where=lambda level, t, s: kernel.stochastic(t, s))) == group


def turning_points(d: torch.Tensor, completed: torch.Tensor) -> torch.Tensor:
    """TP-GRPO (2602.06422): at a turning point the step gets the aggregated reward R_sde - R_{k-1}."""
    trend = (completed[-1] - completed[0]).sign()
    s = d.sign() * trend
    before = torch.cat([-torch.ones_like(s[:1]), s[:-1]])
    rest = completed[-1] - completed[:-1]
    turn = (before < 0) & (s > 0) & (d.sign() * (completed[-1] - completed[1:]).sign() > 0)
    return torch.where(turn, rest, d)


def test_turning_point() -> None:
    """A hand-worked case through the experience's completions: one turn, at the third step."""
    policy = Policy(WORLD)
    tree = rollout(policy, SDE, grid(4), Nodes.enter(noises(1)), noise=stream())
    e = experience(policy, tree)
    e.cache[None] = [torch.tensor([r], dtype=F64) for r in (0.5, 0.4, 0.3, 0.6, 0.9)]
    gains = torch.stack(Gains().gains(e))
    credit = turning_points(gains, torch.stack(e.completions()))[:, 0]
    # R0 = .5 falls to .3, turns, ends at .9: step 3 gets .9 - .3 = .6 in place of its own .3
    assert torch.allclose(credit, torch.tensor([-0.1, -0.1, 0.6, 0.3], dtype=F64))


def test_euphonium() -> None:
    """Guided sampling, log-density under the unguided mean: E[∇ log p] = the guidance; none of it equals DanceGRPO."""
    dance, policy = EulerMaruyama(Constant(0.5)), Policy(WORLD)
    guide = Along(lambda x, p, t, row: torch.full_like(x, 0.7), where="proposal", weighted=False)
    free = Along(lambda x, p, t, row: torch.zeros_like(x), where="proposal", weighted=False)
    start = Nodes.enter(noises(20000))
    runs = {g: rollout(policy, dance, TIMES, start, noise=Noise(2), guide=g, keep=True) for g in (guide, free, None)}
    assert torch.equal(runs[free].leaves.x, runs[None].leaves.x)
    steps = runs[guide].transitions()
    std = (0.5 * (steps.t - steps.s).sqrt())[:, None]
    score = ((steps.x_next - steps.mean) / std**2)[:, 0]
    assert torch.allclose(steps.log_prob, torch.distributions.Normal(steps.mean, std).log_prob(steps.x_next)[:, 0])
    assert abs(score.mean() - 0.7) < 4 * score.std() / len(score) ** 0.5
    assert (runs[guide].leaves.log_w == 0).all()


@pytest.mark.parametrize("last", [1, 3, 8])
def test_draft_k(last: int) -> None:
    """The gradient through the last K steps equals a finite difference in which only they see the change."""
    policy, net = trained(TIMES)

    def end(shift: torch.Tensor) -> torch.Tensor:
        net.shift.data = shift
        tree = rollout(policy, SDE, TIMES, Nodes.enter(noises(5)), noise=Noise(1), tape=Tape(8 - last))
        return torch.sin(tree.leaves.x).sum()

    base, direction = noises(8, 3)[:, 0] * 0.1, noises(8, 4)[:, 0]
    (grad,) = torch.autograd.grad(end(base), net.shift)
    mask = (torch.arange(8) >= 8 - last).double()
    up, down = (end(base + h * direction * mask).detach() for h in (1e-5, -1e-5))
    assert abs((grad * direction).sum() - (up - down) / 2e-5) < 1e-7
    assert (grad[: 8 - last] == 0).all()


@pytest.mark.parametrize(("steps", "golden"), [(10, 1.2234), (40, 1.2276)])
def test_adjoint_matching(steps: int, golden: float) -> None:
    """The regression's optimum on this project's kernel reaches the chain's own tilt; pairing a_k must not."""
    times, kernel = grid(steps), EulerMaruyama(Memoryless())
    ends = []
    for pair in (1, 0):
        policy, net = trained(times)
        tree = rollout(policy, kernel, times, Nodes.enter(noises(4)), noise=stream())
        a = lean_adjoint(policy, kernel, tree, -LAM * reward_gradient(reward, tree.leaves.x, tree.leaves.row))
        batch = tree.transitions([None, *a[pair : steps + pair]])
        newton(net, lambda b=batch, p=policy: AdjointMatching(kernel)(p, b).terms["adjoint"])
        ends.append(output(net_world(net), chain(net_world(net), kernel, times), 1.0)[0].item())
    tilt = tilted_mean(kernel, times)
    assert abs(ends[0] - golden) < 5e-5 and abs(ends[0] - tilt) < 1e-9
    assert abs(ends[1] - tilt) > 0.03  # the index of every public implementation


def newton(net: Shifted, loss) -> None:
    """Minimise a loss that is quadratic and separable in the shifts."""
    (g,) = torch.autograd.grad(loss(), net.shift, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), net.shift)
    net.shift.data -= g.detach() / h


def net_world(net: Shifted) -> Normal:
    world = replace(WORLD)
    object.__setattr__(world, "posterior", lambda x, t, cond=None: net.posterior(x, t))
    return world


def tilted_mean(kernel: EulerMaruyama, times: torch.Tensor) -> float:
    """Mean of the chain's output law tilted by the reward, less what the first state remembers (λ c P_0²)."""
    links = chain(WORLD, kernel, times)
    mean, var = output(WORLD, links, 1.0)
    memory = torch.stack([link.A for link in links]).prod()
    return float(mean + LAM * SLOPE * (var - memory**2))


def test_diffusion_nft() -> None:
    """At the old policy dL/dx̂0 = -2 E|x0 - x̂0| for A = x0 - m, the posterior spread. A = 0 is at rest."""
    t, n = 0.4, 200_000
    x0, noise = WORLD.start(noises(n), 0.0), noises(n, 5)
    for gain in (1.0, 0.0):
        policy, net = trained(TIMES)
        batch = Leaves(
            x0, torch.zeros(n, dtype=torch.long), gain * (x0[:, 0] - WORLD.mean), torch.full((n,), t, dtype=F64), noise
        )
        loss = DiffusionNFT(kl=0.0)(policy, batch).terms["nft/reward"]
        (g,) = torch.autograd.grad(loss, net.shift)
        slope = g.sum() / -t  # x̂0 = x - t v
        exact = -2 * math.sqrt(2 / math.pi) * WORLD.spread(t).item() * gain
        assert abs(slope - exact) < 4 * 2.5 / n**0.5 if gain else slope.abs() < 1e-12


def test_flow_dpo() -> None:
    """At the reference the loss is log 2, its slope (β/2)(x_w - x_l) t/V: noise cancels."""
    t, beta = 0.3, 10.0
    policy, net = trained(TIMES)
    win, lose = WORLD.start(noises(9), 0.0), WORLD.start(noises(9, 2), 0.0)
    batch = Pairs(
        win, lose, torch.zeros(9, dtype=torch.long), torch.ones(9), torch.full((9,), t, dtype=F64), noises(9, 3)
    )
    loss = FlowDPO(beta)(policy, batch).terms["dpo"]
    (g,) = torch.autograd.grad(loss, net.shift)
    assert abs(loss - math.log(2)) < 1e-12
    assert abs(g.sum() - beta / 2 * (win - lose).mean() * t / WORLD.moments(t)[1]) < 1e-12


def test_relative_trajectory_balance() -> None:
    """At the optimum of a linear reward the imbalance is -λ c P_0 x_0 + const: what the chain remembers."""
    kernel, times = EulerMaruyama(FlowGrpo(0.7)), TIMES
    policy, net = trained(times)
    tree = rollout(policy, kernel, times, Nodes.enter(noises(64)), noise=stream())
    a = lean_adjoint(policy, kernel, tree, -LAM * reward_gradient(reward, tree.leaves.x, tree.leaves.row))
    newton(net, lambda: AdjointMatching(kernel)(policy, tree.transitions([None, *a[1:]])).terms["adjoint"])
    tree = rollout(policy, kernel, times, Nodes.enter(noises(64)), noise=stream(4))
    r = TrajectoryBalance(kernel, LAM).residual(policy, paths(experience(policy, tree))).detach()
    memory = torch.stack([link.A for link in chain(WORLD, kernel, times)]).prod()
    rest = r + LAM * SLOPE * memory * tree.at(0).x[:, 0]
    assert rest.std() < 1e-10 < r.std()


def test_min_norm_step() -> None:
    """MARBLE's step on two quadratics: α in closed form, and neither loss rises to first order."""
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))
    losses = {"a": ((w - torch.tensor([3.0, 2.5])) ** 2).sum(), "b": ((w - torch.tensor([-1.0, 4.0])) ** 2).sum()}
    ga, gb = (torch.autograd.grad(v, w, retain_graph=True)[0] for v in losses.values())
    alpha = ((gb - ga) @ gb / ((gb - ga) @ (gb - ga))).clamp(0, 1)
    MinNorm().backward(losses, [w])
    assert torch.allclose(w.grad, alpha * ga + (1 - alpha) * gb, atol=1e-9)
    assert min(w.grad @ ga, w.grad @ gb) > w.grad @ w.grad - 1e-9


def test_noise_optimisation() -> None:
    """ReNO on a linear generator and reward: the noise ends at radius (c + √(c² + 4(d-1)))/2 along the gradient."""
    d, reg, h = 6, 0.5, torch.linspace(-1, 1, 6, dtype=F64)
    z = noises(1, 7, d).requires_grad_()
    optimizer = torch.optim.LBFGS([z], lr=0.5, max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        x0 = rollout(Policy(WORLD), ODE, TIMES, Nodes.enter(z), noise=stream(), tape=Tape()).leaves.x
        loss = -(x0 @ h).sum() + reg * (0.5 * (z**2).sum() - (d - 1) * z.norm().log())
        loss.backward()
        return loss

    optimizer.step(closure)
    slope = torch.stack([link.A for link in chain(WORLD, ODE, TIMES)]).prod() * h
    radius = (slope.norm() / reg + ((slope.norm() / reg) ** 2 + 4 * (d - 1)).sqrt()) / 2
    assert torch.allclose(z.detach()[0], radius * slope / slope.norm(), atol=1e-5)


def test_ratio_is_one_at_the_first_update() -> None:
    """The clipped objective on a fresh rollout: every ratio is exactly 1, whatever it is called."""
    policy, _ = trained(TIMES)
    tree = rollout(policy, SDE, TIMES, Nodes.enter(noises(16)), noise=stream(), keep=True)
    steps = tree.transitions([None] + [torch.ones(16, dtype=F64)] * 8)
    for k in range(8):
        batch = steps[(steps.level == k).nonzero().flatten()]
        for ratio in ("density", "per_dim", "mse", "guard"):
            assert Clip(SDE, ratio=ratio)(policy, batch).metrics["ratio_gap"] == 0
