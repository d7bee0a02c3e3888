"""What tests of credit sample with: the toy, a method's own recipe, and a collector for it."""

from __future__ import annotations

import torch

from flowalign.collect import Collector
from flowalign.methods.base import Training
from flowalign.prepare import prepare
from flowalign.recipe import Recipe
from flowalign.scorer import Scorer
from flowalign.valuenet import ValueLearner
from tests.toy import Bright, Toy

STEPS = 6


def parts(method: Training) -> tuple[Toy, Recipe, Collector]:
    """The toy, a recipe for it and what samples by it; a value network says something from the start."""
    toy = Toy()
    recipe = method.recipe(toy.times(STEPS))
    policy, _ = prepare(toy, None, recipe.roles)
    for learner in recipe.learners:
        if isinstance(learner, ValueLearner):
            learner.prepare((3, 2, 2))
            assert learner.network is not None
            g = torch.Generator().manual_seed(1)
            for p in learner.network.parameters():
                p.data = 0.3 * torch.randn(p.shape, generator=g)
    return toy, recipe, Collector(toy, Scorer(toy, {"bright": Bright()}), policy, recipe, STEPS, 0)
