"""Potentials: what a lineage gains, and that every one leads to the same target."""

from __future__ import annotations

import math

import pytest
import torch
from worlds import F64, TwoPrompts

from flowalign.potentials import Difference, Immediate, Maximum, Potential, Sum, Tempered
from flowalign.potentials.tempered import geometric
from flowalign.selection import SCHEMES, Resample

VALUES = [
    torch.tensor([0.3, -0.2], dtype=F64),
    torch.tensor([0.1, 0.6], dtype=F64),
    torch.tensor([0.4, 0.5], dtype=F64),
]
ROW = torch.tensor([0, 0])


def gains(potential: Potential) -> list[list[float]]:
    """Log-potentials along two lineages with the values above."""
    out, trace, log_w = [], None, torch.zeros(2, dtype=F64)
    for level, (t, value) in enumerate(zip((0.8, 0.4, 0.0), VALUES, strict=True)):
        gain, trace = potential(level, t, value, trace, log_w, ROW, 1, level == 2)
        log_w = log_w + gain
        out.append(gain.tolist())
    assert torch.allclose(log_w, potential.scale * VALUES[-1])  # the product is exp(λ r), whatever the way there
    return out


def test_gains_by_hand():
    table = {
        Difference(2.0): [[0.6, -0.4], [-0.4, 1.6], [0.6, -0.2]],
        Maximum(2.0): [[0.6, -0.4], [0.6, 1.2], [0.8 - 1.2, 1.0 - 0.8]],
        Sum(2.0): [[0.6, -0.4], [0.8, 0.8], [0.8 - 1.4, 1.0 - 0.4]],
        Immediate(2.0): [[0.6, -0.4], [0.2, 1.2], [0.8 - 0.8, 1.0 - 0.8]],
        Tempered(2.0, schedule=lambda t: 1 - t): [[0.12, -0.08], [0.12 - 0.12, 0.72 + 0.08], [0.8 - 0.12, 1.0 - 0.72]],
    }
    for potential, want in table.items():
        assert torch.allclose(torch.tensor(gains(potential), dtype=F64), torch.tensor(want, dtype=F64)), potential


def test_levels_and_defaults():
    every = Difference()
    assert every.scale == 1.0 and every.active(3, False) and every.active(3, True)
    some = Immediate(1.0, levels=lambda k: k % 2 == 0)
    assert some.active(2, False) and not some.active(3, False) and some.active(3, True)  # the last always acts
    value = torch.ones(2, dtype=F64, requires_grad=True)
    gain, _ = every(0, 0.5, value, None, torch.zeros(2, dtype=F64), ROW, 1, False)
    assert not gain.requires_grad
    for potential in (Difference(), Maximum(), Sum(), Immediate(), Tempered(schedule=lambda t: 1.0)):
        assert potential.unbiased
    assert not Tempered().unbiased


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_potential_leaves_the_evidence_unbiased(scheme, threshold, n):
    world = TwoPrompts(copies={2: 2000, 4: 1500, 16: 500}[n], n=n)
    for seed, potential in enumerate(
        [Maximum(1.5), Sum(0.7), Immediate(1.5), Tempered(2.5, schedule=lambda t: 1 - t), Sum(2.0, lambda k: k == 4)]
    ):
        world.check(
            world.run(seed, potential=potential, select=Resample(scheme, threshold)).log_evidence(), potential.scale
        )


def test_weighted_samples_have_the_tilted_moments():
    """Self-normalised moments of 64 particles against the exact law of the tilted sampler."""
    world = TwoPrompts(copies=300, n=64, p=(0.0, 0.0))
    tree = world.run(potential=Difference(2.0), select=Resample())
    mean = (tree.weights() * tree.leaves.x[:, 0]).reshape(-1, 64).sum(1).reshape(300, 2)
    h = 1e-4
    up, down = (TwoPrompts(p=(0.0, 0.0), q=(0.7 + d, -0.5 + d)).log_z(2.0) for d in (h, -h))
    want = (up - down) / (2 * h) / 2.0  # d log Z / d(λq) is the mean of x
    assert ((mean.mean(0) - want).abs() < 4 * mean.std(0) / 300**0.5 + 5e-3).all()
    assert torch.allclose(tree.weights().reshape(-1, 64).sum(1), torch.ones(600, dtype=F64))


def test_adaptive_tempering_keeps_the_effective_sample_size():
    g = torch.Generator().manual_seed(0)
    row = torch.arange(2).repeat_interleave(200)
    value = torch.randn(400, dtype=F64, generator=g) * torch.tensor([1.0, 0.02], dtype=F64)[row]
    zero = torch.zeros(400, dtype=F64)
    gain, (total, share) = Tempered(10.0, target=0.8)(1, 0.5, value, None, zero, row, 2, False)
    assert torch.equal(total, gain)
    w = gain.exp()
    size = [float(w[row == r].sum() ** 2 / (w[row == r] ** 2).sum()) / 200 for r in (0, 1)]
    assert size[0] == pytest.approx(0.8, abs=1e-6)  # as far as the target allows ...
    assert size[1] > 0.8 and torch.equal(share[row == 1], torch.full((200,), 0.5, dtype=F64))  # ... and below 1 - t
    assert 0 < float(share[0]) < 0.5 and torch.allclose(gain, 10 * share * value)
    # the next level starts where this one ended: an exhausted target moves nothing
    again, (_, same) = Tempered(10.0, target=0.8)(2, 0.4, value, (total, share), gain, row, 2, False)
    assert torch.allclose(same[row == 0], share[row == 0], atol=1e-9)
    assert torch.allclose(again[row == 0], torch.zeros(200, dtype=F64), atol=1e-7)
    assert torch.allclose(same[row == 1], torch.full((200,), 0.6, dtype=F64))
    assert Tempered().target == 0.9 and Tempered().schedule is None


def test_geometric_schedule():
    law = geometric(0.008, 100)
    assert law(1.0) == 0 and law(0.5) == pytest.approx(1.008**50 - 1) and law(0.0) == 1.0
    assert law(0.14) == pytest.approx(1.008**86 - 1) and law(0.12) == 1.0  # reaches 1 at step 87
    assert math.isclose(geometric(1.0, 2)(0.75), 2**0.5 - 1)
