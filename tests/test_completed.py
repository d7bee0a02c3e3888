"""Completions stop where the rollout itself goes on as the ODE: counted, and the same numbers come out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowalign.collect import collect
from flowalign.credit import Gains
from flowalign.experience import ode_from
from flowalign.guidance import Along
from flowalign.kernels import Ancestral, EulerMaruyama, Windowed
from flowalign.laws import Ddim, FlowGrpo
from flowalign.methods.dense_grpo import DenseGRPO
from flowalign.methods.tp_grpo import TPGRPO
from flowalign.noise import Noise
from flowalign.prepare import prepare
from flowalign.recipe import trained_steps
from flowalign.rollout import rollout
from flowalign.selection import Branch
from flowalign.trajectory import Nodes
from tests.test_shared_calls import STEPS, sampled
from tests.toy import Toy


@pytest.mark.parametrize(
    ("method", "evaluations", "levels"),
    [
        (TPGRPO(window=(0, 3), clip=1e-2), 1 + 2 + 3 + 3 + 3 + 3, 3),
        (TPGRPO(window=(1, 2), clip=1e-2), 1 + 2 + 2 + 2 + 2 + 2, 2),
        (TPGRPO(clip=1e-2), 1 + 2 + 3 + 4 + 5 + 5, 5),
        (DenseGRPO(rounds=0, kl=0.0, clip=1e-2), 21, 6),  # the SDE to the end
    ],
)
def test_what_the_rollout_goes_on_to_be_is_not_completed_again(method, evaluations: int, levels: int) -> None:
    """After the last noisy step the rollout is the ODE: same completions and credit, no evaluation, decode or judge."""
    toy, collector, _, e, _ = sampled(method)
    ledger = collector.scorer.ledger
    assert e.ode == levels
    toy.sizes.clear()
    ledger.rewards = ledger.decodes = 0
    rewards = e.completions()
    assert sum(toy.sizes) == 8 * 2 * evaluations and ledger.rewards == ledger.decodes == 16 * levels
    credit = collector.recipe.credit
    blind = replace(e, ode=None, cache={})
    toy.sizes.clear()
    assert len(rewards) == len(blind.completions()) == STEPS + 1 and sum(toy.sizes) == 16 * 21
    for a, b in zip(rewards, blind.completions(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    trained = [k + 1 for k in trained_steps(collector.recipe, e.trajectory.times)]
    for c, d in zip([credit(e)[k] for k in trained], [credit(blind)[k] for k in trained], strict=True):
        assert torch.allclose(c, d, rtol=1e-3, atol=1e-5) and c.abs().max() > 0.1
    assert torch.equal(Gains(steps=2).gains(e)[3], Gains(steps=2).gains(blind)[3]), "shorter completions are others"


def test_only_the_ode_of_the_sampling_weights_counts_as_completed() -> None:
    """Not another solver, not a guided step, not another role's sample, not nodes that part or died."""
    times = Toy().times(STEPS)
    sde = EulerMaruyama(FlowGrpo(0.7))
    early = lambda t, s: t > 0.6  # noqa: E731 - steps 0, 1 and 2
    assert ode_from(Windowed(sde, early), times) == 3
    assert ode_from(Windowed(Windowed(sde, early), lambda t, s: t > 0.3), times) == 3
    assert ode_from(Windowed(sde, early, outside=Ancestral(Ddim(0.0))), times) == STEPS
    assert ode_from(sde, times) == STEPS and ode_from(EulerMaruyama(), times) == 0
    _, collector, draw, e, _ = sampled(TPGRPO(window=(0, 3)))
    guide = Along(lambda x, posterior, t, row: x, where="posterior")
    for recipe in (replace(collector.recipe, guide=guide), replace(collector.recipe, role="old")):
        policy, _ = prepare(Toy(), None, ("old",), old=lambda update: 0.0)
        assert collect(replace(collector, recipe=recipe, policy=policy), draw, 0).ode is None
    for select, floor in ((Branch({4: 2}), 5), (Branch({1: 2}), 3)):
        e = collect(replace(collector, recipe=replace(collector.recipe, select=select)), draw, 0)
        blind = replace(e, ode=None, cache={})
        assert [len(r) for r in e.completions()] == [len(r) for r in blind.completions()]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(e.completions(), blind.completions(), strict=True))
        assert all(r is e.completions()[-1] for r in e.completions()[floor:])
    whole = replace(e, ode=e.trajectory.first, cache={})  # an ODE from its start: nothing at all to ask
    start = e.trajectory.at(0)
    chain = rollout(
        collector.policy, EulerMaruyama(), times, Nodes.enter(start.x, start.row), e.cond, noise=Noise(0)
    )  # fmt: skip
    whole = replace(whole, trajectory=chain, rewards={"r": chain.leaves.x.flatten(1).mean(1)})
    assert all(torch.equal(r, whole.total) for r in whole.completions())
