"""Proofs of the gradient family: fixed points and biases in closed form, checkpoints inside real loops, truncation.

Closed forms are those of the reference notes (A7): prior N(m, S), reward r, temperature 1/λ, this project's own chains.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from flowalign import minibatch
from flowalign.adjoint import lean_adjoint, reward_gradient
from flowalign.fit import fit
from flowalign.kernels import EulerMaruyama, Kernel
from flowalign.laws import Memoryless, NoiseLaw
from flowalign.meter import Meter
from flowalign.methods.draft import DRaFT, depth_law
from flowalign.noise import Noise, NoiseSource
from flowalign.objectives import AdjointMatching
from flowalign.options import FitOptions
from flowalign.pipelines import Handover, load
from flowalign.policy import Policy, Weights
from flowalign.prepare import Lora, prepare
from flowalign.process import Posterior, Process, Time
from flowalign.rollout import Tape, rollout
from flowalign.scorer import Scorer
from flowalign.source import Prompts
from flowalign.trajectory import Nodes
from tests.toy import Bright, Toy
from tests.worlds import F64, Normal, chain, cosine, output, riccati
from tests.zoo import build

WORLD, LAM, SLOPE = Normal(0.5, 0.7**0.5), 1.3, 0.8


def grid(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=F64)


# -- closed forms ----------------------------------------------------------------------------------------------------
class Affine(nn.Module):
    """The Gaussian world plus ``a_k x + b_k`` in the velocity of each step: all that a quadratic reward needs."""

    def __init__(self, times: Tensor, world: Normal = WORLD) -> None:
        super().__init__()
        self.world, self.process = world, world.process
        self.times, self.law = times, nn.Parameter(torch.zeros(len(times) - 1, 2, dtype=F64))

    def posterior(self, x: Tensor, t: Time, cond: object = None) -> Posterior:
        times = torch.as_tensor(t, dtype=F64).reshape(-1).expand(len(x))
        a, b = self.law[(times[:, None] - self.times[:-1]).abs().argmin(1)].unbind(1)
        return self.process.posterior(x, t, v=self.world.posterior(x, t).velocity + a[:, None] * x + b[:, None])

    def links(self, kernel: Kernel, times: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the samples, exactly."""
        world = replace(self.world)
        object.__setattr__(world, "posterior", lambda x, t, cond=None: self.posterior(x, t))
        with torch.no_grad():
            return output(world, chain(world, kernel, times), 1.0)


class Whitened(NoiseSource):
    """Noises whose sample mean is exactly 0 and covariance exactly 1, across levels too: regressions are exact."""

    def __init__(self, n: int, levels: int) -> None:
        z = torch.randn(n, levels + 1, dtype=F64, generator=torch.Generator().manual_seed(0))
        z = z - z.mean(0)
        self.z = torch.linalg.qr(z)[0] * n**0.5

    def normal(self, level: int, row: Tensor, slot: Tensor, shape: object) -> Tensor:
        return self.z[:, level + 1 : level + 2]

    def uniform(self, level: int, row: Tensor, slot: Tensor, shape: object) -> Tensor:
        raise AssertionError("nothing here is uniform")


def regress(kernel: Kernel, times: Tensor, score, rounds: int) -> tuple[Tensor, Tensor]:
    """Iterate Adjoint Matching to its population fixed point: Newton on a loss quadratic in each step's (a, b)."""
    net, steps = Affine(times), len(times) - 1
    policy, noise = Policy(net, {"reference": Weights([net.law])}), Whitened(64, steps)
    for _ in range(rounds):
        tree = rollout(policy, kernel, times, Nodes.enter(noise.z[:, :1]), noise=noise)
        a = lean_adjoint(policy, kernel, tree, -LAM * reward_gradient(score, tree.leaves.x, tree.leaves.row))
        loss = AdjointMatching(kernel)(policy, tree.transitions([None, *a[1:]])).terms["adjoint"]
        (g,) = torch.autograd.grad(loss, net.law, create_graph=True)
        rows = [torch.autograd.grad(g[:, i].sum(), net.law, retain_graph=True)[0] for i in (0, 1)]
        net.law.data -= torch.linalg.solve(torch.stack(rows, 1), g.detach()[..., None])[..., 0]
    return net.links(kernel, times)


@pytest.mark.parametrize(("steps", "limit"), [(20, 0.06), (40, 0.03)])
def test_quadratic_fixed_point(steps: int, limit: float) -> None:
    """Adjoint Matching's fixed point for r = -.45 (x - 2)²: the chain's tilted mean, its variance to O(1/K)."""
    kernel, times = EulerMaruyama(Memoryless()), grid(steps)
    mean, var = regress(kernel, times, lambda x, row: -0.45 * (x[:, 0] - 2) ** 2, 30)
    base_mean, base_var = output(WORLD, chain(WORLD, kernel, times), 1.0)
    p = LAM * 0.9
    want_var = 1 / (1 / base_var + p)
    want_mean = want_var * (base_mean / base_var + p * 2)
    value = riccati(chain(WORLD, kernel, times), p, 2 * p)[0]  # what the initial noise decides is not steered
    assert abs(mean - want_mean) < 5e-4 + abs(value.p) and abs(var / want_var - 1) < limit
    assert var > want_var  # the kernel's own variance is fixed


class Part(NoiseLaw):
    """A share f of the memoryless noise."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, process: Process, t: Time, s: Time) -> Tensor:
        return self.share * Memoryless()(process, t, s)


@pytest.mark.parametrize(("share", "golden", "steps"), [(0.5, 0.720, 400), (1.0, 0.728, 100)])
def test_value_function_bias(share: float, golden: float, steps: int) -> None:
    """With a share of the memoryless noise the mean moves by λc (S - Cov(X_0, X_1)²): .728, the tilt, only with all.

    Smaller shares converge as slowly as h^(f²): .25 still is at .42 of its .475 with 400 steps, and is left out.
    """
    kernel, times = EulerMaruyama(Part(share)), grid(steps)
    mean, _ = shifted(kernel, times)
    base_mean, base_var = output(WORLD, chain(WORLD, kernel, times), 1.0)
    memory = torch.stack([link.A for link in chain(WORLD, kernel, times)]).prod()
    assert abs(mean - base_mean - LAM * SLOPE * (base_var - memory**2)) < 1e-9
    assert abs(mean - base_mean - golden) < 0.015


def test_adjoint_matching_of_a_diffusion_model() -> None:
    """Not flows alone: on a variance-preserving process the optimum is the chain's own tilt too, and a_k misses it."""
    world = Normal(0.5, 0.7**0.5, cosine(0.02, 1.5))
    kernel, times = EulerMaruyama(Memoryless()), grid(40)
    links = chain(world, kernel, times)
    base_mean, base_var = output(world, links, 1.0)
    memory = torch.stack([link.A for link in links]).prod() ** 2 * world.moments(torch.ones((), dtype=F64))[1]
    tilt = base_mean + LAM * SLOPE * (base_var - memory)
    assert abs(shifted(kernel, times, world)[0] - tilt) < 1e-9
    assert abs(shifted(kernel, times, world, early=True)[0] - tilt) > 0.01


def shifted(kernel: Kernel, times: Tensor, world: Normal = WORLD, early: bool = False) -> tuple[Tensor, Tensor]:
    """Adjoint Matching's optimum for a linear reward: one Newton step on each step's offset; ``early`` pairs a_k."""
    net = Affine(times, world)
    policy = Policy(net, {"reference": Weights([net.law])})
    z = torch.randn(4, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    tree = rollout(policy, kernel, times, Nodes.enter(z), noise=Noise(0))
    a = lean_adjoint(policy, kernel, tree, -LAM * reward_gradient(lambda x, r: SLOPE * x[:, 0], tree.leaves.x, z))
    loss = AdjointMatching(kernel)(policy, tree.transitions([None, *(a[:-1] if early else a[1:])])).terms["adjoint"]
    (g,) = torch.autograd.grad(loss, net.law, create_graph=True)
    (h,) = torch.autograd.grad(g[:, 1].sum(), net.law, retain_graph=True)
    net.law.data[:, 1] -= g[:, 1].detach() / h[:, 1]
    return net.links(kernel, times)


# -- checkpoints in the loops of real pipelines ----------------------------------------------------------------------
@pytest.mark.parametrize(("name", "eta"), [("StableDiffusion3", 0.0), ("StableDiffusion", 1.0), ("Wan", 0.0)])
def test_checkpoints_change_no_bit_in_a_pipelines_loop(name: str, eta: float) -> None:
    """Guidance on, the pipeline's own scheduler with its state, noise where it draws some: the same LoRA gradients."""
    case = build(name)
    case.pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in case.inputs.items() if k not in ("prompt", "guidance_scale_2")}
    pipe = load(case.pipe, call, guided=True, check=False)
    policy, parameters = prepare(pipe, Lora(rank=2, alpha=2))
    for p in parameters:  # B starts at zero, and then A hears nothing
        p.data = p.data + 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    cond = pipe.encode(["a red circle", "two blue squares"])
    times = pipe.times(4)
    z = torch.randn(2, *pipe.shape(cond), generator=torch.Generator().manual_seed(1))
    kernel = Handover(pipe) if not eta else EulerMaruyama(Memoryless())
    grads = []
    for again in (False, True):
        start = Nodes.enter(pipe.start(z, float(times[0]), cond), torch.arange(2))
        tree = rollout(policy, kernel, times, start, cond, noise=Noise(0), tape=Tape(0, checkpoint=again))
        r = (tree.leaves.x.square() * torch.linspace(0, 1, tree.leaves.x.shape[-1])).sum()
        grads.append([tree.leaves.x.detach(), *torch.autograd.grad(r, parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert sum(bool(g.any()) for g in grads[0]) > len(grads[0]) / 2


# -- truncation and bytes --------------------------------------------------------------------------------------------
def test_each_iterations_truncation_is_one_suffix_for_all_its_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is really taped, seen at the network: a suffix of the steps, drawn anew per iteration."""
    seen: list[tuple[int, ...]] = []
    whole = minibatch.grow

    def spy(collector, draw, iteration, tape):
        data, cond = whole(collector, draw, iteration, tape)
        nodes = data.trajectory.levels
        seen.append(tuple(k for k in range(len(nodes)) if nodes[k] is not None and nodes[k].x.requires_grad))
        return data, cond

    monkeypatch.setattr(minibatch, "grow", spy)
    toy, steps = Toy(), 10
    method = DRaFT(mode="random", eta=1.0)
    policy, parameters = prepare(toy, None)
    o = FitOptions(iterations=30, groups=4, size=2, steps=steps, batch=2, accumulate=0, lr=1e-4)
    scorer = Scorer(toy, {"b": Bright()})
    list(fit(toy, scorer, Prompts(["a"]), method.recipe(toy.times(steps)), o, policy=policy, parameters=parameters))
    assert len(seen) == 30 * 4
    law = depth_law("random", 1, steps, 0)
    for i in range(30):
        (kept,) = set(seen[4 * i : 4 * i + 4])  # one draw for the four microbatches
        assert kept == tuple(range(steps - law(i) + 1, steps + 1))  # states after the taped steps, to the last
    assert len(set(seen)) > 2


def test_depths_follow_alignprops_law() -> None:
    """Chi-squared of 4000 draws of N(42, 5) rounded, inside [1, 49]."""
    from scipy.stats import chisquare, norm

    law = depth_law("random", 1, 50, seed=5)
    firsts = torch.tensor([50 - law(i) for i in range(4000)])
    edges = [0.5, *[k + 0.5 for k in range(33, 49)], 49.5]
    p = torch.tensor([norm.cdf(b, 42, 5) - norm.cdf(a, 42, 5) for a, b in pairwise(edges)])
    count = torch.histogram(firsts.float(), torch.tensor(edges)).hist
    assert chisquare(count.numpy(), (p / p.sum() * 4000).numpy().astype("float64"), sum_check=False).pvalue > 1e-3


def test_peak_bytes_are_flat_per_taped_step_with_checkpoints() -> None:
    """Live bytes at the worst moment: independent of the untaped prefix; K more steps cost K inputs, not K networks."""

    def peak(steps: int, last: int, again: bool) -> int:
        toy = Toy()
        toy.denoiser = nn.Sequential(nn.Linear(13, 512), nn.Tanh(), nn.Linear(512, 12))
        policy, parameters = prepare(toy, None)
        z = torch.randn(256, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        with Meter() as meter:
            leaves = rollout(
                policy, EulerMaruyama(), toy.times(steps), Nodes.enter(z), toy.encode(["a"] * 256), noise=Noise(0),
                tape=Tape(steps - last, again),
            ).leaves.x  # fmt: skip
            torch.autograd.grad(leaves.sum(), parameters)
            return meter.peak

    state = 256 * 12 * 4
    for again in (False, True):
        longer = peak(16, 2, again) - peak(8, 2, again)
        assert longer <= 8 * 4 * state  # the eight states more that the trajectory holds, and their bookkeeping
    network = 256 * 512 * 4
    plain, thin = ((peak(16, 8, c) - peak(16, 2, c)) / 6 for c in (False, True))
    assert plain > network and thin < 0.25 * network


def test_the_lean_adjoint_holds_the_graph_of_one_step() -> None:
    """Four times the steps cost their adjoints, not their networks."""
    state, network = 256 * 12 * 4, 256 * 512 * 4

    def peak(steps: int) -> int:
        toy = Toy()
        toy.denoiser = nn.Sequential(nn.Linear(13, 512), nn.Tanh(), nn.Linear(512, 12))
        policy, _ = prepare(toy, None, ("reference",))
        z = torch.randn(256, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        cond, kernel = toy.encode(["a"] * 256), EulerMaruyama(Memoryless())
        tree = rollout(policy, kernel, toy.times(steps), Nodes.enter(z), cond, noise=Noise(0))
        with Meter() as meter:
            lean_adjoint(policy, kernel, tree, z, cond)
            return meter.peak

    short, long = peak(4), peak(16)
    assert short > network and long - short <= 2 * 12 * state < network
