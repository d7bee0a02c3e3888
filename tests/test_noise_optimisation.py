"""Noise as the variable: gradients through the sampler, optima in closed form, golden noise as a known linear map."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign.kernels import EulerMaruyama
from flowalign.ledger import Budget
from flowalign.methods.base import Task
from flowalign.methods.golden_net import GoldenNet, Pairs, Refine, fit_pairs
from flowalign.methods.golden_noise import GoldenNoise, collect, fresh, golden
from flowalign.methods.noise_penalties import norm_penalty, probability_penalty
from flowalign.methods.noise_search import play
from flowalign.methods.particles import noisy_kernel, rows_of
from flowalign.methods.reno import Climb, ReNO
from flowalign.noise import START, mix
from flowalign.policy import Policy
from flowalign.process import Posterior, Time
from flowalign.steer import SearchFailed, steer
from flowalign.valuenet import word_ids
from tests.searching import linear, slope, task
from tests.test_search import tuned
from tests.toy import Asked, Bright, Toy, ToyCondition
from tests.worlds import F64, Net, Normal, chain

SHAPE = (3, 2, 2)


def climb_of(method: ReNO, t: Task) -> Climb:
    """A climb in float64."""
    climb = Climb(method, rows_of(t, per_sample=True))
    for z in climb.noises.values():
        z.data = z.data.double()
    return climb


# -- the gradient ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("over", ["start", "all"])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_gradient_through_the_sampler(over: str, checkpoint: bool) -> None:
    """Reward and both penalties, differentiated through a network and every step, against finite differences."""
    torch.manual_seed(3)
    net = Net(dim=8).double()
    t = task(lambda x, r: torch.sin(2 * x).sum(1), 2, 2, shape=(8,), steps=5)
    method = ReNO(norm=0.3, probability=0.2, piece=2, orders=3, over=over, noise=0.7, checkpoint=checkpoint)
    climb = climb_of(method, replace(t, policy=Policy(_Bare(net))))
    assert sorted(climb.noises) == ([-1] if over == "start" else [-1, 0, 1, 2, 3, 4])

    def loss() -> Tensor:
        return (climb.penalty(0) - climb.play()[1]).sum()

    grads = torch.autograd.grad(loss(), list(climb.noises.values()))
    for (level, z), g in zip(climb.noises.items(), grads, strict=True):
        way, h = torch.randn_like(z), 1e-5
        z.data += h * way
        up = loss().detach()
        z.data -= 2 * h * way
        down = loss().detach()
        z.data += h * way
        assert g.norm() > 1e-3 and abs((g * way).sum() - (up - down) / (2 * h)) < 1e-7, level


class _Bare:
    """A network without conditions."""

    def __init__(self, net: Net) -> None:
        self.net, self.process = net, net.process

    def posterior(self, x: Tensor, t: Time, cond: object) -> Posterior:
        return self.net.posterior(x, t)


# -- the optimum -----------------------------------------------------------------------------------------------------
def radius(c: float, d: int) -> float:
    """Where the slope of a linear reward balances the norm term."""
    return (c + math.sqrt(c**2 + 4 * (d - 1))) / 2


def test_reno_reaches_the_optimum_in_closed_form() -> None:
    """Linear generator, two weighted linear rewards: the noise ends along the summed gradient at the known radius."""
    a, b = slope(SHAPE), slope(SHAPE).flip(0).roll(1, 1)
    rewards = {"a": lambda x, r: (x * a).flatten(1).sum(1), "b": lambda x, r: (x * b).flatten(1).sum(1)}
    t = task(rewards, samples=2, weights={"b": -0.5}, steps=3)
    climb = climb_of(ReNO(lr=0.05, clip=1e9, norm=0.5), t)
    for i in range(150):
        climb.step(i)
    gain = torch.stack([link.A for link in chain(Normal(0.5, 0.8), EulerMaruyama(), t.times)]).prod()
    way = gain * (a - 0.5 * b)
    exact = radius(float(way.norm()) / 0.5, 12) * way / way.norm()
    for z in climb.noises[START]:
        assert torch.allclose(z, exact, atol=2e-3)


def test_dno_reaches_the_optimum_of_every_noise() -> None:
    """In the stochastic sampler each noise has a gradient and so a radius of its own."""
    t = task(linear, steps=2)
    climb = climb_of(ReNO(lr=0.05, clip=1e9, norm=0.5, over="all", noise=0.7), t)
    for i in range(150):
        climb.step(i)
    links = chain(Normal(0.5, 0.8), noisy_kernel(t.policy.process, 0.7), t.times)
    for level, z in climb.noises.items():
        after = torch.stack([link.A for link in links[level + 1 :]] or [torch.tensor(1.0, dtype=F64)]).prod()
        way = (1.0 if level == START else float(links[level].std)) * after * slope(SHAPE)
        assert torch.allclose(z[0], radius(float(way.norm()) / 0.5, 12) * way / way.norm(), atol=2e-3), level


def test_adamw_climbs_too() -> None:
    """DNO's optimiser moves every climb up, for opposite prompts at once."""
    t = task(linear, prompts=2, samples=2)
    totals = [f.total for f in ReNO(15, "adamw", 0.05, 1.0, 0.0, over="all", noise=0.7).search(t)]
    assert (totals[-1] > totals[0] + 1).all()


# -- the penalties ---------------------------------------------------------------------------------------------------
def test_norm_penalty_is_the_density_of_the_radius() -> None:
    """The negative log-density of a chi variable up to a constant; least at √(d-1)."""
    from scipy.stats import chi

    z = torch.randn(6, 3, 5, dtype=F64) * torch.linspace(0.3, 3, 6, dtype=F64)[:, None, None]
    known = -torch.from_numpy(chi(15).logpdf(z.flatten(1).norm(dim=1).numpy()))
    gap = norm_penalty(z) - known
    assert torch.allclose(gap, gap[:1].expand(6), atol=1e-10)
    flat = (z / z.flatten(1).norm(dim=1)[:, None, None] * math.sqrt(14)).requires_grad_()
    assert torch.autograd.grad(norm_penalty(flat).sum(), flat)[0].abs().max() < 1e-12
    assert norm_penalty(z.half()).dtype == torch.float32  # -inf in half precision otherwise


def test_probability_penalty_by_hand() -> None:
    """Six coordinates in pieces of two: mean and second moment worked out with numpy; normal noise pays nothing."""
    import numpy as np

    z = torch.tensor([[3.0, 1.0, 2.0, 2.0, 4.0, 0.0, 9.9]], dtype=F64)
    order = torch.tensor([[1, 0, 2, 3, 5, 4, 6]])
    pieces = np.array([[1.0, 3.0], [2.0, 2.0], [0.0, 4.0]])
    m, k = 3, 2
    gap = np.linalg.norm(pieces.mean(0))
    spread = np.abs(np.linalg.eigvalsh(pieces.T @ pieces / m - np.eye(k))).max()
    parts = [
        min(math.log(2) - m * gap**2 / (2 * k), 0),
        min(math.log(2) - m * max(math.sqrt(1 + spread) - 1 - math.sqrt(k / m), 0) ** 2 / 2, 0),
    ]
    assert probability_penalty(z, 2, order)[0] == pytest.approx(-sum(parts)) and -sum(parts) > 3
    noise = torch.randn(20, 512, dtype=F64)
    orders = torch.stack([torch.randperm(512) for _ in range(8)])
    assert probability_penalty(noise, 4, orders).max() < 1
    assert probability_penalty(noise + 1, 4, orders).min() > 50
    assert probability_penalty(torch.full((1, 512), 1.0, dtype=F64), 4, orders) > 50
    repeated = torch.randn(1, 4, dtype=F64).repeat(1, 128)  # right radius, no independence
    assert probability_penalty(repeated * 2 / repeated[0, :4].norm(), 4, torch.arange(512)[None]) > 1


# -- the climb -------------------------------------------------------------------------------------------------------
def test_best_is_kept_and_counted() -> None:
    """Steps so large that rewards fall: what is yielded is the running maximum. Every product is booked."""
    t = task(lambda x, r: -((x - 1) ** 2).flatten(1).sum(1), samples=3)
    found = list(ReNO(12, lr=80.0, norm=0.0).search(t))
    asked = torch.stack([total for total, _ in t.judge.asked])
    assert (asked[-1] < asked.amax(0)).any()
    assert torch.equal(torch.stack([f.total for f in found]), asked.cummax(0).values)
    assert all((b.total >= a.total).all() for a, b in pairwise(found))
    ledger = t.policy.ledger
    assert (ledger.evaluations, ledger.gradients, ledger.rewards) == (12 * 3 * 8, 12 * 3 * 8, 12 * 3)


def test_clipping_is_by_sample() -> None:
    """The first step of Nesterov's SGD is 1.9 lr times the clipped gradient, for each sample by itself."""
    t = task(lambda x, r: linear(x, r) * torch.where(r == 0, 100.0, 1e-4), prompts=2)
    climb = climb_of(ReNO(lr=0.7, clip=0.1, norm=0.0), t)
    before = climb.noises[START].detach().clone()
    climb.step(0)
    moved = (climb.noises[START].detach() - before).flatten(1).norm(dim=1)
    assert moved[0] == pytest.approx(1.9 * 0.7 * 0.1) and 0 < moved[1] < 1e-3
    alone = climb_of(ReNO(lr=0.7, clip=0.1, norm=0.0), task(lambda x, r: linear(x, r) * 100.0))
    alone.step(0)
    assert torch.allclose(alone.noises[START][0], climb.noises[START][0], atol=1e-12)


def test_clipping_is_joint_over_the_noises() -> None:
    """DNO clips the gradient of all noises of a sample together, not the noise of each step by itself."""
    climb = climb_of(ReNO(lr=0.7, clip=0.1, norm=0.0, over="all", noise=0.7), task(linear, samples=2))
    before = {k: z.detach().clone() for k, z in climb.noises.items()}
    climb.step(0)
    moved = torch.stack([(z.detach() - before[k]).flatten(1).norm(dim=1) for k, z in climb.noises.items()])
    assert torch.allclose(moved.norm(dim=0), torch.full((2,), 1.9 * 0.7 * 0.1, dtype=F64))
    assert (moved > 0).sum() > 10


def test_optimise_in_few_steps_apply_in_more() -> None:
    """ReNO for distilled models: the best noise of the one-step climb is played by the run's own sampler."""
    t = task(linear, samples=2, steps=6)
    *steps, last = ReNO(5, steps=1).search(t)
    assert len(steps) == 5 and t.policy.ledger.evaluations == 2 * (5 * 1 + 6)
    climb = Climb(ReNO(5, steps=1), rows_of(replace(t, times=t.pipeline.times(1)), per_sample=True))
    best, noise = torch.full((2,), -torch.inf, dtype=F64), climb.noises[START].detach().clone()
    for i in range(5):
        total = climb.step(i).total
        won = total > best
        best[won], noise[won] = total[won], climb.before[START][won]
    assert torch.equal(last.x, play(rows_of(t, per_sample=True), noise, torch.arange(2)).x)


def test_bad_input() -> None:
    """A blind reward and a silent sampler are refused by name before anything is sampled."""
    t = task(linear, differentiable=False)
    with pytest.raises(ValueError, match="climbs the reward's gradient, and r gives none"):
        next(ReNO().search(t))
    assert t.policy.ledger.evaluations == 0
    with pytest.raises(ValueError, match=r"noise = 0\.0 draws none"):
        ReNO(over="all", noise=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        ReNO(norm=-1.0)


def test_partial_results_survive_an_infinite_gradient() -> None:
    """A gradient that overflows in the third step ends the climb; what the first two found is kept."""

    class Cliff(Bright):
        calls = 0

        def __call__(self, media, prompts, meta=None):
            Cliff.calls += 1
            r = super().__call__(media, prompts)
            return r + (r - r.detach()) ** 0.5 if Cliff.calls > 2 else r

    with pytest.raises(SearchFailed, match="gradient of the noise is not finite in step 2") as failed:
        steer(Toy(), ReNO(5), Cliff(), ["a"], samples=2, steps=3)
    assert torch.isfinite(failed.value.found.total).all() and failed.value.found.ledger.rewards == 6


@pytest.mark.parametrize("budget", ["60gradients", "70nfe", "14rewards"])
def test_budget_is_kept(budget: str) -> None:
    found = steer(Toy(), ReNO(50), Bright(), ["a", "c dark"], samples=2, steps=3, budget=budget)
    limit = Budget.parse(budget)
    assert 0.7 * limit.amount < found.ledger.spent(limit.unit) <= limit.amount and found.stopped == "budget"
    assert set(found.row.tolist()) == {0, 1} and torch.isfinite(found.total).all()


def test_noise_optimisation_on_a_fine_tuned_model() -> None:
    """The gradient flows through the adapter to the noise, and into no weight."""
    pipe, policy = tuned()
    before = [p.clone() for p in pipe.denoiser.parameters()]
    found = steer(pipe, ReNO(10), Bright(), ["a"], samples=2, steps=4, policy=policy)
    base = steer(Toy(), ReNO(10), Bright(), ["a"], samples=2, steps=4)
    first = steer(pipe, ReNO(1), Bright(), ["a"], samples=2, steps=4, policy=policy)
    assert (found.total > first.total).all() and not torch.allclose(found.total, base.total, atol=1e-3)
    assert all(torch.equal(p, q) and q.grad is None for p, q in zip(before, pipe.denoiser.parameters(), strict=True))


# -- golden noise ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Guided:
    """A Gaussian world whose guidance moves the posterior mean by a shift of the prompt's own."""

    world: Normal = Normal(0.5, 0.8)  # noqa: RUF009 - frozen

    @property
    def process(self):
        return self.world.process

    def posterior(self, x: Tensor, t: Time, cond: Asked) -> Posterior:
        known = self.world.posterior(x, t)
        push = torch.stack([shift_of(p) for p in cond.prompts]) if cond.guided else 0.0
        return self.process.posterior(x.double(), t, x0=known.x0 + push)


def shift_of(prompt: str) -> Tensor:
    return (1.0 if prompt == "p0" else -0.7) * torch.tensor([-0.5, 0.5, 1.0], dtype=F64)[:, None, None]


def guided_task(**settings) -> Task:
    t = task(linear, prompts=2, steps=4, **settings)
    t.judge.cond = Asked(t.judge.cond.prompts)
    return replace(t, policy=Policy(Guided(), ledger=t.policy.ledger))


def exact_golden(z: Tensor, prompts: list[str]) -> Tensor:
    """``z' = σ (α g + σ z) / V`` with V the variance at the first step's end."""
    (a, s), (_, var) = Guided().process(0.75), Normal(0.5, 0.8).moments(0.75)
    return s * (a * torch.stack([shift_of(p) for p in prompts]) + s * z) / var


def test_golden_noise_is_the_guidance_gap() -> None:
    """Down with guidance, up without: the closed form, at two evaluations each; without a gap there is nothing."""
    t = guided_task()
    rows = rows_of(t, per_sample=False)
    z, row = fresh(rows, 5, 3)
    z = z.double()
    out = golden(rows, z, row)
    assert torch.allclose(out, exact_golden(z, [t.draw.prompts[r] for r in row]), atol=1e-9)
    assert t.policy.ledger.evaluations == 20
    for cond in (t.judge.cond.bare(), ToyCondition(t.judge.cond.prompts)):
        with pytest.raises(ValueError, match="guidance tells a noise"):
            golden(replace(rows, cond=cond), z, row)


def test_golden_noise_is_the_noise_and_not_the_state() -> None:
    """Where a sampler starts from an affine map of the noise, what comes out is the noise again."""
    t = guided_task()
    rows = rows_of(replace(t, pipeline=_Started(t.pipeline)), per_sample=False)
    z, row = fresh(rows, 5, 3)
    out = golden(rows, z.double(), row)
    exact = exact_golden(2 * z.double() + 0.3, [t.draw.prompts[r] for r in row])
    assert torch.allclose(out, (exact - 0.3) / 2, atol=1e-9)


class _Started:
    """A pipeline whose first state is ``2 z + .3``."""

    def __init__(self, pipeline) -> None:
        self.shape, self.times, self.process = pipeline.shape, pipeline.times, pipeline.process

    def start(self, z: Tensor, t: float, cond: Asked) -> Tensor:
        return 2 * z.double() + 0.3


def test_network_recovers_a_known_linear_map(tmp_path: Path) -> None:
    """Trained on the pairs of a Gaussian world, the network is the known map, prompt by prompt; saved and read back
    it says the same; untrained it changes nothing."""
    t = guided_task()
    rows = rows_of(t, per_sample=False)
    z, row = fresh(rows, 300, 1)
    prompts = [t.draw.prompts[r] for r in row]
    pairs = Pairs(z, exact_golden(z, prompts).float(), prompts, torch.ones(len(z)))
    net = fit_pairs(pairs, Refine(width=16, lr=1e-2, epochs=25))
    new, row = fresh(rows, 100, 2)
    asked = [t.draw.prompts[r] for r in row]
    target = exact_golden(new, asked).float()
    before, after = (new - target).square().mean(), (net.refine(new, asked) - target).square().mean()
    assert after < 1e-3 * before
    net.save(tmp_path / "net.safetensors")
    assert torch.equal(GoldenNet.load(tmp_path / "net.safetensors").refine(new, asked), net.refine(new, asked))
    assert torch.equal(GoldenNet((3, 2, 2))(new, word_ids(asked)), new)
    (tmp_path / "wrong").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="no golden-noise network"):
        GoldenNet.load(tmp_path / "wrong")


def test_golden_noise_collects_trains_and_pays(tmp_path: Path) -> None:
    """Only pairs that gained are learnt from; all samples are candidates; a loaded network costs nothing extra."""
    file = tmp_path / "net.safetensors"
    t = guided_task(samples=2)
    tried, found = GoldenNoise(n=3, pairs=40, margin=0.9, save=str(file)).search(t)
    assert len(tried.row) == 2 * 80 and len(found.row) == 2 * 6
    # 40 noises per prompt: two evaluations for each golden one, four steps for each of both; then 6 results' candidates
    assert t.policy.ledger.evaluations == 2 * (40 * (2 + 8) + 6 * 4)
    rows = rows_of(t, per_sample=False)
    pairs, both = collect(rows, 40, 9)
    assert torch.equal(pairs.gain, both.total[80:] - both.total[:80]) and 0 < (pairs.gain > 0.9).sum() < 80
    fewer = pairs[(pairs.gain > 0.9).nonzero().flatten()]
    assert (fewer.gain > 0.9).all() and len(fewer.prompts) == len(fewer.noise) == len(fewer.golden)
    again = guided_task(samples=2)
    (found,) = GoldenNoise(n=3, network=str(file)).search(again)
    assert again.policy.ledger.evaluations == 2 * 6 * 4
    rows = rows_of(guided_task(samples=2), per_sample=False)
    z, row = fresh(rows, 6, mix(again.seed, 32))
    refined = GoldenNet.load(file).refine(z, [again.draw.prompts[r] for r in row.tolist()])
    assert torch.equal(found.total, play(rows, refined, row).total)
    assert not torch.allclose(found.total, play(rows, z, row).total, atol=1e-3)
    with pytest.raises(ValueError, match="no pair of noises gained"):
        list(GoldenNoise(pairs=2, margin=1e9).search(guided_task()))
