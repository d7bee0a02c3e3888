"""The law of a step against torch.distributions, its atoms and its shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from flowalign.gaussian import Gaussian, per_sample, sum_dims, work_dtype

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


STDS = {
    "scalar": torch.tensor(0.7, dtype=F64),
    "per sample": draw(4, 1, 1, 1, seed=1).exp(),
    "map": draw(1, 1, 5, 6, seed=2).exp(),
    "full": draw(4, 3, 5, 6, seed=3).exp(),
}


def reference(g: Gaussian) -> Independent:
    return Independent(Normal(g.mean, g.std.expand_as(g.mean)), g.mean.ndim - 1)


@pytest.mark.parametrize("std", STDS.values(), ids=STDS)
def test_log_prob_kl_and_noise_against_torch(std):
    g, h = Gaussian(draw(4, 3, 5, 6), std), Gaussian(draw(4, 3, 5, 6, seed=9), std * 1.3)
    z = draw(4, 3, 5, 6, seed=4)
    x = g.sample(z)
    assert torch.equal(x, g.mean + std * z)
    assert torch.allclose(g.noise(x), z, atol=1e-12)
    assert torch.allclose(g.log_prob(x), reference(g).log_prob(x), atol=1e-10)
    assert torch.allclose(g.kl(h), kl_divergence(reference(g), reference(h)), atol=1e-10)
    assert torch.equal(g.kl(g), torch.zeros(4, dtype=F64))
    assert g.log_prob(x).shape == (4,)


def test_states_without_dimensions():
    g = Gaussian(draw(3), torch.tensor([0.5, 1.0, 2.0], dtype=F64))
    x = draw(3, seed=7)
    assert torch.allclose(g.log_prob(x), Normal(g.mean, g.std).log_prob(x), atol=1e-12)


def test_atoms():
    mean = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    point = Gaussian(mean, torch.zeros((), dtype=F64))
    assert torch.equal(point.log_prob(mean), torch.zeros(2, dtype=F64))
    assert point.log_prob(mean + torch.tensor([[0.0, 1e-12], [0.0, 0.0]]))[0] == -math.inf
    assert torch.equal(point.noise(mean + 1), torch.zeros(2, 2, dtype=F64))
    assert torch.equal(point.kl(point), torch.zeros(2, dtype=F64))
    assert torch.equal(point.kl(point.shift(torch.ones(2, dtype=F64))), torch.full((2,), math.inf, dtype=F64))
    wide = Gaussian(mean, torch.ones((), dtype=F64))
    assert torch.equal(point.kl(wide), torch.full((2,), math.inf, dtype=F64))
    assert torch.equal(wide.kl(point), torch.full((2,), math.inf, dtype=F64))


def test_an_atom_in_one_coordinate_leaves_the_others_their_density():
    g = Gaussian(torch.zeros(2, 2, dtype=F64), torch.tensor([[0.5, 0.0]], dtype=F64))
    x = torch.tensor([[0.3, 0.0], [0.3, 0.1]], dtype=F64)
    expected = Normal(torch.zeros((), dtype=F64), torch.tensor(0.5, dtype=F64)).log_prob(torch.tensor(0.3, dtype=F64))
    assert torch.allclose(g.log_prob(x)[0], expected) and g.log_prob(x)[1] == -math.inf
    other = Gaussian(g.mean + torch.tensor([0.2, 0.0]), g.std)
    assert torch.allclose(g.kl(other), torch.full((2,), 0.2**2 / (2 * 0.5**2), dtype=F64))


def test_gradients_stay_finite_beside_atoms():
    mean = torch.zeros(2, 2, dtype=F64, requires_grad=True)
    std = torch.tensor([[0.5, 0.0]], dtype=F64, requires_grad=True)
    g = Gaussian(mean, std)
    (g.log_prob(torch.tensor([[0.3, 0.0], [0.1, 0.0]], dtype=F64)).sum() + g.kl(g.detach()).sum()).backward()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(std.grad).all()
    assert torch.allclose(mean.grad[:, 0], torch.tensor([0.3, 0.1], dtype=F64) / 0.25)


def test_shift_detach_and_selection():
    g = Gaussian(draw(4, 2).requires_grad_(), STDS["scalar"].clone().requires_grad_())
    moved = g.shift(torch.full((4, 2), 0.5, dtype=F64))
    assert torch.equal(moved.mean, g.mean + 0.5) and moved.std is g.std
    assert not g.detach().mean.requires_grad and not g.detach().std.requires_grad
    index = torch.tensor([2, 2, 0])
    assert torch.equal(g[index].mean, g.mean[index]) and g[index].std is g.std
    own = Gaussian(draw(4, 2), draw(4, 1, seed=5).exp())
    assert torch.equal(own[index].std, own.std[index])
    shared = Gaussian(draw(4, 2), draw(1, 2, seed=6).exp())
    assert torch.equal(shared[index].std, shared.std)
    flat = Gaussian(draw(4, 2), draw(2, seed=6).exp())  # a map without batch dimension is never indexed
    assert torch.equal(flat[index].std, flat.std)


def test_per_sample_shapes_and_precision():
    like = torch.zeros(3, 2, 4, 4, dtype=torch.bfloat16)
    assert work_dtype(like) == torch.float32 and work_dtype(like.double()) == F64
    assert per_sample(0.5, like).shape == () and per_sample(0.5, like).dtype == torch.float32
    assert per_sample(torch.arange(3.0), like).shape == (3, 1, 1, 1)
    assert (
        per_sample(0.5, like.double()).dtype == F64
        and per_sample(torch.ones(3, dtype=F64), like).dtype == torch.float32
    )
    assert per_sample(torch.arange(3.0), torch.zeros(3)).shape == (3,)
    spatial = torch.ones(1, 1, 4, 4, dtype=F64)
    assert per_sample(spatial, like).shape == spatial.shape
    assert torch.equal(sum_dims(torch.ones(3, 2, 4)), torch.full((3,), 8.0))
    assert torch.equal(sum_dims(torch.arange(3.0)), torch.arange(3.0))


def test_sampling_keeps_the_precision_of_the_law():
    g = Gaussian(torch.zeros(2, 3, dtype=F64), torch.ones((), dtype=F64))
    assert g.sample(torch.ones(2, 3, dtype=torch.float32)).dtype == F64
    single = Gaussian(torch.zeros(2, 3), torch.ones(()))
    assert single.sample(torch.ones(2, 3, dtype=F64)).dtype == torch.float32
