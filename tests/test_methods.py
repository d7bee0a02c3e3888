"""Flow-GRPO and DiffusionNFT as rows: the choices that their settings make, and that they learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowalign.fit import fit
from flowalign.kernels import Ancestral, EulerMaruyama, SecondOrder, Windowed
from flowalign.laws import Cps, FlowGrpo
from flowalign.methods import METHODS, names, nearest, resolve
from flowalign.methods.base import Training, levels_between
from flowalign.methods.diffusion_nft import DiffusionNFT
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.options import FitOptions
from flowalign.prepare import prepare
from flowalign.recipe import trained_steps
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from tests.toy import Bright, Toy

TIMES = torch.linspace(1, 0, 11, dtype=torch.float64)


def test_published_flow_grpo() -> None:
    """The paper's: its SDE at every step, all but the last trained, batch std, clip 1e-4 of the mean log-ratio."""
    method = FlowGRPO.presets()["published"]
    recipe = method.method.recipe(TIMES)
    assert recipe.kernel == EulerMaruyama(FlowGrpo(0.7)) and trained_steps(recipe, TIMES) == list(range(9))
    assert (
        recipe.objective.epsilon == (1e-4, 1e-4) and recipe.objective.ratio == "per_dim" and recipe.objective.kl == 0.01
    )
    assert (
        recipe.credit.normalise.scale == "batch"
        and recipe.credit.normalise.clamp == 5.0
        and recipe.roles == ("reference",)
    )
    assert (method.lora.rank, method.lora.alpha, method.fit.lr, method.fit.size) == (32, 64, 3e-4, 24)
    # 48 groups of 24 in batches of 9 over nine steps, two optimiser steps in all
    assert 48 * 24 * 9 / method.fit.batch / method.fit.accumulate == 2


def test_window() -> None:
    """Noise and training are confined to the window; the rest is the ODE."""
    recipe = FlowGRPO(noise=0.8, noise_law="cps", window=(1, 4), kl=0.0).recipe(TIMES)
    assert isinstance(recipe.kernel, Windowed) and recipe.kernel.inside == Ancestral(Cps(0.8))
    assert trained_steps(recipe, TIMES) == [1, 2, 3] and recipe.roles == ()
    grid = TIMES.tolist()
    assert [recipe.kernel.stochastic(grid[k], grid[k + 1]) for k in range(10)] == [False, True, True, True] + [
        False
    ] * 6


def test_levels_between_survives_float32() -> None:
    """Times that went through float32 are still recognised."""
    inside = levels_between(TIMES, 2, 5)
    hits = [k for k in range(10) if inside(float(TIMES[k].float()), 0.0)]
    assert hits == [2, 3, 4]
    for bad in ((3, 3), (0, 11), (-1, 2)):
        with pytest.raises(ValueError, match="a window of steps"):
            levels_between(TIMES, *bad)


def test_published_nft() -> None:
    """The paper's: DPM++ 2M samples of the old policy, whose decay is min(.001 n, .5)."""
    recipe = DiffusionNFT().recipe(TIMES)
    assert recipe.kernel == SecondOrder() and recipe.role == "old" and recipe.roles == ("old", "reference")
    assert recipe.objective.limit == 5.0 and recipe.objective.kl == 1e-4 and recipe.objective.beta == 1.0
    assert [recipe.old(n) for n in (0, 100, 10_000)] == pytest.approx([0.0, 0.1, 0.5])
    late = DiffusionNFT(old="catching-up", rate=0.02).decay()
    assert [late(n) for n in (0, 10, 1000)] == pytest.approx([1.0, 0.8, 0.5])


@pytest.mark.parametrize("name", ["flow-grpo", "diffusion-nft"])
def test_demo_settings_learn(name: str) -> None:
    """With the demo's choices, the reward of a toy rises by more than four standard errors."""
    preset = resolve(name).presets()["demo"]
    assert isinstance(preset.method, Training)
    method = replace(preset.method, kl=0.01)
    toy = Toy()
    recipe = method.recipe(toy.times(10))
    options = FitOptions(iterations=40, groups=4, size=8, steps=10, lr=1e-2, updates=preset.fit.updates, batch=64)
    policy, parameters = prepare(toy, None, recipe.roles, old=recipe.old, ema=preset.ema)
    stream = fit(
        toy, Scorer(toy, {"b": Bright()}), Prompts(["a"]), recipe, options, policy=policy, parameters=parameters
    )
    reward = torch.tensor([m["reward"] for m in stream])
    error = ((reward[:8].var() + reward[-8:].var()) / 8).sqrt()
    assert reward[-8:].mean() - reward[:8].mean() > 4 * error


def test_names() -> None:
    """Names are sorted, resolve, and the nearest are found."""
    assert list(METHODS) == sorted(METHODS)
    assert "best-of-n" in names("steering") and {"flow-grpo", "diffusion-nft"} <= set(names("training"))
    assert nearest("diffusion-ntf", METHODS).startswith("Nearest: diffusion-nft")
    assert resolve("flowalign.methods.flow_grpo:FlowGRPO") is FlowGRPO
    for bad in ("flowalign.methods.flow_grpo:Nothing", "nowhere:At", "flowalign.kernels:Kernel"):
        with pytest.raises(ValueError, match=r"cannot be imported|is no method"):
            resolve(bad)
