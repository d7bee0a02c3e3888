"""The closed-form worlds are right: each formula against quadrature, autograd or enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from worlds import (
    F64,
    ExactReverse,
    Finite,
    Link,
    Mixture,
    Normal,
    Quad,
    chain,
    chain_log_z,
    cosine,
    five_states,
    linear,
    log_mean_exp,
    multimodal,
    output,
    plane,
    riccati,
    stable_diffusion,
    tilt,
    two_modes,
)

from flowalign.kernels import EulerMaruyama
from flowalign.laws import Memoryless
from flowalign.process import Karras, Rectified

PROCESSES = {"rectified": Rectified(), "cosine": cosine(), "sd": stable_diffusion(), "karras": Karras(4.0, 3.0)}
GRID = torch.linspace(-9, 9, 6001, dtype=F64)
STEP = GRID[1] - GRID[0]
CURVED = Quad(torch.tensor([[0.6]], dtype=F64), torch.tensor([0.8], dtype=F64), 0.2)


def normal_pdf(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    return (-0.5 * (x - mean) ** 2 / var).exp() / (2 * torch.pi * var).sqrt()


def prior(world: Mixture) -> torch.Tensor:
    return sum(w * normal_pdf(GRID, m, C) for w, m, C in zip(world.w, world.m[:, 0], world.C[:, 0, 0], strict=True))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("t", [0.15, 0.6, 0.95])
def test_mixture_against_quadrature(process, t):
    world = two_modes(process)
    a, s = process(t)
    x = torch.tensor([[-1.3], [0.2], [2.1]], dtype=F64)
    joint = prior(world) * normal_pdf(x, a * GRID, s**2)
    density = joint.sum(1) * STEP
    assert torch.allclose(world.log_prob(x, t), density.log(), atol=1e-9)
    x0 = (joint * GRID).sum(1) * STEP / density
    p = world.posterior(x, t)
    assert torch.allclose(p.x0[:, 0], x0, atol=1e-8)
    assert torch.allclose(a * p.x0 + s * p.eps, x, atol=1e-12)
    value = (joint * CURVED(GRID[:, None]).exp()).sum(1) * STEP / density
    assert torch.allclose(world.value(CURVED, x, t), value.log(), atol=1e-8)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_plane_score_value_and_tilted_flow(process):
    world, t = plane(process), 0.55
    q = Quad(torch.tensor([[0.5, 0.2], [0.2, 0.1]], dtype=F64), torch.tensor([0.7, -0.4], dtype=F64), -0.3)
    x = torch.tensor([[0.4, -0.8], [1.5, 0.1], [-2.0, 0.6]], dtype=F64, requires_grad=True)
    (score,) = torch.autograd.grad(world.log_prob(x, t).sum(), x)
    (rise,) = torch.autograd.grad(world.value(q, x, t).sum(), x)
    x = x.detach()
    p, target = world.posterior(x, t), world.tilted(q)[0].posterior(x, t)
    assert torch.allclose(p.score, score, atol=1e-11)
    assert torch.allclose(target.score - p.score, rise, atol=1e-11)  # E5
    a, s = process(t)
    assert torch.allclose(target.velocity, p.velocity - s * process.wronskian(t) / a * rise, atol=1e-10)  # E6
    assert torch.allclose(target.velocity, p.guided(rise).velocity, atol=1e-10)  # Flow-NRG is exact with V
    log_z = world.tilted(q)[1]
    tilted = world.tilted(q)[0].log_prob(x, t)
    assert torch.allclose(tilted, world.log_prob(x, t) + world.value(q, x, t) - log_z, atol=1e-11)


def test_target_against_quadrature():
    world = two_modes()
    target, log_z = world.tilted(CURVED)
    p = prior(world)
    weight = p * CURVED(GRID[:, None]).exp()
    z = weight.sum() * STEP
    assert torch.allclose(log_z, z.log(), atol=1e-10)
    assert torch.allclose(target.mean()[0], (weight * GRID).sum() * STEP / z, atol=1e-10)
    kl = (weight / z * (weight / z / p).log()).sum() * STEP
    assert torch.allclose(world.kl(CURVED), kl, atol=1e-9)
    assert torch.allclose(prior(target), weight / z, atol=1e-10)
    start = torch.tensor([[0.3], [5.0]], dtype=F64)
    assert torch.allclose(world.value(CURVED, start, 1.0), log_z.expand(2), atol=1e-12)  # pure noise knows nothing


def test_target_in_the_plane_and_multimodal_reward():
    world = plane()
    q1 = Quad(torch.tensor([[0.5, 0.2], [0.2, 0.1]], dtype=F64), torch.tensor([0.7, -0.4], dtype=F64), -0.3)
    q2 = linear(-0.9, 0.3)
    line = torch.linspace(-8, 8, 401, dtype=F64)
    xy = torch.cartesian_prod(line, line)
    cell = (line[1] - line[0]) ** 2
    p = world.log_prob(xy, 0.0).exp()
    assert torch.allclose(p.sum() * cell, torch.ones((), dtype=F64), atol=1e-10)
    weight = p * q1(xy).exp()
    target, log_z = world.tilted(q1)
    assert torch.allclose(log_z, (weight.sum() * cell).log(), atol=1e-10)
    assert torch.allclose(target.mean(), weight @ xy / weight.sum(), atol=1e-10)
    both = (p * multimodal([q1, q2])(xy).exp()).sum() * cell
    assert torch.allclose(torch.logaddexp(log_z, world.tilted(q2)[1]), both.log(), atol=1e-10)


def test_linear_tilt_is_a_shift():
    m, C = torch.tensor([0.4, -1.0], dtype=F64), torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=F64)
    q = linear(2.0, 1.0)
    assert torch.allclose(tilt(q, m, C)[0], m + C @ q.h) and torch.allclose(tilt(q, m, C)[1], C)
    assert torch.allclose(log_mean_exp(q, m, C), m @ q.h + q.h @ C @ q.h / 2)


def test_reverse_kernel_and_optimal_twist_of_a_mixture():
    world, t, s = two_modes(), 0.7, 0.4
    x_t = GRID[::3, None]
    log_w, mean, cov = world.reverse(x_t, t, s)
    y = torch.tensor([-1.2, 0.0, 1.9], dtype=F64)
    kernel = (log_w.exp()[..., None] * normal_pdf(y, mean[..., 0][..., None], cov[:, 0, 0][:, None])).sum(1)
    flow = (world.log_prob(x_t, t).exp()[:, None] * kernel).sum(0) * 3 * STEP
    assert torch.allclose(flow, world.log_prob(y[:, None], s).exp(), atol=1e-8)  # Chapman-Kolmogorov
    x = torch.tensor([[0.4]], dtype=F64)
    log_w, mean, cov = world.reverse(x, t, s)
    step = (log_w.exp()[..., None] * normal_pdf(GRID, mean[..., 0][..., None], cov[:, 0, 0][:, None])).sum(1)
    twisted = (step[0] * world.value(CURVED, GRID[:, None], s).exp()).sum() * STEP
    assert torch.allclose(twisted.log(), world.value(CURVED, x, t)[0], atol=1e-9)  # E[exp V_s | x_t] = exp V_t


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_normal_is_the_mixture_of_one(process):
    world = Normal(0.7, 0.5, process)
    one = torch.ones(1, dtype=F64)
    mixture = Mixture(one, one[:, None] * 0.7, one[:, None, None] * 0.25, process)
    x = torch.tensor([[-0.4], [1.1]], dtype=F64)
    for t in (0.2, torch.tensor([0.3, 0.9], dtype=F64)):
        p, q = world.posterior(x, t), mixture.posterior(x, t)
        assert torch.allclose(p.x0, q.x0, atol=1e-12) and torch.allclose(p.eps, q.eps, atol=1e-12)
        assert torch.allclose(world.spread(t).expand(2) ** 2, mixture.components(x, t)[2][:, 0, 0, 0], atol=1e-12)
    law, _ = ExactReverse(world)(x, p, 0.8, 0.3)
    _, mean, cov = mixture.reverse(x, 0.8, 0.3)
    assert torch.allclose(law.mean, mean[:, 0], atol=1e-12)
    assert torch.allclose(law.std**2, cov[0, 0, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("K", "offset", "mean", "var"), [(10, 1, 0.556, 0.885), (40, 1, 0.516, 0.753), (40, 0, 0.516, 0.704)]
)
def test_chains_of_adjoint_matching_table(K, offset, mean, var):
    """backprop_rewards.md A7: data N(.5, .7), the paper's κ = 1/(t+h), σ² with and without its offset."""
    world, h = Normal(0.5, 0.7**0.5), 1 / K
    probe = torch.tensor([[0.0], [1.0]], dtype=F64)
    links = []
    for k in range(K):  # the paper's time: 0 is noise
        t = k * h
        v = -world.posterior(probe, 1 - t).velocity
        x = probe + h * (2 * v - probe / (t + h))
        links.append(Link((x[1] - x[0])[0], x[0, 0], torch.tensor((2 * (1 - t + offset * h) / (t + h) * h) ** 0.5)))
    got = output(world, links, 1.0)
    assert abs(got[0] - mean) < 5e-4 and abs(got[1] - var) < 5e-4


def test_our_memoryless_chain_is_closer_than_the_papers():
    world, times = Normal(0.5, 0.7**0.5), torch.linspace(1, 0, 41, dtype=F64)
    mean, var = output(world, chain(world, EulerMaruyama(Memoryless()), times), 1.0)
    assert abs(mean - 0.5) < 1e-4 and abs(var - 0.7) < 5e-4
    exact = output(world, chain(world, ExactReverse(world), times), 1.0)
    assert torch.allclose(torch.stack(exact), torch.tensor([0.5, 0.7], dtype=F64), atol=1e-12)


def test_riccati_against_the_output_law():
    world = Normal(0.5, 0.8, cosine(0.1, 1.4))
    links = chain(world, ExactReverse(world), torch.linspace(1, 0, 7, dtype=F64))
    values = riccati(links, 0.9, 1.1, -0.2)
    q = Quad(torch.tensor([[0.9]], dtype=F64), torch.tensor([1.1], dtype=F64), -0.2)
    mean, var = output(world, links, 1.0)
    direct = log_mean_exp(q, mean.reshape(1), var.reshape(1, 1))
    assert torch.allclose(chain_log_z(world, values, 1.0), direct, atol=1e-12)
    # the chain is exact, so its soft values are the posterior's
    a, s = world.process(0.0)
    at_zero = Quad(q.P, q.h, q.g)
    one = torch.ones(1, dtype=F64)
    data = Mixture(one, a * one[:, None] * 0.5, (a**2 * 0.64 + s**2) * one[:, None, None], Rectified())
    assert torch.allclose(data.tilted(at_zero)[1], direct, atol=1e-12)


def test_finite_chain_against_enumeration():
    world = five_states(3)
    total, ends = 0.0, torch.zeros(5, dtype=F64)
    for path in itertools.product(range(5), repeat=4):
        p = world.start[path[0]]
        for T, (a, b) in zip(world.steps, itertools.pairwise(path), strict=True):
            p = p * T[a, b]
        total = total + p * world.reward[path[-1]].exp()
        ends[path[-1]] += p
    assert torch.allclose(world.log_z(), total.log(), atol=1e-12)
    assert torch.allclose(world.output(), ends, atol=1e-12)
    assert isinstance(world, Finite) and len(world.values()) == 4
