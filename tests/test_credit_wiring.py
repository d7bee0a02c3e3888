"""Credit as the methods wire it: on the toy, through each method's own recipe, against the rule written out.

The rules themselves are proved elsewhere; these hold what joins them: which level a credit lands on, among whom it is
normalised, where a reference starts, under which law a step's density is taken.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.collect import collect
from flowalign.credit import Normalise
from flowalign.experience import Experience
from flowalign.kernels import EulerMaruyama
from flowalign.laws import FlowGrpo, Table
from flowalign.methods.b2_diffurl import B2DiffuRL, Siblings
from flowalign.methods.base import Training
from flowalign.methods.dense_grpo import Calibration, DenseGRPO
from flowalign.methods.euphonium import Euphonium
from flowalign.methods.grpo_guard import GRPOGuard
from flowalign.methods.rlcm import RLCM
from flowalign.methods.talk2move import Exit, Talk2Move
from flowalign.methods.tp_grpo import TPGRPO
from flowalign.minibatch import minibatches
from flowalign.noise import Noise
from flowalign.objectives import Clip
from flowalign.options import FitOptions
from flowalign.policy import Policy
from flowalign.process import Rectified
from flowalign.recipe import Recipe, trained_steps
from flowalign.rollout import rollout
from flowalign.source import Prompts
from flowalign.trajectory import Nodes
from flowalign.valuenet import ValueLearner
from tests.credit_parts import STEPS, parts
from tests.toy import Bright, Toy

PROMPTS = ["a", "b dark"]
F64 = torch.float64
TIMES = torch.linspace(1, 0, STEPS + 1, dtype=F64)


def gather(method: Training, size: int = 4) -> tuple[Toy, Recipe, Experience]:
    """One iteration's samples of two prompts, by the method's own recipe."""
    toy, recipe, collector = parts(method)
    return toy, recipe, collect(collector, Prompts(PROMPTS).draw(0, 2, size), 0)


def ode_rewards(toy: Toy, e: Experience, steps: int | None) -> Tensor:
    """Rewards ``(K + 1, N)`` of the ODE completion of each state of each chain, one at a time."""
    out, row = [], e.trajectory.leaves.row
    for k in range(STEPS):
        nodes = e.trajectory.at(k)
        t = float(e.trajectory.times[k])
        grid = e.trajectory.times[k:] if steps is None else torch.linspace(t, 0, steps + 1, dtype=torch.float64)
        ends = rollout(
            Policy(toy), EulerMaruyama(), grid, Nodes.enter(nodes.x, nodes.row), e.cond, noise=Noise(0), n_rows=2
        ).leaves.x  # fmt: skip
        out.append(Bright()(toy.decode(ends, e.cond), [e.cond.prompts[r] for r in nodes.row.tolist()]).detach())
    assert torch.equal(nodes.row, row)
    return torch.stack([*out, e.total.detach()])


def in_groups(values: Tensor, row: Tensor, eps: float = 1e-4) -> Tensor:
    """``(v - mean) / (std + eps)`` within each prompt, population std, cut at ±5."""
    out = torch.empty_like(values)
    for g in row.unique():
        v = values[row == g]
        out[row == g] = (v - v.mean()) / (v.std(correction=0) + eps)
    return out.clamp(-5, 5)


@pytest.mark.parametrize("first", [False, True])
def test_turning_points_through_the_method(first: bool) -> None:
    """TP-GRPO: step k's credit lies on the step into level k, normalised among the samples of its own prompt."""
    toy, recipe, e = gather(TPGRPO(first=first, window=(0, 4)), 8)
    r, row = ode_rewards(toy, e, None), e.trajectory.leaves.row
    turned, credit = 0, recipe.credit(e)
    rises = r.diff(dim=0)
    raw = rises.clone()
    for i, k in itertools.product(range(r.shape[1]), range(4)):
        d, overall = rises[:, i], 1.0 if r[-1, i] > r[0, i] else -1.0
        turns = d[k] * overall > 0 and (d[k - 1] * overall < 0 if k else first)
        if turns and d[k] * (r[-1, i] - r[k + 1, i]) > 0:
            turned += 1
            raw[k, i] = r[-1, i] - r[k, i]
    assert turned > 3 and credit[0] is None
    for k in range(4):
        assert torch.allclose(credit[k + 1], in_groups(raw[k], row), atol=0.02), k


def test_gains_through_the_method() -> None:
    """DenseGRPO: completions of the length asked for, on all steps but the last, from the noise that Flow-GRPO has."""
    method = DenseGRPO(noise=0.6, rounds=0, completion=1)
    toy, recipe, e = gather(method, 8)
    gains = ode_rewards(toy, e, 1).diff(dim=0)
    for k, a in enumerate(recipe.credit(e)[1:]):
        assert torch.allclose(a, in_groups(gains[k], e.trajectory.leaves.row), atol=0.02), k
    times = toy.times(STEPS)
    assert trained_steps(recipe, times) == [0, 1, 2, 3, 4]
    for t, s in itertools.pairwise(times.tolist()):
        psi = recipe.kernel.law(Rectified(), t, s)  # type: ignore[attr-defined]
        assert torch.allclose(psi, FlowGrpo(0.6)(Rectified(), t, s).double())


def test_calibration_scales_with_the_group_and_stays_positive() -> None:
    """The paper's tolerance of 2 is for 24 samples: 4 for 48. ψ never becomes a sampler without noise."""
    table = Table(torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.02], dtype=torch.float64))
    calibration = Calibration(table, gains=None, rounds=0, tolerance=2.0, step=0.1, floor=0.015)  # type: ignore[arg-type]
    leaning = torch.tensor([1.0] * 25 + [-1.0] * 22 + [0.0])  # 3 more rises than falls, of 48
    calibration.update([leaning, -torch.ones(48)])
    assert table.values.tolist() == pytest.approx([0.6, 0.015])
    calibration.update([leaning[:24], torch.ones(48)])
    assert table.values.tolist() == pytest.approx([0.5, 0.015]), "24 rises of 24 are no balance"


def test_guard_keeps_means_and_compares_in_groups() -> None:
    """GRPO-Guard needs the old means of the rollout, and divides by the group's deviation, not the batch's."""
    _, recipe, e = gather(GRPOGuard(), 8)
    steps = e.trajectory.transitions(recipe.credit(e), lambda k, t, s: k < 5)
    assert steps.mean is not None
    loss = recipe.objective(e.policy, steps, e.cond)
    assert float(loss.metrics["ratio_gap"]) < 1e-6
    row = e.trajectory.leaves.row
    spread = e.total * torch.tensor([1.0, 3.0])[row]
    credit = recipe.credit(replace(e, rewards={"bright": spread}))
    assert torch.allclose(credit[-1], in_groups(spread, row), atol=1e-5)


def test_squared_error_is_called_the_ratio() -> None:
    """Flow-CPS: log ρ = mean (x' - μ_old)² - mean (x' - μ)², no variance in it."""
    toy, recipe, e = gather(TPGRPO(window=(0, 4)))
    steps = e.trajectory.transitions(recipe.credit(e), lambda k, t, s: k < 4)
    kernel, policy = recipe.kernel, Policy(toy)
    with torch.no_grad():
        before = kernel(steps.x, policy.posterior(steps.x, steps.t, e.cond[steps.row]), steps.t, steps.s)[0].mean
        for p in toy.denoiser.parameters():
            p.add_(0.05)
        law, _ = kernel(steps.x, policy.posterior(steps.x, steps.t, e.cond[steps.row]), steps.t, steps.s)
        got = recipe.objective.log_ratio(law, steps)  # type: ignore[attr-defined]
    squares = [((steps.x_next - m) ** 2).flatten(1).mean(1) for m in (before, law.mean)]
    assert torch.allclose(got, squares[0] - squares[1], atol=1e-5) and got.abs().max() > 1e-3
    assert isinstance(recipe.objective, Clip) and recipe.objective.ratio == "mse"


def standings(e: Experience, before: list[dict[str, Tensor]]) -> Tensor:
    """B²-DiffuRL's z, prompt by prompt: against this iteration's rewards of the prompt and the 8 iterations' before."""
    z = torch.empty(len(e.total), dtype=F64)
    for prompt, mine in by_prompt(e).items():
        known = torch.cat([*(it[prompt] for it in before[-8:]), mine]).double()
        here = torch.tensor([e.cond.prompts[r] == prompt for r in e.trajectory.leaves.row.tolist()])
        z[here] = (mine.double() - known.mean()) / (known.std() + 1e-8)
    return z


def by_prompt(e: Experience) -> dict[str, Tensor]:
    """The rewards of each prompt; prompts come in another order in each iteration."""
    return {p: e.total[e.trajectory.leaves.row == i] for i, p in enumerate(e.cond.prompts)}


def chosen(z: Tensor, branch: Tensor, margin: float) -> Tensor:
    """The advantage: z of each branch's best from ``margin`` on, of its worst below ``-margin``, 0 of all others."""
    out = torch.zeros_like(z)
    for b in branch.unique():
        mine = (branch == b).nonzero().flatten().tolist()
        best, worst = max(mine, key=lambda i: float(z[i])), min(mine, key=lambda i: float(z[i]))
        out[best] = z[best] if z[best] >= margin else out[best]
        out[worst] = z[worst] if z[worst] < -margin else out[worst]
    return out


def test_siblings_part_at_the_tail_and_the_tail_alone_is_trained() -> None:
    """B²-DiffuRL: siblings are one until the tail begins; best and worst have their prompt's z, the others nothing."""
    _, recipe, collector = parts(B2DiffuRL(low=0.5, high=1.0, stages=2, width=4, margin=0.4))
    before: list[dict[str, Tensor]] = []
    for iteration, first in enumerate((3, 1, 0, 0)):
        e = collect(collector, Prompts(PROMPTS).draw(iteration, 2, 8), iteration)
        assert trained_steps(recipe, e.trajectory.times) == list(range(first, STEPS - 1)), "ever more of the tail"
        line, credit, (one, two) = e.trajectory.lineage(), recipe.credit(e)[-1], by_prompt(e).values()
        assert len(line[first].unique()) == 4 and len(line[first + 1].unique()) == 16
        assert abs(one.mean() - two.mean()) > 2 * one.std(), "rewards of the two prompts do not mix"
        expected = chosen(standings(e, before), line[first], 0.4)
        assert torch.allclose(credit.double(), expected, atol=1e-4) and 0 < (credit != 0).sum() < 16
        before.append(by_prompt(e))
        recipe.learners[0].observe(e)


def test_siblings_that_were_not_chosen_cost_no_training() -> None:
    """The steps that B²-DiffuRL trains are those of the chosen samples, each with its own credit; none may be left."""
    _, recipe, e = gather(B2DiffuRL(low=0.5, width=4, margin=0.4), 8)
    options = FitOptions(batch=1000)
    (batch,) = minibatches(recipe, None, e, None, options, 0, 0)  # type: ignore[arg-type]
    credit = e.cache["credit"][-1]
    keep = set(credit.nonzero().flatten().tolist())
    assert 0 < len(keep) < 16 and set(batch.data.child.tolist()) == keep
    assert len(batch.data) == len(keep) * 2 and set(batch.data.level.tolist()) == {3, 4}
    assert torch.equal(batch.data.weight, credit[batch.data.child])
    none = B2DiffuRL(low=0.5, width=4, margin=50.0).recipe(TIMES)
    assert not minibatches(none, None, replace(e, cache={}), None, options, 0, 0)  # type: ignore[arg-type]


def test_only_recent_iterations_are_remembered() -> None:
    """What stands out is told by this iteration and the last ``memory`` ones in which a prompt may have been drawn."""
    _, recipe, e = gather(B2DiffuRL(low=1.0, width=4), 8)
    line = e.trajectory.lineage()[0]
    other = replace(e, cond=replace(e.cond, prompts=("c", "d dark")))  # drawn in between: it is no prompt of these
    for memory, known in ((0, 0), (1, 0), (2, 1), (3, 2), (9, 8)):
        rule = Siblings(recipe.learners[0], margin=0.0, memory=memory)  # type: ignore[arg-type]
        for _ in range(8):
            rule(replace(e, rewards={"bright": e.total + 5}))
        rule(other)
        fresh = Siblings(recipe.learners[0], margin=0.0, memory=memory)  # type: ignore[arg-type]
        fresh.load_state_dict(rule.state_dict())
        before = [{p: r + 5 for p, r in by_prompt(e).items()}] * known
        expected = chosen(standings(e, before), line, 0.0).clamp(-5, 5)
        for got in (rule(e)[-1], fresh(e)[-1]):
            assert torch.allclose(got.double(), expected, atol=1e-4), memory
        assert rule.recent == fresh.recent and len(rule.recent) == min(memory, 10)


def test_a_standing_is_cut_at_five() -> None:
    """One of 40 alike that stands six deviations out counts as five."""
    _, recipe, e = gather(B2DiffuRL(low=1.0, width=40), 40)
    total = torch.zeros(80)
    total[3] = 1.0
    credit = Siblings(recipe.learners[0])(replace(e, rewards={"bright": total}))[-1]  # type: ignore[arg-type]
    assert credit.nonzero().flatten().tolist() == [3] and float(credit[3]) == 5.0


def test_the_exit_is_measured_within_groups() -> None:
    """Talk2Move: a candidate's variance is the mean over groups, so that easy and hard prompts are not mixed up."""
    _, recipe, collector = parts(Talk2Move(noise=0.7, exits=(1, 4), clip=1e-2))
    (exit_,) = recipe.learners
    assert isinstance(exit_, Exit)
    exit_.before(collector, Prompts(PROMPTS), FitOptions(groups=2, size=6))
    chosen = exit_.step
    for k in (1, 4):
        exit_.step = k
        e = collect(collector, Prompts(PROMPTS).draw(0, 2, 6), -1)
        row = e.trajectory.leaves.row
        assert len(e.trajectory.times) == k + 2, "k noisy steps and a jump"
        spread = [float(e.total[row == g].var(correction=0)) for g in (0, 1)]
        assert exit_.variances[k] == pytest.approx(sum(spread) / 2, rel=1e-4)
        assert exit_.variances[k] < 0.9 * float(e.total.var(correction=0))
    assert chosen == max((1, 4), key=lambda k: exit_.variances[k])


def test_a_step_that_ends_next_to_data_is_not_trained() -> None:
    """RLCM: diffusers' consistency grid ends at σ = .001, where a density would outweigh all others."""
    times = torch.tensor([1.0, 0.667, 0.334, 0.001, 0.0], dtype=torch.float64)
    assert trained_steps(RLCM().recipe(times), times) == [0, 1]
    assert trained_steps(RLCM(least=0.0).recipe(times), times) == [0, 1, 2], "the last step draws none at all"


# ------------------------------------------------------------------------------------------------ Euphonium


def guided(**settings: Any) -> tuple[Toy, Recipe, Experience, ValueLearner]:
    method = Euphonium(eta=0.5, start=0.5, width=8, fraction=1.0, **settings)
    toy, recipe, e = gather(method)
    (value,) = recipe.learners
    assert isinstance(value, ValueLearner)
    return toy, recipe, e, value


def test_the_guided_step_is_judged_by_the_unguided_law() -> None:
    """x' = μ + scale ∇V + std z from the step where guidance begins; its density is that of N(μ, std²), unweighted."""
    scale = 0.05
    toy, recipe, e, value = guided(scale=scale)
    _, unguided, f, _ = guided(scale=0.0)
    tree, plain = e.trajectory, f.trajectory
    for k in range(STEPS - 1):
        a, b = tree.at(k), tree.at(k + 1)
        x, t, s = a.x[b.parent], float(tree.times[k]), float(tree.times[k + 1])
        with torch.no_grad():
            law, _ = recipe.kernel(x, Policy(toy).posterior(x, t, e.cond[b.row]), t, s)
        assert torch.allclose(b.log_prob, law.log_prob(b.x), atol=1e-3), "under the unguided mean"
        assert torch.equal(b.log_w, torch.zeros(len(b))), "guidance is distilled, not corrected for"
    assert torch.equal(tree.at(3).x, plain.at(3).x), "nothing is guided before half of the steps are done"
    half = torch.full((len(tree.at(3)),), 0.5, dtype=torch.float64)
    push = value.gradient(tree.at(3).x, half, tree.at(3).row)[tree.at(4).parent]
    assert torch.allclose(tree.at(4).x - plain.at(4).x, scale * push, atol=1e-5), "the same noise, pushed"
    assert push.abs().max() > 1e-3 and unguided.guide is None


def test_the_process_column_is_the_state_stepped_to() -> None:
    """A_process of step k: V(x_{k+1}, t_{k+1}), normalised in its group at that step, times the weight."""
    _, recipe, e, value = guided(scale=0.0, process=0.5)
    row = e.trajectory.leaves.row
    for k in range(1, STEPS + 1):
        nodes, a = e.trajectory.at(k), recipe.credit(e)[k]
        with torch.no_grad():
            v = value(nodes.x, e.trajectory.times[k].expand(len(nodes)), nodes.row)
        rule = Normalise(unbiased=True, eps=1e-8)
        assert torch.allclose(a[:, 0], rule(e.total, e.group[row]), atol=1e-5)
        alone = torch.stack([(v[i] - v[nodes.row == nodes.row[i]].mean()) / v[nodes.row == nodes.row[i]].std()
                             for i in range(len(nodes))])  # fmt: skip
        assert torch.allclose(a[:, 1], 0.5 * alone, atol=1e-3)
