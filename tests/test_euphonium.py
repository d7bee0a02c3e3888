"""Euphonium's guidance: how far the mean is pushed, and what SPSA asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.collect import Collector, collect
from flowalign.experience import Experience
from flowalign.guidance import Along
from flowalign.methods.euphonium import Euphonium
from flowalign.source import Prompts
from flowalign.spsa import Spsa, unit
from tests.credit_parts import STEPS, parts

BASE = Euphonium(eta=0.5, start=0.5, width=8, fraction=1.0, shared_noise=False)


def shift(**settings: Any) -> tuple[Collector, Experience, Tensor, Tensor]:
    """One rollout: its collector, the experience, the states where guidance begins, and how far each moved."""
    _, _, collector = parts(replace(BASE, **settings))
    e = collect(collector, Prompts(["a", "b dark"]).draw(0, 2, 4), 0)
    a, b = e.trajectory.at(3), e.trajectory.at(4)
    _, _, plain = parts(replace(BASE, **{k: v for k, v in settings.items() if k in ("eta", "noise_law")}, scale=0.0))
    f = collect(plain, Prompts(["a", "b dark"]).draw(0, 2, 4), 0)
    assert torch.equal(f.trajectory.at(3).x, a.x)
    return collector, e, a.x, b.x - f.trajectory.at(4).x


def slope(collector: Collector, x: Tensor, row: Tensor) -> Tensor:
    value = collector.recipe.learners[0]
    return value.gradient(x, torch.full((len(x),), 0.5, dtype=torch.float64), row)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"scale": 0.05}, 0.05),
        ({"scale": 0.05, "dt": True}, 0.05 / STEPS),
        ({"beta": 2.0}, 0.5**2 / 4),
        ({"beta": 2.0, "dt": True}, 0.5**2 / 4 / STEPS),
        ({"beta": 2.0, "noise_law": "flow"}, 0.5**2 / 4),  # g² = a² t/(1 - t), at t = .5
    ],
)
def test_the_push_is_scaled_as_asked(settings: dict[str, Any], factor: float) -> None:
    """scale, or g²/2β in its place; times t - s where asked."""
    collector, e, x, moved = shift(**settings)
    g = slope(collector, x, e.trajectory.at(3).row)
    assert g.abs().max() > 1e-3 and torch.allclose(moved, factor * g, atol=2e-6)


def test_a_normalised_push_has_one_length() -> None:
    """Each sample's gradient over its own norm: every state moves by the scale."""
    collector, e, x, moved = shift(scale=0.05, norm=True)
    g = slope(collector, x, e.trajectory.at(3).row)
    assert torch.allclose(moved.flatten(1).norm(dim=1), torch.full((8,), 0.05), atol=1e-5)
    assert torch.allclose(moved, 0.05 * unit(g), atol=2e-6) and g.flatten(1).norm(dim=1).std() > 1e-4
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_spsa_pushes_along_the_reward_of_the_posterior_mean() -> None:
    """Two judgements for each probe at each guided step; on average the gradient of the brightness, in its own sign."""
    collector, e, _, moved = shift(gradient="spsa", probes=3, scale=0.05, process=0.0)
    asked = collector.scorer.ledger.rewards
    assert asked == 8 * (1 + 2 * 3 * 2), "8 leaves, and 8 states at each of the steps 3 and 4"
    assert collector.scorer.ledger.decodes == asked and moved.abs().max() > 0
    again = shift(gradient="spsa", probes=3, scale=0.05, process=0.0)[3]
    assert torch.equal(moved, again), "directions follow from the seed"
    _, _, _, many = shift(gradient="spsa", probes=400, scale=12.0, process=0.0)
    dark = torch.tensor(["dark" in p for p in e.cond.prompts])[e.trajectory.at(3).row]
    sign = torch.where(dark, -1.0, 1.0)  # who asks for darkness gets it; the reward is the mean of 12 numbers
    assert torch.allclose((many * sign[:, None, None, None]).mean((0, 1, 2, 3)), torch.tensor(1.0), atol=0.1)


def test_spsa_is_the_gradient_of_a_quadratic() -> None:
    """E ĝ = ∇r for r = |x|² (smoothing adds a constant alone), whatever the size of the probe; rows are kept."""
    probing = Spsa(4000, 0.3)
    with pytest.raises(ValueError, match="no rollout has told it"):
        probing(torch.zeros(1, 3), 0.5, torch.zeros(1, dtype=torch.long))
    probing.enter(lambda x, row: (1 + row) * (x**2).sum(1), 1, (3, 4))
    x, row = torch.tensor([[1.0, -2.0, 0.5], [1.0, 1.0, 0.0]]), torch.tensor([0, 1])
    found = probing(x, 0.5, row)
    assert torch.allclose(found, 2 * x * (1 + row)[:, None], atol=0.5)
    assert torch.equal(probing(x, 0.5, row), found) and not torch.equal(probing(x, 0.4, row), found)


def test_settings_are_checked() -> None:
    for settings in ({"beta": 0.0}, {"beta": 1.0, "scale": 0.0}, {"probes": 0}, {"probe": 0.0}):
        with pytest.raises(ValueError, match="need"):
            Euphonium(**settings)
    assert Along(lambda x, p, t, row: x).enter(lambda x, row: x, 0, None) is None
