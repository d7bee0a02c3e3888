"""A sampler that draws no noise has nothing to train on: every policy gradient refuses level 0 before any sampling."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from toy import Toy

from flowalign.config import compose
from flowalign.fit_checks import check_settings
from flowalign.methods.base import Training

LEVELS: list[tuple[str, dict[str, Any]]] = [
    ("b2-diffurl", {"eta": 0.0}),
    ("dance-grpo", {"eta": 0.0}),
    ("ddpo", {"eta": 0.0}),
    ("dense-grpo", {"noise": 0.0}),
    ("euphonium", {"eta": 0.0}),
    ("euphonium", {"eta": 0.0, "noise_law": "flow"}),
    ("flow-grpo", {"noise": 0.0}),
    ("flow-grpo", {"noise": 0.0, "noise_law": "cps"}),
    ("flow-grpo", {"noise": 0.0, "window": None}),
    ("g2rpo", {"noise": 0.0}),
    ("grpo-guard", {"noise": 0.0}),
    ("mix-grpo", {"noise": 0.0}),
    ("mix-grpo", {"noise": 0.0, "noise_law": "cps"}),
    ("rtb", {"noise": 0.0, "memoryless": False}),
    ("talk2move", {"noise": 0.0}),
    ("tp-grpo", {"noise": 0.0}),
    ("tree-grpo", {"eta": 0.0}),
]


@pytest.mark.parametrize("preset", ["published", "demo"])
@pytest.mark.parametrize(("name", "settings"), LEVELS)
def test_no_noise_is_refused(name: str, settings: dict[str, Any], preset: str) -> None:
    """With the method's own presets, whose windows and laws differ; and the level of the preset itself passes."""
    toy = Toy()
    plain, still = (compose({"method": {"name": name, **s}}, None, preset) for s in ({}, settings))
    assert isinstance(plain.method, Training) and isinstance(still.method, Training)
    check_settings(toy, plain.method.recipe(toy.times(plain.fit.steps)), plain.fit)
    recipe = still.method.recipe(toy.times(still.fit.steps))
    grid = recipe.grid(toy.times(still.fit.steps)).tolist()
    assert not any(recipe.kernel.stochastic(t, s) for t, s in pairwise(grid)), "the sampler itself says so"
    with pytest.raises(ValueError, match="positive noise level"):
        check_settings(toy, recipe, still.fit)
