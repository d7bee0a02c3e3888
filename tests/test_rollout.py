"""The one sampling loop: chunks, chains, ratios, staircases, gradients and modes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from worlds import F64, Net, Normal, TwoPrompts, chain, output

from flowalign.guidance import Along, Twist
from flowalign.kernels import Ancestral, EulerMaruyama, Kernel, SecondOrder, Windowed
from flowalign.laws import Constant, Cps, Ddim, FlowGrpo, Memoryless
from flowalign.noise import START, Given, Noise
from flowalign.policy import Policy, Weights
from flowalign.potentials import Difference
from flowalign.rollout import Tape, advance, evaluate, rollout, walk
from flowalign.selection import Branch, Resample, Top
from flowalign.trajectory import Nodes
from flowalign.values import Completion, Tweedie, Value

STEPS = 6
TIMES = torch.linspace(1, 0, STEPS + 1, dtype=F64)
STOCHASTIC: dict[str, Kernel] = {
    "flow-grpo": EulerMaruyama(FlowGrpo(0.7)),
    "memoryless": EulerMaruyama(Memoryless()),
    "ddpm": Ancestral(Ddim(1.0)),
    "cps": Ancestral(Cps(0.8)),
    "windowed": Windowed(EulerMaruyama(Constant(0.4)), lambda t, s: 0.3 < t < 0.9),
}
every_kernel = pytest.mark.parametrize("kernel", STOCHASTIC.values(), ids=STOCHASTIC)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def first(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return x[:, 0]


def started(keys: range, per_row: int = 1, dim: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Noise, Nodes]:
    """Keyed noise and start nodes for prompts that have these keys."""
    noise = Noise(3, tuple(keys))
    row = torch.arange(len(keys)).repeat_interleave(per_row)
    slot = torch.arange(per_row).repeat(len(keys))
    return noise, Nodes.enter(noise.normal(START, row, slot, (dim,)).to(dtype), row)


# ---------------------------------------------------------------------------------------------------------------------
# the chain itself


@every_kernel
def test_a_rollout_is_the_kernel_step_by_step(kernel):
    net = Net().double()
    noise, start = started(range(4), dtype=F64)
    cond = torch.tensor([3, 1, 2, 0])
    tree = rollout(Policy(net), kernel, TIMES, start, cond, noise=noise, keep=True)
    x, carry = start.x, None
    for k, (t, s) in enumerate(pairwise(TIMES.tolist())):
        law, carry = kernel(x, net.posterior(x, t, cond), t, s, carry)
        nodes, children = tree.at(k), tree.at(k + 1)
        assert torch.equal(nodes.x, x) and torch.equal(nodes.step.mean, law.mean)
        if kernel.stochastic(t, s):
            x = law.sample(noise.normal(k, start.row, torch.zeros(4, dtype=torch.long), (3,)))
            assert torch.equal(children.log_prob, law.log_prob(x))
        else:
            x = law.mean
            assert not children.log_prob.any()
        assert torch.equal(children.x, x) and children.parent.tolist() == [0, 1, 2, 3]
        assert torch.equal(children.row, start.row) and children.origin.tolist() == [-1] * 4
    assert torch.equal(tree.leaves.x, x) and tree.n_rows == 4 and torch.equal(tree.times, TIMES)
    assert not any(tree.at(k).x.requires_grad for k in range(STEPS + 1))
    assert tree.leaves.posterior is None and torch.equal(tree.log_z, torch.zeros(4, dtype=F64))
    light = rollout(Policy(net), kernel, TIMES, start, cond, noise=noise)
    assert light.at(2).posterior is None and light.at(2).step is None and torch.equal(light.leaves.x, x)


def test_samples_have_the_exact_output_law():
    world, kernel, n = Normal(), Ancestral(Ddim(1.0)), 20000
    from flowalign.noise import Stream

    g = torch.Generator().manual_seed(1)
    start = Nodes.enter(world.start(torch.randn(n, 1, generator=g)), torch.zeros(n, dtype=torch.long))
    x = rollout(Policy(world), kernel, TIMES, start, noise=Stream(g)).leaves.x[:, 0]
    mean, var = output(world, chain(world, kernel, TIMES), 1.0)
    assert abs(x.mean() - mean) < 4 * (var / n) ** 0.5 and abs(x.var() - var) < 4 * var * (2 / n) ** 0.5


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_prompts_at_once_or_in_four_chunks(kernel, dtype):
    net, cond = Net(rows=16).to(dtype), torch.arange(16)
    noise, start = started(range(16))
    whole = rollout(Policy(net), kernel, TIMES, start, cond, noise=noise)
    same = rollout(Policy(net, chunk=4), kernel, TIMES, start, cond, noise=noise)
    parts = []
    for i in range(0, 16, 4):
        own, begin = started(range(i, i + 4))
        assert torch.equal(begin.x, start.x[i : i + 4])  # identical noises
        parts.append(rollout(Policy(net), kernel, TIMES, begin, cond[i : i + 4], noise=own))
    for k in range(STEPS + 1):
        x, log_prob = (torch.cat([getattr(p.at(k), name) for p in parts]) for name in ("x", "log_prob"))
        assert torch.equal(same.at(k).x, x) and torch.equal(same.at(k).log_prob, log_prob)  # bitwise: the same shape
        assert torch.allclose(whole.at(k).x, x, atol=1e-4 if dtype == torch.float32 else 0.3)
    assert whole.leaves.x.dtype == torch.float32


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_at_the_first_update_is_exactly_one(kernel, dtype):
    """Sampled under no_grad with one time per batch; recomputed with a graph and a time per sample: bit for bit."""
    net, cond = Net().to(dtype), torch.arange(8)
    noise, start = started(range(8))
    policy = Policy(net)
    tree = rollout(policy, kernel, TIMES, start, cond, noise=noise)
    flat = tree.transitions(where=lambda k, t, s: kernel.stochastic(t, s))
    seen = 0
    for level in flat.level.unique().tolist():
        part = flat[(flat.level == level).nonzero().flatten()]
        posterior = policy.posterior(part.x, part.t, cond[part.row])
        law, _ = kernel(part.x, posterior, part.t, part.s)
        log_prob = law.log_prob(part.x_next)
        # into data time DDPM and CPS draw nothing: an atom, met exactly
        assert log_prob.requires_grad and torch.equal(log_prob, part.log_prob)
        assert torch.equal((log_prob - part.log_prob).exp(), torch.ones(8))
        seen += len(part)
    assert seen >= 24


# ---------------------------------------------------------------------------------------------------------------------
# what is asked of the network


def test_network_evaluations_are_n_times_k():
    world = TwoPrompts(copies=3, n=5)
    for slots in ({}, {"select": Resample("ssp", 2.0)}, {"select": Top({2: 5})}):
        policy, row = Policy(world.world), torch.arange(6).repeat_interleave(5)
        rollout(
            policy, world.kernel, TIMES, Nodes.enter(draw(30, 1), row), noise=Noise(0),
            value=Tweedie(world.score), potential=Difference(), **slots,
        )  # fmt: skip
        assert policy.ledger.evaluations == 30 * STEPS and policy.ledger.gradients == 0
    policy = Policy(world.world)
    rollout(policy, world.kernel, TIMES, Nodes.enter(draw(2, 1)), noise=Noise(0), select=Branch({1: 3, 3: 2}))
    assert policy.ledger.evaluations == 2 * 2 + 6 * 2 + 12 * 2
    policy = Policy(world.world)
    rollout(
        policy, world.kernel, TIMES, Nodes.enter(draw(2, 1)), noise=Noise(0), value=Completion(policy, first, steps=3)
    )
    assert policy.ledger.evaluations == 2 * STEPS * 3 + 2 * 2  # data time: x0 = x is known, two more ODE calls at t = 0


def test_values_are_asked_for_only_where_the_potential_acts():
    asked = []

    class Spy(Value):
        def __call__(self, x, posterior, t, row):
            asked.append(round(float(t), 3))
            return x[:, 0]

    start = Nodes.enter(draw(2, 1), torch.zeros(2, dtype=torch.long))
    kernel, policy = Ancestral(Ddim()), Policy(Normal())
    tree = rollout(
        policy, kernel, TIMES, start, noise=Noise(0), value=Spy(), potential=Difference(1.0, lambda k: k == 2)
    )
    assert asked == [round(float(TIMES[2]), 3), 0.0]
    assert tree.at(1).value is None and tree.at(2).value is not None
    assert torch.equal(tree.at(2).log_w, tree.at(2).x[:, 0])
    assert torch.allclose(tree.leaves.log_w, tree.leaves.x[:, 0])
    asked.clear()
    rollout(policy, kernel, TIMES, start, noise=Noise(0), value=Spy())
    assert len(asked) == STEPS + 1


def test_expanding_a_kept_node_again_is_free():
    net = Net().double()
    policy, kernel, cond = Policy(net), EulerMaruyama(Constant(0.4)), torch.arange(4)
    noise, start = started(range(4), dtype=F64)
    tree = rollout(policy, kernel, TIMES, start, cond, noise=noise, keep=True)
    spent = policy.ledger.evaluations
    parents = torch.tensor([1, 1, 3])
    t, s = TIMES[2:4].tolist()
    again, children = advance(policy, kernel, tree.at(2), t, s, level=2, noise=Noise(9), cond=cond, parents=parents)
    assert policy.ledger.evaluations == spent
    law = tree.at(2).step[parents]
    assert torch.allclose(
        children.x, law.sample(Noise(9).normal(2, torch.tensor([1, 1, 3]), torch.tensor([0, 1, 0]), (3,)))
    )
    assert children.parent.tolist() == [1, 1, 3] == children.row.tolist() and torch.equal(again.x, tree.at(2).x)
    assert torch.allclose(children.log_prob, law.log_prob(children.x))
    # the law is that of the kernel and the step at hand, not of the one that was kept
    _, wider = advance(policy, EulerMaruyama(Constant(0.8)), tree.at(2), t, s, level=2, noise=Noise(9), cond=cond)
    assert not torch.allclose(wider.x[1], children.x[0])
    known = evaluate(policy, tree.at(2), t, cond)
    assert known is tree.at(2) and policy.ledger.evaluations == spent
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    _, carried = advance(policy, kernel, tree.at(2), t, s, level=2, noise=Noise(9), parents=parents, log_w=weights)
    assert torch.equal(carried.log_w, weights)
    inherited = advance(
        policy, kernel, Nodes(**(vars(tree.at(2)) | {"log_w": draw(4)})), t, s, level=2, noise=Noise(9), parents=parents
    )[1]
    assert torch.equal(inherited.log_w, draw(4)[parents])


def test_roles_are_played():
    net = Net().double()
    policy = Policy(net, {"reference": Weights(list(net.parameters()))})
    noise, start = started(range(2), dtype=F64)
    before = rollout(policy, EulerMaruyama(), TIMES, start, torch.arange(2), noise=noise).leaves.x
    with torch.no_grad():
        net.outer.bias.add_(1.0)
    now = rollout(policy, EulerMaruyama(), TIMES, start, torch.arange(2), noise=noise)
    reference = rollout(policy, EulerMaruyama(), TIMES, start, torch.arange(2), noise=noise, role="reference")
    assert torch.equal(reference.leaves.x, before) and not torch.allclose(now.leaves.x, before)


# ---------------------------------------------------------------------------------------------------------------------
# staircases


@pytest.mark.parametrize("kernel", [EulerMaruyama(), Ancestral(Ddim(0.0)), SecondOrder()])
def test_a_staircase_is_bitwise_its_completions_one_by_one(kernel):
    """Nodes of every level completed together, K calls in sequence, against K separate completions, shape for shape."""
    net, cond = Net(), torch.arange(4)
    noise, start = started(range(4))
    source = rollout(Policy(net), EulerMaruyama(FlowGrpo()), TIMES, start, cond, noise=noise)
    entries = {k: Nodes.enter(source.at(k).x, source.at(k).row) for k in range(STEPS)}
    net.calls, policy = 0, Policy(net, chunk=4)
    stairs = rollout(policy, kernel, TIMES, entries, cond, noise=Noise(0))
    assert policy.ledger.evaluations == 4 * STEPS * (STEPS + 1) // 2
    for k in range(STEPS):
        alone = rollout(Policy(net), kernel, TIMES, {k: entries[k]}, cond, noise=Noise(0))
        assert torch.equal(stairs.leaves.x[4 * k : 4 * k + 4], alone.leaves.x), k
        assert alone.first == k and alone.at(k).parent.tolist() == [-1] * 4
    assert [int((i >= 0).sum()) for i in stairs.lineage()] == [4 * (k + 1) for k in range(STEPS)] + [4 * STEPS]
    together = Policy(net)
    net.calls = 0
    rollout(together, kernel, TIMES, entries, cond, noise=Noise(0))
    assert net.calls == STEPS


def test_entries_are_numbered_behind_those_already_there():
    kernel, policy = EulerMaruyama(Constant(0.4)), Policy(Normal())
    a, b = Nodes.enter(draw(2, 1), torch.tensor([0, 1])), Nodes.enter(draw(1, 1, seed=4), torch.tensor([1]))
    tree = rollout(policy, kernel, TIMES, {1: a, 3: b}, noise=Noise(0))
    assert tree.first == 1 and len(tree.at(2)) == 2 and len(tree.at(3)) == 3 and tree.n_rows == 2
    assert torch.equal(tree.at(3).x[2:], b.x) and tree.at(3).parent.tolist() == [0, 1, -1]
    alone = rollout(policy, kernel, TIMES, {1: a}, noise=Noise(0))
    assert torch.equal(tree.leaves.x[:2], alone.leaves.x)  # a newcomer changes no other node's noise


# ---------------------------------------------------------------------------------------------------------------------
# gradients


def loss_of(x: torch.Tensor) -> torch.Tensor:
    return (torch.sin(x) * torch.arange(1, x.numel() + 1, dtype=F64).reshape(x.shape)).mean()


class Taped:
    """A rollout as a function of its start, its noises and one weight, for finite differences."""

    def __init__(self, kernel: Kernel, tape: Tape) -> None:
        self.kernel, self.tape, self.net = kernel, tape, Net().double()
        self.inputs = {START: draw(4, 3, seed=50)} | {k: draw(4, 3, seed=51 + k) for k in range(STEPS)}
        self.cond = torch.arange(4)

    def run(self, inputs, entry: int = 0):
        noise = Given({k: z for k, z in inputs.items() if k >= 0}, Noise(0))
        start = {entry: Nodes.enter(inputs[START])}
        return rollout(Policy(self.net), self.kernel, TIMES, start, self.cond, noise=noise, tape=self.tape)

    def gradients(self):
        inputs = {k: z.clone().requires_grad_() for k, z in self.inputs.items()}
        self.net.zero_grad()
        tree = self.run(inputs)
        loss_of(tree.leaves.x).backward()
        return {k: z.grad for k, z in inputs.items()}, [p.grad.clone() for p in self.net.parameters()], tree

    def loss(self, inputs, entry: int) -> float:
        return float(loss_of(self.run(inputs, entry).leaves.x.detach()))

    def difference(self, inputs, key, direction, entry: int = 0, h: float = 1e-5) -> float:
        up, down = (dict(inputs) | {key: inputs[key] + e * direction} for e in (h, -h))
        return (self.loss(up, entry) - self.loss(down, entry)) / (2 * h)

    def weight_difference(self, inputs, weight, direction, entry: int = 0, h: float = 1e-5) -> float:
        values = []
        for e in (h, -2 * h):
            with torch.no_grad():
                weight.add_(e * direction)
            values.append(self.loss(inputs, entry))
        with torch.no_grad():
            weight.add_(h * direction)
        return (values[0] - values[1]) / (2 * h)


DIFFERENTIABLE = STOCHASTIC | {"ode": EulerMaruyama(), "dpm-solver++": SecondOrder()}


@pytest.mark.parametrize("kernel", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradients_through_the_whole_rollout(kernel):
    world = Taped(kernel, Tape())
    noises, weights, tree = world.gradients()
    assert tree.leaves.x.requires_grad and not tree.leaves.log_prob.requires_grad
    for key, grad in noises.items():
        if key >= 0 and not kernel.stochastic(*TIMES[key : key + 2].tolist()):
            assert grad is None
            continue
        direction = draw(4, 3, seed=90 + key)
        got = world.difference(world.inputs, key, direction)
        assert abs(float((grad * direction).sum()) - got) < 1e-7, key
    for weight, grad in zip(world.net.parameters(), weights, strict=True):
        direction = draw(*weight.shape, seed=7)
        assert abs(float((grad * direction).sum()) - world.weight_difference(world.inputs, weight, direction)) < 1e-7


@pytest.mark.parametrize("kernel", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("last", [1, 3])
def test_gradients_through_the_last_steps(kernel, last):
    """DRaFT-K: the gradient is that of a rollout which starts at the state entering the taped part."""
    cut = STEPS - last
    world = Taped(kernel, Tape(first=cut))
    noises, weights, tree = world.gradients()
    assert all(noises[k] is None for k in range(START, cut))
    assert not tree.at(cut).x.requires_grad and tree.at(cut + 1).x.requires_grad
    if isinstance(kernel, SecondOrder):
        return  # its memory crosses the cut, detached: no rollout from the state alone repeats it
    inputs = world.inputs | {START: tree.at(cut).x}
    for key in range(cut, STEPS):
        if noises[key] is not None:
            direction = draw(4, 3, seed=90 + key)
            want = world.difference(inputs, key, direction, cut)
            assert abs(float((noises[key] * direction).sum()) - want) < 1e-7
    for weight, grad in zip(world.net.parameters(), weights, strict=True):
        direction = draw(*weight.shape, seed=7)
        want = world.weight_difference(inputs, weight, direction, cut)
        assert abs(float((grad * direction).sum()) - want) < 1e-7


@pytest.mark.parametrize("kernel", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("first_level", [0, 3])
def test_checkpointing_changes_no_bit(kernel, first_level):
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        world = Taped(kernel, Tape(first_level, checkpoint=again))
        state = torch.get_rng_state()
        noises, weights, tree = world.gradients()
        assert torch.equal(torch.get_rng_state(), state)  # no noise is drawn inside
        calls = STEPS + (STEPS - first_level if again else 0)
        assert world.net.calls == calls
        results.append([*(g for g in noises.values() if g is not None), *weights, tree.leaves.x.detach()])
    assert len(results[0]) > 5 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_memory_is_cut_with_its_state():
    world = Taped(SecondOrder(), Tape(first=3))
    noises, _, tree = world.gradients()
    assert noises[START] is None and tree.leaves.x.requires_grad
    nothing = rollout(Policy(world.net), SecondOrder(), TIMES, Nodes.enter(draw(4, 3)), world.cond, noise=Noise(0))
    assert not nothing.leaves.x.requires_grad


def test_resampling_does_not_cut_the_graph_of_what_survives():
    net = Net().double()
    x = draw(4, 3).requires_grad_()
    start = Nodes.enter(x, torch.zeros(4, dtype=torch.long))
    tree = rollout(
        Policy(net), EulerMaruyama(Constant(0.3)), TIMES, start, torch.zeros(1, dtype=torch.long), noise=Noise(0),
        tape=Tape(), select=Resample("multinomial", 2.0), value=Tweedie(first), potential=Difference(5.0),
    )  # fmt: skip
    tree.leaves.x.sum().backward()
    alive = torch.zeros(4, dtype=torch.bool)
    alive[tree.lineage()[0]] = True
    assert 0 < int(alive.sum()) < 4 and torch.equal(x.grad.abs().sum(1) > 0, alive)


# ---------------------------------------------------------------------------------------------------------------------
# modes and refusals


@pytest.mark.parametrize("tape", [None, Tape(), Tape(3)])
@pytest.mark.parametrize("outer", [True, False])
def test_no_gradient_mode_leaks_at_a_yield(tape, outer):
    net = Net().double()
    guide = Along(lambda x, *a: x, "proposal") if tape is not None else Twist()
    with torch.set_grad_enabled(outer):
        stages = walk(
            Policy(net), EulerMaruyama(Constant(0.3)), TIMES, Nodes.enter(draw(2, 3)), torch.arange(2),
            noise=Noise(0), tape=tape, guide=guide, value=Tweedie(first),
        )  # fmt: skip
        seen = []
        for stage in stages:
            assert torch.is_grad_enabled() == outer and not torch.is_inference_mode_enabled()
            seen.append((stage.level, stage.t))
        assert torch.is_grad_enabled() == outer
    assert seen == list(enumerate(TIMES.tolist()))


def test_a_walk_may_be_left_early():
    policy = Policy(Normal())
    for stage in walk(policy, Ancestral(Ddim()), TIMES, Nodes.enter(draw(2, 1)), noise=Noise(0)):
        if stage.level == 2:
            break
    assert policy.ledger.evaluations == 6 and stage.nodes.posterior is not None and torch.is_grad_enabled()


def test_bad_input_is_refused_before_any_work():
    policy, start = Policy(Normal()), Nodes.enter(draw(2, 1))
    kernel, noise = Ancestral(Ddim()), Noise(0)
    for times in ([1.0], [0.0, 1.0], [1.0, 0.5, 0.5], [1.1, 0.0], [1.0, -0.1]):
        with pytest.raises(ValueError, match=r"times must fall strictly inside \[0, 1\] with at least one step; got"):
            rollout(policy, kernel, torch.tensor(times), start, noise=noise)
    for entries in ({}, {-1: start}, {STEPS: start}):
        with pytest.raises(ValueError, match="nodes may enter at levels 0 to 5; got entries at"):
            rollout(policy, kernel, TIMES, entries, noise=noise, n_rows=2)
    with pytest.raises(ValueError, match="a potential weighs values"):
        rollout(policy, kernel, TIMES, start, noise=noise, potential=Difference())
    with pytest.raises(ValueError, match="cannot be taped"):
        rollout(policy, kernel, TIMES, start, noise=noise, value=Tweedie(first), guide=Twist(), tape=Tape())
    with pytest.raises(ValueError, match=r"nodes enter at levels \[0, 2\]"):
        rollout(policy, kernel, TIMES, {0: start, 2: start}, noise=noise, value=Tweedie(first), potential=Difference())
    assert policy.ledger.evaluations == 0
    assert rollout(policy, kernel, TIMES, {STEPS - 1: start}, noise=noise, n_rows=7).n_rows == 7
