"""Flow-GRPO's last step, through the method: it is never trained, and a window of all steps is no window."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowalign.collect import Collector, collect
from flowalign.fit import fit
from flowalign.methods import RELATIVES, resolve
from flowalign.methods.flow_grpo import FlowGRPO
from flowalign.options import FitOptions
from flowalign.prepare import prepare
from flowalign.recipe import trained_steps
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from tests.toy import Bright, Toy

STEPS = 6
OPTIONS = FitOptions(iterations=4, groups=2, size=8, steps=STEPS, batch=16, lr=3e-3)
KINDS = {"flow": FlowGRPO(clip=1e-2, kl=0.0), "cps": FlowGRPO(noise=0.8, noise_law="cps", ratio="mse", clip=1e-2)}


def sampled(method: FlowGRPO):
    toy = Toy()
    recipe = method.recipe(toy.times(STEPS))
    policy, _ = prepare(toy, None, recipe.roles)
    collector = Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, STEPS, 0)
    return trained_steps(recipe, toy.times(STEPS)), collect(collector, Prompts(["a"]).draw(0, 1, 4), 0).trajectory


def weights(method: FlowGRPO) -> list[torch.Tensor]:
    toy = Toy()
    recipe = method.recipe(toy.times(STEPS))
    policy, parameters = prepare(toy, None, recipe.roles)
    scorer = Scorer(toy, {"b": Bright()})
    list(fit(toy, scorer, Prompts(["a"]), recipe, OPTIONS, policy=policy, parameters=parameters))
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("name", KINDS)
def test_a_window_of_all_steps_is_no_window(name: str) -> None:
    """The same steps are drawn and trained, and the weights agree bit for bit after several updates."""
    plain, whole = KINDS[name], replace(KINDS[name], window=(0, STEPS))
    (steps, a), (others, b) = sampled(plain), sampled(whole)
    assert steps == others == list(range(STEPS - 1)), "the last step is not trained"
    assert all(torch.equal(a.at(k).x, b.at(k).x) for k in range(STEPS + 1))
    before = [p.detach() for p in Toy().denoiser.parameters()]
    for p, q, r in zip(weights(plain), weights(whole), before, strict=True):
        assert torch.equal(p, q) and not torch.equal(p, r)


def test_without_its_last_step_a_window_is_another_sampler() -> None:
    """The published SDE has noise in its last step too; outside a window there is none. CPS draws none there at all."""
    for name, method in KINDS.items():
        (steps, a), (others, b) = sampled(method), sampled(replace(method, window=(0, STEPS - 1)))
        assert steps == others == list(range(STEPS - 1))
        assert all(torch.equal(a.at(k).x, b.at(k).x) for k in range(STEPS))
        gap = (a.leaves.x - b.leaves.x).abs().max()
        assert gap > 0.1 if name == "flow" else gap < 1e-5


def test_a_start_may_be_shared() -> None:
    """One initial noise for a prompt's samples, which part at the first step; each has its own otherwise."""
    _, apart = sampled(KINDS["flow"])
    _, shared = sampled(replace(KINDS["flow"], shared_noise=True))
    assert [len(t.at(0)) for t in (apart, shared)] == [4, 1] and len(shared.leaves) == 4
    assert len({tuple(x.flatten().tolist()) for x in shared.leaves.x}) == 4


@pytest.mark.parametrize(("name", "paper"), [
    ("branch-grpo", "2509.06040"), ("treegrpo", "2512.08153"), ("dynamic-treerpo", "2509.23352"),
    ("flow-cps", "2509.05952"),
])  # fmt: skip
def test_a_paper_that_is_settings_of_another_is_found_and_cited(name: str, paper: str) -> None:
    with pytest.raises(ValueError, match=f"settings of {RELATIVES[name]}"):
        resolve(name)
    assert paper in resolve(RELATIVES[name]).reference
