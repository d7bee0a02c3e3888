"""Reward gradients beyond DRaFT: each equals a finite difference of what its method says it minimises.

Direct-Align's recovery and SRPO's relative reward, InstructVideo's partial chain, IPRO's KL per step, Ctrl-U's doubt,
R0's proximal step, the linear adjoint; ceilings and mixes of any method; what is refused, and what stops a run.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flowalign import checkpoint
from flowalign.adjoint import lean_adjoint, linear_adjoint, reward_gradient, slopes
from flowalign.collect import Collector, collect, grow
from flowalign.fit import fit
from flowalign.growth import cut, recovered
from flowalign.kernels import Ancestral, EulerMaruyama
from flowalign.laws import Ddim, FlowGrpo, Memoryless
from flowalign.methods.adjoint_matching import AdjointMatching
from flowalign.methods.ctrl_u import CtrlU, Doubted
from flowalign.methods.draft import DRaFT
from flowalign.methods.forward_looking import ForwardLooking
from flowalign.methods.instruct_video import InstructVideo
from flowalign.methods.ipro import IPRO
from flowalign.methods.nabla_db import NablaDB
from flowalign.methods.r0 import R0
from flowalign.methods.srpo import SRPO
from flowalign.minibatch import minibatches
from flowalign.noise import Noise
from flowalign.objectives import Backprop
from flowalign.objectives.backprop import Grown
from flowalign.options import FitOptions
from flowalign.policy import Policy, Weights
from flowalign.prepare import prepare
from flowalign.process import Rectified
from flowalign.restraint import Restraint
from flowalign.rollout import Tape, rollout
from flowalign.scorer import Scorer
from flowalign.source import Prompt, Prompts
from flowalign.trajectory import Nodes
from tests.test_policy_gradient import judged
from tests.toy import Bright, Toy
from tests.worlds import F64, Normal, cosine

STEPS = 6
OPTIONS = FitOptions(iterations=24, groups=4, size=8, steps=STEPS, lr=3e-3, batch=64, weight_decay=0.0)
WORDS = {"positive": ("fair",), "negative": ("dark",)}


class Exact(Toy):
    """The toy in float64, smooth to the end; whatever has no graph is made by the weights that it began with.

    A loss is then a function of its taped part alone, and a finite difference sees what the gradient sees.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.denoiser.double()
        self.prefix = copy.deepcopy(self.denoiser)

    def start(self, noise, t, cond):
        return noise.double()

    def posterior(self, x, t, cond):
        live = self.denoiser
        self.denoiser = live if torch.is_grad_enabled() else self.prefix
        try:
            return super().posterior(x, t, cond)
        finally:
            self.denoiser = live

    def decode(self, x, cond):
        return 0.5 + 0.4 * torch.tanh(x - 0.5)


class Worded(Bright):
    """Curved in the picture, different for each wording."""

    def __call__(self, media, prompts, meta=None):
        shift = torch.tensor([len(p) + (0.7 if "dark" in p else 0.0) for p in prompts], dtype=media.dtype)
        return torch.sin(4 * media + shift[:, None, None, None]).mean((1, 2, 3))


def doubled(toy, recipe):
    """A policy and its parameters in float64: training itself is in float32."""
    policy, parameters = prepare(toy, None, recipe.roles, old=recipe.old)
    for p in parameters:
        p.data = p.data.double()
    for name in policy.roles:
        policy.roles[name] = Weights(parameters)
    return policy, parameters


def bench(method, toy=None, reward=None, source=None, restraint=None):
    """A collector, parameters and a draw of two prompts with three samples each."""
    toy = toy or Exact()
    recipe = method.recipe(toy.times(STEPS))
    if restraint is not None:
        recipe = replace(recipe, restraint=restraint)
    policy, parameters = doubled(toy, recipe)
    collector = Collector(toy, Scorer(toy, {"r": reward or Worded()}), policy, recipe, STEPS, seed=3)
    draw = (source or Prompts(["a", "bb"])).draw(0, 2, 3)
    return collector, parameters, draw


def grown_loss(collector: Collector, draw, iteration: int = 1) -> torch.Tensor:
    """The sum of the terms of one grown batch."""
    data, cond = grow(collector, draw, iteration, collector.recipe.tape(iteration))
    return torch.stack(list(collector.recipe.objective(collector.policy, data, cond).terms.values())).sum()


def stated_loss(collector: Collector, draw, visited, iteration: int = 1) -> torch.Tensor:
    """The same as the docstring says it: the penalty is taken at the visited states, which are held fixed."""
    objective, policy = collector.recipe.objective, collector.policy
    data, cond = grow(collector, draw, iteration, collector.recipe.tape(iteration))
    return Backprop(objective.ceiling)(policy, data).terms["reward"] + objective.kl * objective._penalty(
        policy, visited, cond
    )


def slope_gap(loss, parameters, stated=None, h: float = 1e-5) -> tuple[float, float]:
    """The gradient along a random direction, and how far a central difference of what is stated is from it."""
    stated = stated or loss
    g = torch.Generator().manual_seed(1)
    ways = [torch.randn(p.shape, generator=g, dtype=F64) for p in parameters]
    grads = torch.autograd.grad(loss(), parameters)
    exact = sum((a * b).sum() for a, b in zip(grads, ways, strict=True))
    start = [p.detach().clone() for p in parameters]

    def at(step: float) -> torch.Tensor:
        for p, p0, way in zip(parameters, start, ways, strict=True):
            p.data = p0 + step * way
        return stated().detach()

    difference = (at(h) - at(-h)) / (2 * h)
    at(0.0)
    return float(exact), float(abs(exact - difference))


GROWN = {
    "full": DRaFT(mode="full"),
    "last": DRaFT(depth=3, eta=1.0),
    "low-variance": DRaFT(depth=1, repeats=3),
    "refl": DRaFT(mode="refl", depth=3, ceiling=0.4),
    "random": DRaFT(mode="random"),
    "kl": DRaFT(depth=3, kl=0.7),
    "srpo": SRPO(**WORDS, count=2),
    "srpo-denoise": SRPO(**WORDS, inversion=False, ceiling=None, discount=0.5, count=3),
    "instruct-video": InstructVideo(depth=3),
    "instruct-video-noisy": InstructVideo(depth=2, eta=1.0, ceiling=0.2, kl=0.5),
    "ipro": IPRO(kl=0.3, noise=0.5),
    "ipro-ode": IPRO(kl=0.3, noise=0.0),
    "ctrl-u": CtrlU(count=3, doubt=0.4),
    "r0": R0(hold=2.0),
}


@pytest.mark.parametrize("name", GROWN)
def test_gradient_is_the_finite_difference(name: str) -> None:
    """In float64, within 1e-7; with the weights away from the base, so that every penalty pulls."""
    collector, parameters, draw = bench(GROWN[name])
    g = torch.Generator().manual_seed(5)
    for p in parameters:
        p.data = p.data + 0.1 * torch.randn(p.shape, generator=g, dtype=F64)
    stated = None
    if "kl" in name or "ipro" in name or "noisy" in name:
        tree = grow(collector, draw, 1, collector.recipe.tape(1))[0].trajectory
        visited = replace(tree, levels=tuple(n.bare() for n in tree.levels))
        stated = lambda: stated_loss(collector, draw, visited)  # noqa: E731
    slope, gap = slope_gap(lambda: grown_loss(collector, draw), parameters, stated)
    assert abs(slope) > 1e-3 and gap < 1e-7, (slope, gap)


# ---------------------------------------------------------------------------------------------------- Direct-Align


@pytest.mark.parametrize("process", [Rectified(), cosine(0.02, 1.5)])
@pytest.mark.parametrize(("t", "s"), [(0.9, 0.8), (0.9, 0.1), (0.5, 0.0), (0.3, 0.6), (0.2, 0.9)])
def test_recovery_on_gaussians(process, t: float, s: float) -> None:
    """A point returns exactly, from any time to any time; N(m, c²) returns what its affine posterior leaves."""
    z = torch.randn(7, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    point = Normal(0.7, 0.0, process)
    x0 = torch.full_like(z, 0.7)
    assert torch.allclose(recovered(Policy(point), x0, z, t, s, None), x0, atol=1e-12)
    world = Normal(0.7, 0.5, process)
    x0 = world.start(z.flip(0), 0.0) if process(0.0)[1] == 0 else 0.7 + 0.5 * z.flip(0)
    (a, sig), (a_s, sig_s) = process(t), process(s)
    gain = a * 0.25 / (a**2 * 0.25 + sig**2)
    x0_hat = 0.7 + gain * (a * x0 + sig * z - a * 0.7)
    eps_hat = (a * x0 + sig * z - a * x0_hat) / sig
    by_hand = x0_hat + sig_s / a_s * (eps_hat - z)
    assert torch.allclose(recovered(Policy(world), x0, z, t, s, None), by_hand, atol=1e-12)
    assert (by_hand - x0).abs().max() > 1e-2


def test_relative_reward_by_hand() -> None:
    """κ by step, the swap of the wordings and of the sign of the velocity upwards, the discount: entry by entry."""
    method = SRPO(**WORDS, push=(0.1, 0.3), pull=(0.3, 0.0), count=2, discount=0.5, ceiling=None)
    collector, _, draw = bench(method)
    data, cond = grow(collector, draw, 1, Tape(0))
    grid, toy, reward = collector.pipeline.times(STEPS).tolist(), collector.pipeline, Worded()
    tree = collector.sample(draw, collector.bind(draw), 1)
    row, x0 = tree.leaves.row, tree.leaves.x
    from flowalign.growth import fresh_noise

    z = fresh_noise(collector, draw, 1, 21, row, x0)
    entries = data.total.reshape(4, 6)
    found = []
    for first in range(1, 4):
        expected = []
        for k in (first, first + 1):
            for t, s in ((grid[k], grid[k + 1]), (grid[k + 1], grid[k])):
                with torch.enable_grad():
                    x = recovered(collector.policy, x0, z, t, s, cond[row])
                good, bad = (
                    reward(toy.decode(x, cond), [f"{w} {draw.prompts[r]}" for r in row]) for w in ("fair", "dark")
                )
                down = (1 + 0.1 + 0.2 * k / 5) * good - bad
                up = (1 + 0.3 - 0.3 * k / 5) * bad - good
                expected.append(down if s < t else up)
        found.append(torch.allclose(entries, torch.stack(expected), atol=1e-12))
    assert found.count(True) == 1
    assert data.weight.reshape(4, 6)[:, 0].tolist() == [1.0, 1.0, 0.5, 0.5]
    loss = Backprop(None)(collector.policy, data).terms["reward"]
    assert torch.allclose(loss, -(data.weight * data.total).mean())


def test_both_branches_push_the_velocity_one_way() -> None:
    """For a reward that is linear in the picture, denoising and inversion move the velocity alike."""
    shift = nn.Parameter(torch.zeros(2, dtype=F64))
    base = Normal(0.5, 0.3)

    class Moved:
        process = base.process

        def posterior(self, x, t, cond=None):
            return self.process.posterior(x, t, v=base.posterior(x, t).velocity + shift)

    z, x0 = torch.randn(5, 2, dtype=F64), torch.rand(5, 2, dtype=F64)
    down, up = (recovered(Policy(Moved()), x0, z, t, s, None).mean() for t, s in ((0.6, 0.4), (0.4, 0.6)))
    (g_down,), (g_up,) = (torch.autograd.grad(r, shift) for r in (down, -up))  # wanted, and unwanted swapped
    assert (g_down < 0).all() and (g_up < 0).all()
    assert torch.allclose(g_down * 0.6, g_up * 0.4, atol=1e-12)  # (t - s)/(1 - s) against (s - t)/(1 - t)


def test_every_step_is_drawn_and_none_that_cannot_be() -> None:
    """The inversion never starts from data nor goes to pure noise; each admissible step is drawn."""
    assert {SRPO(count=2).first(10, s) for s in range(200)} == set(range(1, 8))
    assert {SRPO(count=2, inversion=False).first(10, s) for s in range(200)} == set(range(9))


def test_a_reward_that_does_not_read_is_refused() -> None:
    class Blind(Bright):
        def __call__(self, media, prompts, meta=None):
            return media.mean((1, 2, 3))

    collector, _, draw = bench(SRPO(**WORDS), reward=Blind())
    with pytest.raises(ValueError, match="does not read the prompt"):
        grow(collector, draw, 0, Tape(0))


# --------------------------------------------------------------------------------------------------- InstructVideo


def test_partial_chain() -> None:
    """Noised to the grid's last time not below the strength, then the sampler's own steps; only the last are taped."""
    collector, _, draw = bench(InstructVideo(strength=0.55, depth=2))
    data, cond = grow(collector, draw, 2, Tape(0))
    tree = data.trajectory
    assert torch.allclose(tree.times, collector.pipeline.times(STEPS)[2:])  # 4/6 is the last one above .55
    clean = collector.sample(draw, collector.bind(draw), 2).leaves.x
    from flowalign.growth import fresh_noise

    z = fresh_noise(collector, draw, 2, 31, tree.leaves.row, clean)
    assert torch.allclose(tree.at(0).x, clean / 3 + 2 / 3 * z, atol=1e-12)
    assert [tree.at(k).x.requires_grad for k in range(5)] == [False, False, False, True, True]
    words = [draw.prompts[r] for r in tree.leaves.row.tolist()]
    assert torch.allclose(data.total, Worded()(collector.pipeline.decode(tree.leaves.x, cond), words))
    assert (
        collector.policy.ledger.evaluations == 6 * STEPS + 6 * 4 + 6 * STEPS
    )  # a chain, a part of one; the test's own


def test_partial_chain_of_data() -> None:
    """Data start from each prompt's own medium; a prompt without one is named."""
    media = [torch.full((3, 2, 2), v, dtype=F64) for v in (0.2, 0.8)]
    source = Prompts([Prompt("a", {"media": media[0]}), Prompt("b", {"media": media[1]})])
    collector, _, draw = bench(InstructVideo(start="data"), source=source)
    data, _ = grow(collector, draw, 0, Tape(0))
    tree = data.trajectory
    z = (tree.at(0).x - tree.times[0] * 0) / 1
    own = torch.stack([draw.meta[r]["media"] for r in tree.leaves.row.tolist()])
    noise = (z - (1 - tree.times[0]) * own) / tree.times[0]
    assert noise.abs().max() < 5 and abs(noise.mean()) < 0.5 and 0.6 < noise.std() < 1.4
    collector, _, draw = bench(InstructVideo(start="data"))
    with pytest.raises(ValueError, match=r"prompt 0 .* brings none"):
        grow(collector, draw, 0, Tape(0))


@pytest.mark.parametrize("t", [1.5, 0.0, -0.1])
def test_cut_wants_a_step(t: float) -> None:
    with pytest.raises(ValueError, match="leaves no step"):
        cut(torch.linspace(1, 0, 5), t)


# ------------------------------------------------------------------------------------------------ IPRO, Ctrl-U, R0


def test_kl_of_each_step() -> None:
    """In nats, by torch.distributions, summed over the taped steps; nothing at the base."""
    collector, parameters, draw = bench(IPRO(kl=1.0, noise=0.5, depth=2))
    for moved in (0.0, 0.05):
        for p in parameters:
            p.data = p.data + moved
        data, cond = grow(collector, draw, 0, collector.recipe.tape(0))
        kl = collector.recipe.objective(collector.policy, data, cond).terms["kl"]
        expected, grid = 0.0, data.trajectory.times.tolist()
        for k in (4, 5):
            nodes = data.trajectory.at(k)
            laws = []
            for role in ("current", "reference"):
                p = collector.policy.posterior(nodes.x, grid[k], cond[nodes.row], role)
                law = collector.recipe.kernel(nodes.x, p, grid[k], grid[k + 1])[0]
                laws.append(torch.distributions.Normal(law.mean, law.std))
            expected += torch.distributions.kl_divergence(*laws).flatten(1).sum(1).mean()
        assert torch.allclose(kl, torch.as_tensor(expected, dtype=F64), atol=1e-10)
    assert kl > 1e-3


def test_velocity_gap_of_each_step() -> None:
    """The other penalty: weight times the mean over the taped steps of the mean squared gap; nothing at the base."""
    collector, parameters, draw = bench(DRaFT(depth=3, kl=0.7))
    for moved in (0.0, 0.05):
        for p in parameters:
            p.data = p.data + moved
        data, cond = grow(collector, draw, 0, collector.recipe.tape(0))
        kl = collector.recipe.objective(collector.policy, data, cond).terms["kl"]
        gaps, grid = [], data.trajectory.times.tolist()
        for k in (3, 4, 5):
            nodes = data.trajectory.at(k)
            own, base = (
                collector.policy.posterior(nodes.x, grid[k], cond[nodes.row], role).velocity
                for role in ("current", "reference")
            )
            gaps.append(((own - base) ** 2).mean())
        assert torch.allclose(kl, 0.7 * torch.stack(gaps).mean(), atol=1e-12)
    assert kl > 1e-3 and abs(gaps[0] - gaps[2]) > 1e-5  # the steps differ, so that the mean is seen


def test_doubt_by_hand() -> None:
    """Two noisings that disagree weigh less; where they agree the loss is the plain one."""
    r = torch.tensor([0.2, 0.6, 0.2, 0.1], dtype=F64, requires_grad=True)  # samples A, B; then A, B again
    out = Doubted(2, 1.0, 0.3)(None, Grown(None, {}, r))
    loss = (0.8 + 0.8 + (0.4 + 0.9) * math.exp(-0.5)) / 4
    assert abs(out.terms["reward"] - loss) < 1e-12 and abs(out.terms["doubt"] - 0.3 * 0.25) < 1e-12
    with pytest.raises(ValueError, match="without a graph"):
        Doubted()(None, Grown(None, {}, r.detach()))


def test_noisings_share_the_time_and_differ_in_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ctrl-U compares: the same sample at the same time up to the latest, with two noises."""
    collector, _, draw = bench(CtrlU(count=2, latest=0.3))
    asked, whole = [], collector.policy.posterior
    monkeypatch.setattr(
        collector.policy, "posterior", lambda x, t, *a, **k: asked.append((x, t)) or whole(x, t, *a, **k)
    )
    grow(collector, draw, 0, Tape(0))
    clean = collector.sample(draw, collector.bind(draw), 0).leaves.x
    x, t = asked[STEPS]
    assert torch.equal(t[:6], t[6:]) and t.min() >= 0.02 and 0.2 < t.max() <= 0.3
    at = t.reshape(-1, 1, 1, 1)
    noise = (x - (1 - at) * clean.repeat(2, 1, 1, 1)) / at
    assert abs(noise.mean()) < 0.5 and 0.7 < noise.std() < 1.3 and (noise[:6] - noise[6:]).abs().mean() > 0.5


HELD = [
    DRaFT(ceiling=0.3), SRPO(**WORDS, ceiling=0.3), InstructVideo(ceiling=0.3), IPRO(kl=0.0, ceiling=0.3),
    R0(ceiling=0.3), CtrlU(ceiling=0.3),
]  # fmt: skip


@pytest.mark.parametrize("method", HELD, ids=lambda m: m.name)
def test_a_ceiling_reaches_the_loss(method) -> None:
    """Below it the reward is climbed, above it nothing is."""
    objective = method.recipe(torch.linspace(1, 0, STEPS + 1)).objective
    for value, slope in ((0.2, True), (0.4, False)):
        r = torch.full((2,), value, dtype=F64, requires_grad=True)
        loss = Doubted.forward if isinstance(objective, Doubted) else Backprop.forward
        (g,) = torch.autograd.grad(loss(objective, None, Grown(None, {}, r)).terms["reward"], r)
        assert (g < 0).all() if slope else (g == 0).all()


class FewSteps(Exact):
    """Two steps of an affine network in float64: what R0's optimum on a Gaussian can be reached with."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = nn.Linear(2, 2).double()
        nn.init.zeros_(self.denoiser.weight), nn.init.zeros_(self.denoiser.bias)
        self.prefix = copy.deepcopy(self.denoiser)

    def posterior(self, x, t, cond):
        net = self.denoiser if torch.is_grad_enabled() else self.prefix
        tt = torch.as_tensor(t, dtype=F64).reshape(-1, 1).expand(len(x), 1)
        gain = (1 - tt) * 0.04 / ((1 - tt) ** 2 * 0.04 + tt**2)
        scale, shift = net(torch.cat([tt, 1 - tt], 1)).reshape(-1, 2, 1, 1, 1).unbind(1)
        c = [z.reshape(-1, 1, 1, 1) for z in (gain, 1 - tt)]
        return self.process.posterior(x, t, x0=0.5 + c[0] * (x - c[1] * 0.5) + scale * (x - c[1] * 0.5) + shift)

    def decode(self, x, cond):
        return x + (x.clamp(0, 1) - x).detach()


class Near(Bright):
    """``-q (x - a)²/2``, a mean over coordinates."""

    def __call__(self, media, prompts, meta=None):
        return -2.0 * ((media - 0.7) ** 2).mean((1, 2, 3))  # q = 4


@pytest.mark.parametrize("hold", [0.0, 4.0])
def test_r0_holds_the_spread(hold: float) -> None:
    """Two steps, q = 4: with w = 4 samples go half-way to the reward and keep half their spread; with w = 0 none."""
    toy = FewSteps()
    z = torch.randn(512, 3, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    recipe = R0(hold=hold, eta=0.0).recipe(toy.times(2))
    policy, parameters = doubled(toy, recipe)
    options = replace(OPTIONS, iterations=60, steps=2, lr=5e-2, groups=1, size=32, max_grad_norm=1e3)

    def ends() -> torch.Tensor:
        with torch.enable_grad():
            return rollout(Policy(toy), recipe.kernel, toy.times(2), Nodes.enter(z), toy.encode(["a"] * 512),
                           noise=Noise(0), tape=Tape()).leaves.x.detach()  # fmt: skip

    before = ends()
    list(fit(toy, Scorer(toy, {"r": Near()}), Prompts(["a"]), recipe, options, policy=policy, parameters=parameters))
    after = ends()
    ratio = after.std() / before.std()
    goal = (hold * before.mean() + 4 * 0.7) / (hold + 4)
    assert abs(after.mean() - goal) < 0.01
    assert abs(ratio - hold / (hold + 4)) < (0.05 if hold else 0.2)  # the last bit of spread goes slowly


# -------------------------------------------------------------------------------------------------- linear adjoint


@pytest.mark.parametrize("kernel", [EulerMaruyama(Memoryless()), EulerMaruyama(FlowGrpo(0.7)), Ancestral(Ddim(1.0))])
@pytest.mark.parametrize("process", [Rectified(), cosine(0.02, 1.5)])
def test_linear_adjoint_is_exact_for_linear_velocities(kernel, process) -> None:
    """On N(m, c²) the products of slopes are the vector-Jacobian products, to round-off and without a network call."""
    world, times = Normal(0.3, 0.6, process), torch.linspace(1, 0, 9, dtype=F64)
    policy = Policy(world)
    policy.roles["reference"] = Weights([])
    z = torch.randn(4, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    tree = rollout(policy, kernel, times, Nodes.enter(z), noise=Noise(1))
    terminal = torch.randn(4, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    exact = lean_adjoint(policy, kernel, tree, terminal)
    paid = policy.ledger.evaluations
    linear = linear_adjoint(process, kernel, tree, terminal, 0.6)
    assert policy.ledger.evaluations == paid
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(exact, linear, strict=True))
    assert not torch.allclose(exact[2], linear_adjoint(process, kernel, tree, terminal, 0.9)[2], atol=1e-3)


def test_linear_adjoint_in_the_limit() -> None:
    """Small memoryless steps: a_t = (1-t) c²/((1-t)² c² + t²) a_K, the published closed form (c = 1)."""
    for c in (1.0, 0.5):
        grid = torch.linspace(1, 0, 4001, dtype=F64)
        down = slopes(Rectified(), EulerMaruyama(Memoryless()), grid, c)
        for at in (1000, 2000, 3000):
            t = float(grid[at])
            assert abs(down[at:].prod() - (1 - t) * c**2 / ((1 - t) ** 2 * c**2 + t**2)) < 2e-3


def test_linear_adjoint_of_the_samples_own_spread() -> None:
    """Without a given spread it is that of the finished samples; truncation and the wrong input do what they say."""
    collector, _, draw = bench(AdjointMatching(scale=2.0, solver="linear", truncate=3))
    e = collect(collector, draw, 0)
    out = collector.recipe.credit(e)
    leaves = e.trajectory.leaves
    spread = float(leaves.x.std(0, correction=0).mean())
    terminal = -2.0 * reward_gradient(e.judge, leaves.x, leaves.row)
    by_hand = linear_adjoint(Rectified(), collector.recipe.kernel, e.trajectory, terminal, spread)
    assert [a is None for a in out] == [True] * 3 + [False] * 4
    assert all(torch.equal(a, b) for a, b in zip(out[3:], by_hand[3:], strict=True))
    with pytest.raises(ValueError, match="must be positive"):
        linear_adjoint(Rectified(), collector.recipe.kernel, e.trajectory, terminal, 0.0)


@pytest.mark.parametrize("truncate", [None, 3])
def test_training_pairs_each_step_with_the_adjoint_after_it(truncate: int | None) -> None:
    """In the minibatches of a run: the step from x_k carries a_{k+1} of its own sample, and -λ ∇r at the very end."""
    collector, _, draw = bench(AdjointMatching(scale=2.0, truncate=truncate))
    e = collect(collector, draw, 0)
    tree, leaves = e.trajectory, e.trajectory.leaves
    a = [-2.0 * reward_gradient(e.judge, leaves.x, leaves.row)]
    for k in range(STEPS - 1, -1, -1):
        x = tree.at(k).x.detach().requires_grad_()
        t, s = tree.times[k : k + 2].tolist()
        with collector.policy.playing("reference"):
            p = collector.policy.posterior(x, t, e.cond[tree.at(k).row])
        a = [torch.autograd.grad(collector.recipe.kernel(x, p, t, s)[0].mean, x, a[0])[0], *a]
    levels = []
    for part in minibatches(collector.recipe, collector, e, draw, replace(OPTIONS, batch=5), 0, 0):
        for x, level, weight in zip(part.data.x, part.data.level.tolist(), part.data.weight, strict=True):
            (mine,) = (tree.at(level).x == x).flatten(1).all(1).nonzero().flatten().tolist()
            assert torch.allclose(weight, a[level + 1][mine], atol=1e-12)
            levels.append(level)
    assert set(levels) == set(range(STEPS)[-(truncate or STEPS) :])
    assert len(levels) == 6 * len(set(levels)) and (a[STEPS] - a[STEPS - 1]).abs().max() > 1e-3


def test_noiseless_end() -> None:
    """The reward's gradient is taken at the mean of the base's last step, which the sample differs from by noise."""
    collector, _, draw = bench(AdjointMatching(scale=2.0, noiseless=True))
    e = collect(collector, draw, 0)
    tree, kernel = e.trajectory, collector.recipe.kernel
    t, s = tree.times[-2:].tolist()
    nodes = tree.at(STEPS - 1)
    mean = kernel(nodes.x, e.policy.posterior(nodes.x, t, e.cond[nodes.row]), t, s)[0].mean
    out = collector.recipe.credit(e)
    assert (mean - tree.leaves.x).abs().max() > 1e-3
    assert torch.allclose(out[-1], -2.0 * reward_gradient(e.judge, mean, nodes.row), atol=1e-12)


# ---------------------------------------------------------------------------------------------- learning and resuming

SMALL = {
    "srpo": SRPO(**WORDS, ceiling=None),
    "srpo-data-free": SRPO(**WORDS, ceiling=None, inversion=False, count=2),
    "instruct-video": InstructVideo(depth=2),
    "ipro": IPRO(kl=1e-3),
    "ctrl-u": CtrlU(),
    "r0": R0(hold=0.1),
    "nabla-db": NablaDB(scale=100.0, width=8),
    "nabla-db-forward": NablaDB(scale=100.0, flow=False, reverse=0.0, fraction=0.5, stay=0.1),
    "forward-looking": ForwardLooking(scale=100.0, width=8),
    "adjoint-linear": AdjointMatching(scale=100.0, solver="linear", noiseless=True),
}
RESTRAINED = {"mixed": (DRaFT(depth=2), Restraint(ceiling=0.9, mix=0.01, samples=2))}


def start(name: str, options: FitOptions = OPTIONS, **kwargs):
    toy = Toy()
    if name == "forward-looking":
        options = replace(options, lr=1e-2, iterations=max(options.iterations, 6) * 2)
    method, restraint = RESTRAINED.get(name, (SMALL.get(name), Restraint()))
    recipe = replace(method.recipe(toy.times(options.steps)), restraint=restraint)
    policy, parameters = prepare(toy, None, recipe.roles, old=recipe.old, ema=0.9)
    scorer = Scorer(toy, {"bright": Bright()})
    return toy, fit(toy, scorer, Prompts(["a"]), recipe, options, policy=policy, parameters=parameters, **kwargs)


@pytest.mark.parametrize("name", [*SMALL, *RESTRAINED])
def test_learns(name: str) -> None:
    """On the same noises the trained policy's rewards beat the base's by more than 5 standard errors, paired."""
    toy, metrics = start(name)
    before = judged(toy)
    list(metrics)
    gain = judged(toy) - before
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5 and gain.mean() > 0.005, gain.mean()


@pytest.mark.parametrize("name", [*SMALL, *RESTRAINED])
def test_resumes_bitwise(name: str, tmp_path: Path) -> None:
    """Known noises, wordings, strata, noisings, mixes and residual flows are functions of (seed, iteration)."""
    o = replace(OPTIONS, iterations=4, checkpoint_every=1, size=4, groups=2)
    whole, metrics = start(name, o, folder=tmp_path / "a")
    list(metrics)
    _, metrics = start(name, o, folder=tmp_path / "b")
    next(metrics), next(metrics)
    metrics.close()
    cut_short, metrics = start(name, o, folder=tmp_path / "b", resume=True)
    list(metrics)
    assert checkpoint.latest(tmp_path / "a").name == checkpoint.latest(tmp_path / "b").name
    for p, q in zip(whole.denoiser.parameters(), cut_short.denoiser.parameters(), strict=True):
        assert torch.equal(p, q)
    a, b = (checkpoint.load(checkpoint.latest(tmp_path / n))["objective"] for n in "ab")
    assert repr(a) == repr(b)


class Film(Exact):
    """Four frames that fade: a video for the price of a picture."""

    modality = "video"

    def decode(self, x, cond):
        still = super().decode(x, cond)
        return torch.stack([f * still for f in (1.0, 0.9, 0.8, 0.7)], 1)


class Picture(Bright):
    """Brightness, bent, so that frames differ in their gradient."""

    def __call__(self, media, prompts, meta=None):
        return torch.sin(3 * media).mean((1, 2, 3))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_image_reward_on_a_video(rate: float) -> None:
    """InstructVideo's own reward: two of four frames, attenuated in time; its gradient through the partial chain."""
    from flowalign.rewards.frames import FrameReward

    reward = FrameReward(Picture(), segments=4, rate=rate, draw="middle")
    collector, parameters, draw = bench(InstructVideo(depth=2), Film(), reward)
    data, _ = grow(collector, draw, 0, Tape(0))
    frames = collector.pipeline.decode(data.trajectory.leaves.x, None)
    each = torch.stack([torch.sin(3 * f).mean((1, 2, 3)) for f in frames.unbind(1)], 1)
    weights = torch.exp(-rate * torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=F64))
    assert torch.allclose(data.total, (each * weights).mean(1), atol=1e-6)
    slope, gap = slope_gap(lambda: grown_loss(collector, draw), parameters)
    assert abs(slope) > 1e-3 and gap < 1e-7
