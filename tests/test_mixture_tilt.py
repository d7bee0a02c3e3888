"""On a mixture in the plane: Adjoint Matching samples the tilted target, a wrong noise law and DRaFT do not.

The base samples ``p = Σ w_k N(m_k, c_k² I)``; the reward is ``r = -|x - a|²·PULL/2``, so that the target ``p e^r`` is a
mixture too. The trained model is a mixture whose 12 numbers (weights, means, widths) define its velocity: it starts as
the base, and Adjoint Matching has to find the target's numbers from reward gradients and the frozen base alone.

    Adjoint Matching, memoryless noise   the target: moments, mode weights, two-sample test
    the same with the Flow-GRPO law      a compromise between base and target: the value-function bias (2409.08861)
    DRaFT (full backpropagation)         a point: r is maximised, nothing is said of p
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from flowalign.adjoint import lean_adjoint, reward_gradient
from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo, Memoryless, NoiseLaw
from flowalign.noise import Stream
from flowalign.objectives import AdjointMatching
from flowalign.policy import Policy, Weights
from flowalign.process import Posterior, Rectified
from flowalign.rollout import Tape, rollout
from flowalign.trajectory import Nodes
from tests.worlds import F64

PULL, TO = 0.6, (-0.6, 1.2)  # r = -PULL |x - TO|² / 2, already in units of the temperature
ODE = EulerMaruyama()


class Numbers(NamedTuple):
    """``Σ w_k N(m_k, c_k² I)``."""

    w: Tensor
    m: Tensor
    c: Tensor

    def draw(self, n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.w, n, True, generator=g)
        return self.m[k] + self.c[k, None] * torch.randn(n, 2, dtype=F64, generator=g)

    def mean(self) -> Tensor:
        return self.w @ self.m

    def cov(self) -> Tensor:
        gap = self.m - self.mean()
        return (self.w[:, None] * gap).T @ gap + (self.w * self.c**2).sum() * torch.eye(2, dtype=F64)

    def tilted(self) -> Numbers:
        """``p e^r / Z`` (steering.md E4 with isotropic components)."""
        n, to = 1 + PULL * self.c**2, torch.tensor(TO, dtype=F64)
        log_w = self.w.log() - n.log() - 0.5 * PULL / n * ((self.m - to) ** 2).sum(1)
        return Numbers(log_w.softmax(0), (self.m + PULL * self.c[:, None] ** 2 * to) / n[:, None], self.c / n.sqrt())


BASE = Numbers(
    torch.tensor([0.4, 0.35, 0.25], dtype=F64), torch.tensor([[1.2, 0.6], [-1.3, 0.8], [0.2, -1.5]], dtype=F64),
    torch.tensor([0.35, 0.3, 0.4], dtype=F64),
)  # fmt: skip
TARGET = BASE.tilted()


def reward(x: Tensor, row: Tensor | None = None) -> Tensor:
    return -0.5 * PULL * ((x - torch.tensor(TO, dtype=F64)) ** 2).sum(1)


class Tuned(nn.Module):
    """A mixture whose numbers are trained; its exact posterior is the model."""

    process = Rectified()

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.m, self.log_c = (nn.Parameter(z.clone()) for z in (BASE.w.log(), BASE.m, BASE.c.log()))

    def numbers(self) -> Numbers:
        return Numbers(self.logits.softmax(0).detach(), self.m.detach(), self.log_c.exp().detach())

    def posterior(self, x: Tensor, t: float | Tensor, cond: object = None) -> Posterior:
        a, s = (c.reshape(-1, 1) for c in self.process(t))
        own = (2 * self.log_c).exp()
        var = a**2 * own + s**2
        gap = x[:, None] - a[..., None] * self.m
        g = (self.logits - 0.5 * (gap**2).sum(-1) / var - var.log()).softmax(1) / var
        x0 = (g[..., None] * (var[..., None] * self.m + (a * own)[..., None] * gap)).sum(1)
        return Posterior(x0, s * (g[..., None] * gap).sum(1), self.process, t)


def grid(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=F64)


def begin(n: int, seed: int) -> Nodes:
    return Nodes.enter(torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(seed)))


def stream(seed: int) -> Stream:
    return Stream(torch.Generator().manual_seed(seed))


@cache
def tuned(law: NoiseLaw | None, iterations: int, n: int, steps: int, pair: int = 1) -> Policy:
    """Train by Adjoint Matching under a noise law, or by DRaFT where there is none; average the second half's weights.

    The weights of the modes get three times the learning rate: nothing but them moves mass from one mode to another.
    """
    net = Tuned()
    parameters = list(net.parameters())
    mean = [torch.zeros_like(p) for p in parameters]
    policy = Policy(net, {"reference": Weights(parameters)})
    kernel = ODE if law is None else EulerMaruyama(law)
    adam = torch.optim.Adam([{"params": [net.logits], "lr": 0.18}, {"params": [net.m, net.log_c], "lr": 0.06}])
    for i in range(iterations):
        for group, lr in zip(adam.param_groups, (0.18, 0.06), strict=True):
            group["lr"] = lr * (1 - 0.7 * i / iterations)
        tape = Tape() if law is None else None
        tree = rollout(policy, kernel, grid(steps), begin(n, 9000 + i), noise=stream(i), tape=tape)
        if law is None:
            loss = -reward(tree.leaves.x).mean()
        else:
            a = lean_adjoint(policy, kernel, tree, -reward_gradient(reward, tree.leaves.x, tree.leaves.row))
            batch = tree.transitions([None, *a[pair : steps + pair]])
            loss = AdjointMatching(kernel)(policy, batch).terms["adjoint"]
        adam.zero_grad()
        loss.backward()
        adam.step()
        if i >= iterations // 2:
            for z, p in zip(mean, parameters, strict=True):
                z += p.detach() / (iterations - iterations // 2)
    for z, p in zip(mean, parameters, strict=True):
        p.data = z
    return policy


def samples(policy: Policy, n: int = 2500, steps: int = 60, seed: int = 1) -> Tensor:
    return rollout(policy, ODE, grid(steps), begin(n, seed), noise=stream(seed)).leaves.x.detach()


def moment_gaps(x: Tensor) -> Tensor:
    """Mean (2) and covariance (3) against the target's, in standard errors of the sample's own spread."""
    centred = x - TARGET.mean()
    products = torch.stack([centred[:, 0] ** 2, centred[:, 0] * centred[:, 1], centred[:, 1] ** 2], 1)
    values = torch.cat([centred, products], 1)
    cov = TARGET.cov()
    want = torch.tensor([0, 0, cov[0, 0], cov[0, 1], cov[1, 1]], dtype=F64)
    return ((values.mean(0) - want) / (values.std(0) / len(x) ** 0.5)).abs()


def energy_test(x: Tensor, y: Tensor, permutations: int = 400) -> float:
    """P-value of the energy-distance permutation test for equal laws (Székely & Rizzo 2013)."""
    both = torch.cat([x, y])
    distance = torch.cdist(both, both)
    n, g = len(x), torch.Generator().manual_seed(0)
    sign = torch.cat([torch.full((n,), 1 / n, dtype=F64), torch.full((len(y),), -1 / len(y), dtype=F64)])
    signs = torch.stack([sign, *(sign[torch.randperm(len(both), generator=g)] for _ in range(permutations))])
    energy = -((signs @ distance) * signs).sum(1)
    return float((energy >= energy[0]).double().mean())


def test_energy_test_is_a_test() -> None:
    """Calibrated under equal laws, and sharp: a tenth of a mode's weight moved is seen."""
    p = torch.tensor([energy_test(TARGET.draw(150, s), TARGET.draw(150, 100 + s), 60) for s in range(40)])
    assert 0.35 < p.mean() < 0.65 and (p < 0.05).float().mean() < 0.16
    moved = TARGET._replace(w=TARGET.w + torch.tensor([0.1, -0.1, 0.0], dtype=F64))
    assert energy_test(moved.draw(1200, 1), TARGET.draw(1200, 2)) < 0.02


def test_adjoint_matching_samples_the_tilted_target() -> None:
    """The learnt numbers are the target's; moments within 4 s.e. of 2500 samples; not told apart from it."""
    policy = tuned(Memoryless(), 90, 256, 32)
    learnt = policy.denoiser.numbers()
    assert (learnt.w - TARGET.w).abs().max() < 0.03 < (BASE.w - TARGET.w).abs().max() / 5
    assert (learnt.m[:2] - TARGET.m[:2]).abs().max() < 0.03 < (BASE.m[:2] - TARGET.m[:2]).abs().max() / 4
    x = samples(policy)
    assert moment_gaps(x).max() < 4
    assert energy_test(x[:900], TARGET.draw(900, 5)) > 0.01
    assert energy_test(BASE.draw(900, 4), TARGET.draw(900, 5)) < 0.01


def test_value_function_bias_of_other_noise() -> None:
    """Flow-GRPO's law keeps the initial noise in mind: between base and target, and the two-sample test sees it."""
    x = samples(tuned(FlowGrpo(0.7), 60, 192, 16))
    way = (x.mean(0) - BASE.mean()) @ (TARGET.mean() - BASE.mean()) / (TARGET.mean() - BASE.mean()).square().sum()
    assert 0.3 < way < 0.8  # some of the way
    assert moment_gaps(x).max() > 6
    assert energy_test(x[:900], TARGET.draw(900, 5)) < 0.01


def test_draft_collapses_where_adjoint_matching_does_not() -> None:
    """More reward than the target has, hardly any variance: DRaFT's optimum is a point."""
    x, y = samples(tuned(None, 80, 192, 16)), samples(tuned(Memoryless(), 90, 256, 32))
    want = TARGET.cov().trace()
    assert torch.cov(x.T).trace() < 0.1 * want < 0.8 * want < torch.cov(y.T).trace() < 1.2 * want
    assert reward(x).mean() > reward(TARGET.draw(20_000, 6)).mean() + 0.3
    assert energy_test(x[:900], TARGET.draw(900, 5)) < 0.01


@pytest.mark.slow
def test_at_length() -> None:
    """More steps, samples and iterations: 20,000 samples within 4 s.e., the old pairing ``a_k`` outside them."""
    right, wrong = (tuned(Memoryless(), 250, 1024, 80, pair) for pair in (1, 0))
    x, y = (samples(p, 20_000, 250) for p in (right, wrong))
    assert (right.denoiser.numbers().w - TARGET.w).abs().max() < 0.012
    assert moment_gaps(x).max() < 4 and energy_test(x[:3000], TARGET.draw(3000, 5), 200) > 0.01
    assert moment_gaps(y).max() > moment_gaps(x).max() and math.isfinite(float(y.sum()))
