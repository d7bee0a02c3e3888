"""Flow-NRG: with exact values the guided flow is the tilted one; values trained on noisy states come near it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flowalign.guidance import Along
from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo
from flowalign.methods.flow_nrg import FlowNRG, Objective, pushed, teach
from flowalign.noise import Stream
from flowalign.policy import Policy
from flowalign.rollout import rollout
from flowalign.steer import steer
from flowalign.trajectory import Nodes
from tests.runworld import Saved
from tests.toy import Bright
from tests.worlds import F64, Quad, cosine, linear, plane, two_modes

TIMES = torch.linspace(1, 0, 41, dtype=F64)


def exact(world, quad: Quad, share: float = 1.0) -> Objective:
    """A share of the soft value of a quadratic reward, in log units."""
    return Objective(lambda x, t, row: world.value(quad, x, t), share)


@pytest.mark.parametrize("world", [two_modes(), two_modes(cosine()), plane()], ids=["flow", "vp", "plane"])
def test_two_weighted_objectives_give_the_tilted_velocity(world) -> None:
    """The value of the whole tilt, split into two weighted objectives: score, x0 and velocity of the tilted world."""
    dim = world.m.shape[1]
    quad = Quad(0.4 * torch.eye(dim, dtype=F64), torch.linspace(0.9, -0.5, dim, dtype=F64))
    target, _ = world.tilted(quad)
    x = torch.randn(40, dim, dtype=F64, generator=torch.Generator().manual_seed(1))
    field = pushed([exact(world, quad, 0.25), exact(world, quad, 0.75)])
    for t in (0.05, 0.3, 0.6, 0.95):
        guided = world.posterior(x, t).guided(field(x, world.posterior(x, t), t, torch.zeros(40, dtype=torch.long)))
        truth = target.posterior(x, t)
        assert torch.allclose(guided.velocity, truth.velocity, atol=1e-9)
        assert torch.allclose(guided.x0, truth.x0, atol=1e-9)


@pytest.mark.parametrize("kernel", [EulerMaruyama(), EulerMaruyama(FlowGrpo(0.7))], ids=["ode", "sde"])
def test_the_guided_flow_samples_the_tilt(kernel) -> None:
    """Mean and weight of the right mode, for the ODE and the SDE."""
    world, n = two_modes(), 6000
    quad = linear(0.8)
    target, _ = world.tilted(quad)
    g = torch.Generator().manual_seed(0)
    start = Nodes.enter(torch.randn(n, 1, dtype=F64, generator=g), torch.zeros(n, dtype=torch.long))
    guide = Along(pushed([exact(world, quad)]), where="posterior", window=lambda t: t < 0.999)
    x = rollout(Policy(world), kernel, TIMES, start, noise=Stream(g), guide=guide).leaves.x[:, 0]
    assert abs(x.mean() - target.mean()[0]) < 4 * x.std() / n**0.5 + 0.03
    plain = rollout(Policy(world), kernel, TIMES, start, noise=Stream(g)).leaves.x[:, 0]
    assert x.mean() - plain.mean() > 0.8


@pytest.mark.parametrize("soft", [0.0, 1.2])
def test_values_are_taught_on_noisy_states(soft: float) -> None:
    """The mean loss learns ``E[r | x_t]``, the soft one ``log E[exp(λ r) | x_t] / λ``: both against the closed form."""
    world, n = two_modes(), 4000
    g = torch.Generator().manual_seed(0)
    x0 = world.draw(n, g).float()
    net = Small()
    teach(
        net, x0, x0[:, 0], torch.zeros(n, 1, dtype=torch.long), world.process.diffuse, steps=600, soft=soft, lr=1e-2,
        batch=256,
    )  # fmt: skip
    gaps, plain = [], []
    for t in (0.2, 0.5, 0.8):
        x = world.process.diffuse(world.draw(400, g), t, torch.randn(400, 1, dtype=F64, generator=g))
        mean = world.posterior(x, t).x0[:, 0]
        truth = world.value(linear(soft), x, t) / soft if soft else mean
        with torch.no_grad():
            got = net(x.float(), torch.full((400,), t), None)
        gaps.append(float((got - truth).abs().mean()))
        plain.append(float((truth - mean).abs().mean()))
    assert max(gaps) < 0.15, gaps
    if soft:
        assert sum(gaps) < 0.4 * sum(plain)  # nearer to the soft value than the posterior mean is


class Small(torch.nn.Module):
    """A value network for one dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 48), torch.nn.SiLU(), torch.nn.Linear(48, 48), torch.nn.SiLU(), torch.nn.Linear(48, 1)
        )

    def forward(self, x, t, words):
        return self.net(torch.cat([x, t[:, None].to(x), (x * t[:, None].to(x))], 1))[:, 0]


def test_the_method_raises_the_reward_and_counts(tmp_path) -> None:
    """On the toy, guided samples are brighter by far more than their error; values are kept and not trained twice."""
    prompts = ["a", "b dark"]
    method = FlowNRG(scale=40.0, collect=64, train=600, width=32)
    plain = steer(
        Saved(), FlowNRG(scale=1e-9, collect=2, train=1, width=16), Bright(False), prompts, samples=48, steps=6
    )
    found = steer(Saved(), method, Bright(False), prompts, samples=48, steps=6, folder=tmp_path)
    for row in (0, 1):
        a, b = found.total[found.row == row], plain.total[plain.row == row]
        assert a.mean() - b.mean() > 4 * ((a.var() + b.var()) / 48).sqrt()
    again = steer(Saved(), method, Bright(False), prompts, samples=48, steps=6, folder=tmp_path)
    assert torch.equal(again.total, found.total)
    assert found.ledger.evaluations == 2 * (64 + 48) * 6 and again.ledger.evaluations == 2 * 48 * 6


def test_several_objectives_are_weighted_as_the_rewards_are() -> None:
    """One network a reward; a reward of weight 0 gets none."""
    field = pushed([Objective(lambda x, t, row: x.sum(1), 2.0), Objective(lambda x, t, row: (x**2).sum(1), -0.5)])
    x = torch.tensor([[0.3, -1.0]])
    assert torch.allclose(field(x, SimpleNamespace(), 0.5, torch.zeros(1, dtype=torch.long)), 2.0 - x)
    for bad in ({"n": 0}, {"collect": 1}, {"train": 0}):
        with pytest.raises(ValueError, match="n >= 1, collect >= 2"):
            FlowNRG(**bad)
