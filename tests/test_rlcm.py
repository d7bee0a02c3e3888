"""REBEL on a consistency model: whole chains, two of one prompt at a time, against the formula written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowalign.batches import paths
from flowalign.collect import Collector, collect
from flowalign.fit_checks import check_settings
from flowalign.kernels import Ancestral
from flowalign.laws import Consistency
from flowalign.methods.rlcm import RLCM, Rebel, partners
from flowalign.minibatch import minibatches
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.prepare import prepare
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from tests.toy import Bright, Toy

STEPS = 4
KERNEL = Ancestral(Consistency())


def sampled(size: int = 6):
    """Two prompts' chains by the method's recipe, and what made them."""
    toy = Toy()
    recipe = RLCM(loss="rebel", eta=0.05, least=0.3).recipe(toy.times(STEPS))
    policy, parameters = prepare(toy, None, recipe.roles)
    collector = Collector(toy, Scorer(toy, {"b": Bright()}), policy, recipe, STEPS, 0)
    draw = Prompts(["a", "b dark"]).draw(0, 2, size)
    return toy, collector, draw, collect(collector, draw, 0), parameters


def chain_ratio(toy: Toy, e, i: int) -> torch.Tensor:
    """Sum over the trained steps of [log p - log p_old] per dimension, of chain i, one step at a time."""
    out = torch.zeros(())
    for k in (0, 1):  # from 1 to .75 and to .5; a step that ends at .25 is below ``least``
        t, s = e.trajectory.times[k : k + 2].tolist()
        x, y = e.trajectory.at(k).x[i : i + 1], e.trajectory.at(k + 1)
        law, _ = KERNEL(x, toy.posterior(x, t, e.cond), t, s)
        out = out + (law.log_prob(y.x[i : i + 1]) - y.log_prob[i])[0] / 12
    return out


def test_rebel_by_hand() -> None:
    """(Δ log ρ / η - ΔA)² over first and second, third and fourth of each prompt, and its gradient; the fifth waits."""
    toy, collector, _, e, parameters = sampled(5)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    advantage = collector.recipe.credit(e)[-1]
    batch = paths(e, collector.recipe.credit(e), 0, {0, 1})
    found = collector.recipe.objective(Policy(toy), batch, e.cond).terms["policy"]
    gaps = []
    for i, j in ((0, 1), (2, 3), (5, 6), (7, 8)):
        ratios = chain_ratio(toy, e, i) - chain_ratio(toy, e, j)
        gaps.append(ratios / 0.05 - (advantage[i] - advantage[j]))
    wanted = (torch.stack(gaps) ** 2).mean()
    assert torch.allclose(found, wanted, rtol=1e-4) and found > 0.1
    for g, h in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        assert torch.allclose(g, h, rtol=1e-3, atol=1e-5) and h.abs().max() > 0
    there = collector.recipe.objective(Policy(Toy()), batch, e.cond)
    assert there.metrics["ratio_gap"] < 1e-5 and abs(there.terms["policy"] - found) > 0.01 * found


def test_partners_share_a_prompt() -> None:
    first, second = partners(torch.tensor([3, 0, 3, 0, 0, 3, 3, 1]))
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(1, 3), (0, 2), (5, 6)]
    assert [len(p) for p in partners(torch.arange(4))] == [0, 0]


def test_minibatches_hold_whole_pairs_of_trained_steps() -> None:
    """However small a batch is, its chains come in twos of a prompt; every chain once; other pairs each update."""
    _, collector, draw, e, _ = sampled(6)
    together = []
    for update in (0, 1):
        seen = []
        for b in minibatches(collector.recipe, collector, e, draw, FitOptions(batch=2, size=6), 0, update):
            assert len(b.data) == 2 and b.data.row[0] == b.data.row[1]
            assert sorted(b.data.steps.level.tolist()) == [0, 0, 1, 1]
            seen += b.data.reward.tolist()
        assert sorted(seen) == sorted(e.total.tolist())
        together.append({frozenset(seen[i : i + 2]) for i in range(0, 12, 2)})
    assert together[0] != together[1]


def test_chains_without_partners_are_refused() -> None:
    toy, recipe = Toy(), RLCM(loss="rebel").recipe(Toy().times(STEPS))
    for bad, words in ((FitOptions(size=1), "size >= 2"), (FitOptions(batch=3), "even number")):
        with pytest.raises(ValueError, match=words):
            check_settings(toy, recipe, replace(bad, steps=STEPS))
    assert isinstance(recipe.objective, Rebel) and not RLCM().recipe(Toy().times(STEPS)).objective.paired
