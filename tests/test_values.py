"""Values: what a state promises, against its closed form."""

from __future__ import annotations

import torch
from torch import nn
from worlds import F64, Net, Normal

from flowalign.kernels import EulerMaruyama, SecondOrder
from flowalign.policy import Policy, final_posterior
from flowalign.process import Rectified
from flowalign.values import Completion, Draws, Learned, Tweedie

ROW = torch.tensor([0, 1, 1])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def score(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return x.sum(1) * (1 + row) + 0.3 * (x**2).sum(1)


def test_tweedie():
    world, x = Normal(), draw(3, 2)
    p = world.posterior(x, 0.6)
    assert torch.equal(Tweedie(score)(x, p, 0.6, ROW), score(p.x0, ROW))
    assert torch.equal(Tweedie(score)(x, final_posterior(x, Rectified()), 0.0, ROW), score(x, ROW))


def test_draws():
    world, x, z = Normal(), draw(3, 2), draw(4, 2, seed=1)
    p = world.posterior(x, 0.6)
    value = Draws(score, world.spread, z, 1.7)(x, p, 0.6, ROW)
    rewards = torch.stack([score(p.x0 + world.spread(0.6) * n, ROW) for n in z])
    assert torch.allclose(value, (1.7 * rewards).exp().mean(0).log() / 1.7, atol=1e-12) and value.dtype == F64
    assert torch.allclose(Draws(score, world.spread, z)(x, p, 0.6, ROW), rewards.exp().mean(0).log(), atol=1e-12)
    t = torch.tensor([0.2, 0.6, 0.9], dtype=F64)
    each = Draws(score, world.spread, z, 1.7)(x, world.posterior(x, t), t, ROW)
    assert torch.allclose(each[1], value[1])
    # many draws of the true posterior are the true soft value: r = h x, log E = h x0 + h² var / 2
    many = Draws(lambda y, row: 1.5 * y[:, 0], world.spread, draw(20000, 2, seed=2))(x, p, 0.6, ROW)
    assert torch.allclose(many, 1.5 * p.x0[:, 0] + 0.5 * 1.5**2 * world.spread(0.6) ** 2, atol=0.02)


def test_completion_is_the_ode_to_data():
    net = Net(2).double()
    policy = Policy(net)
    x, cond = draw(3, 2), torch.tensor([4, 6])
    p = policy.posterior(x, 0.6, cond[ROW])
    policy.ledger.evaluations = 0
    value = Completion(policy, score, cond, steps=3)(x, p, 0.6, ROW)
    assert policy.ledger.evaluations == 6  # the first step reuses the posterior at hand
    y, post = x, p
    for a, b in ((0.6, 0.4), (0.4, 0.2), (0.2, 0.0)):
        post = net.posterior(y, a, cond[ROW])
        y = EulerMaruyama()(y, post, a, b)[0].mean
    assert torch.allclose(value, score(y, ROW), atol=1e-12)
    assert torch.allclose(Completion(policy, score, cond, steps=1)(x, p, 0.6, ROW), score(p.x0, ROW), atol=1e-12)
    assert Completion(policy, score).steps == 2
    t = torch.tensor([0.3, 0.6, 0.9], dtype=F64)
    each = Completion(policy, score, cond, steps=3)(x, net.posterior(x, t, cond[ROW]), t, ROW)
    assert torch.allclose(each[1], value[1], atol=1e-12)


def test_a_completion_of_a_known_world_converges():
    """The probability-flow map of a Gaussian is ``(x - a m) c / √var + m``; a second-order kernel gets there sooner."""
    world, x = Normal(), draw(3, 1)
    mean, var = world.moments(0.6)
    want = (x[:, 0] - mean) / var.sqrt() * world.std + world.mean

    def first(y: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return y[:, 0]

    p = world.posterior(x, 0.6)
    gap = [
        float((Completion(Policy(world), first, steps=8, kernel=k)(x, p, 0.6, ROW) - want).abs().max())
        for k in (EulerMaruyama(), SecondOrder())
    ]
    assert gap[1] < 0.02 < gap[0] < 0.25


def test_learned():
    class Network(nn.Module):
        def forward(self, x, t, row):
            assert t.shape == (len(x),) and t.dtype == F64
            return x.sum(1) * t + row

    x = draw(3, 2)
    p = Normal().posterior(x, 0.6)
    value = Learned(Network())
    assert torch.allclose(value(x, p, 0.6, ROW), 0.6 * x.sum(1) + ROW)
    t = torch.tensor([0.2, 0.6, 0.9], dtype=F64)
    assert torch.allclose(value(x, p, t, ROW), t * x.sum(1) + ROW)
