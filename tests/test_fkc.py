"""Feynman-Kac correctors on worlds where the product of experts is known: evidence, moments, and what CFG misses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from flowalign.kernels import Ancestral, EulerMaruyama, Kernel
from flowalign.laws import Constant, Ddim, Memoryless
from flowalign.methods import fkc
from flowalign.methods.base import Task
from flowalign.methods.fkc import FKC, Blend, Corrected, Corrector, Experts, Product
from flowalign.noise import Stream
from flowalign.policy import Policy
from flowalign.process import Posterior, Rectified
from flowalign.rollout import rollout
from flowalign.selection import Resample
from flowalign.source import Draw
from flowalign.trajectory import Nodes
from tests.test_steering import Judge, Rows1
from tests.worlds import F64, ExactReverse, Normal, cosine

BROAD, NARROW = Normal(0.2, 0.9), Normal(0.9, 0.5)
TIMES = torch.linspace(1, 0, 6, dtype=F64)


@dataclass(frozen=True)
class Known(Posterior):
    """A posterior that says whose it is, so that a kernel can be exact."""

    world: Normal = BROAD


class Two:
    """A generator with two conditions: 1 is the narrow world, 0 the broad one."""

    process = Rectified()

    def posterior(self, x, t, cond):
        world = NARROW if int(cond[0]) else BROAD
        p = world.posterior(x, t)
        return Known(p.x0, p.eps, p.process, p.t, world=world)


@dataclass(frozen=True)
class Exact(Kernel):
    """``p(x_s | x_t)`` of the world that the posterior names."""

    def __call__(self, x, posterior, t, s, carry=None):
        return ExactReverse(posterior.world)(x, posterior, t, s)

    def stochastic(self, t, s):
        return True


def target(powers: dict[Normal, float]) -> tuple[float, float, float]:
    """Mean, standard deviation and log mass of ``Π q^β`` at data time."""
    precision = sum(b / w.std**2 for w, b in powers.items())
    mean = sum(b * w.mean / w.std**2 for w, b in powers.items()) / precision
    log_z = sum(-b * (0.5 * math.log(2 * math.pi * w.std**2) + 0.5 * w.mean**2 / w.std**2) for w, b in powers.items())
    log_z += 0.5 * math.log(2 * math.pi / precision) + 0.5 * precision * mean**2
    return mean, precision**-0.5, log_z


CASES = {
    "guidance": ({NARROW: 2.0, BROAD: -1.0}, (2.0, -1.0)),
    "strong guidance": ({NARROW: 4.0, BROAD: -3.0}, (4.0, -3.0)),
    "product": ({NARROW: 0.7, BROAD: 0.6}, (0.7, 0.6)),
    "anneal": ({NARROW: 1.7}, (1.7,)),
    "flatten": ({NARROW: 0.6}, (0.6,)),
}


def run(powers: tuple[float, ...], n: int, runs: int, threshold: float = 0.5, corrected: bool = True, seed: int = 0):
    """Run many independent systems of n particles in one batch."""
    conds = (torch.ones(runs, dtype=torch.long), torch.zeros(runs, dtype=torch.long))[: len(powers)]
    experts, kernel = Experts(Policy(Two()), conds, powers), Product(Exact())
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(runs * n, 1, dtype=F64, generator=g) / sum(powers) ** 0.5
    row = torch.arange(runs).repeat_interleave(n)
    slots = {"value": Corrector(kernel, TIMES), "potential": Corrected(), "select": Resample("systematic", threshold)}
    return rollout(
        Policy(experts), kernel, TIMES, Nodes.enter(x, row), torch.arange(runs), noise=Stream(g), n_rows=runs,
        **(slots if corrected else {}),
    )  # fmt: skip


@pytest.mark.parametrize("n", [2, 4, 16])
@pytest.mark.parametrize("name", CASES)
def test_the_evidence_of_a_product_is_unbiased(name: str, n: int) -> None:
    """E[Ẑ] = ∫ Π q^β, and weighted moments are those of the product."""
    powers, beta = CASES[name]
    mean, std, log_z = target(powers)
    runs = 12_000 // n
    for threshold in (0.0, 0.5, 2.0):
        tree = run(beta, n, runs, threshold)
        ratio = (tree.log_evidence() - log_z).exp()
        error = ratio.std() / runs**0.5
        assert abs(ratio.mean() - 1) < 4 * error and error < 0.04, (ratio.mean(), error)
        w, x = tree.weights().reshape(runs, n) * ratio[:, None], tree.leaves.x.reshape(runs, n)
        for moment, exact in ((x, mean), ((x - mean) ** 2, std**2)):
            run_sum = (w * (moment - exact)).sum(1)
            assert abs(run_sum.mean()) < 4 * run_sum.std() / runs**0.5


def test_plain_guidance_samples_something_else() -> None:
    """The sum of scores without weights ends elsewhere: here .07 from the product's mean and a tenth too narrow."""
    mean, std, _ = target(CASES["strong guidance"][0])
    x = run((4.0, -3.0), 2, 10_000, corrected=False).leaves.x
    error = x.std() / len(x) ** 0.5
    assert abs(x.mean() - mean) > 8 * error or abs(x.std() / std - 1) > 0.05


def test_the_weight_of_guidance_by_hand() -> None:
    """``w (w - 1) |m_c - m_∅|² / 2 std²`` for equal stds, with the mean of the summed scores."""
    kernel = Product(EulerMaruyama(Constant(0.6)))
    x, row = torch.randn(7, 3, dtype=F64), torch.arange(7)
    conds = (torch.ones(7, dtype=torch.long), torch.zeros(7, dtype=torch.long))
    blend = Experts(Policy(Two()), conds, (2.5, -1.5)).posterior(x, 0.6, row)
    law, log_w = kernel.factors(x, blend, 0.6, 0.5)
    c, u = (kernel.inner(x, w.posterior(x, 0.6), 0.6, 0.5)[0] for w in (NARROW, BROAD))
    assert torch.allclose(law.mean, 2.5 * c.mean - 1.5 * u.mean) and torch.allclose(law.std, c.std.expand_as(x))
    assert torch.allclose(log_w, 2.5 * 1.5 * ((c.mean - u.mean) ** 2).sum(1) / (2 * c.std**2))


def test_annealing_needs_no_more_than_it_has() -> None:
    """A product that cannot be normalised is refused, with the powers and the time."""
    kernel, x = Product(EulerMaruyama(Constant(0.6))), torch.zeros(2, 1, dtype=F64)
    blend = replace(
        Experts(Policy(Two()), (torch.ones(2, dtype=torch.long),), (1.0,)).posterior(x, 0.6, torch.arange(2)),
        parts=((-1.0, NARROW.posterior(x, 0.6)),),
    )
    with pytest.raises(ValueError, match=r"powers \[-1.0\] has no mass"):
        kernel.factors(x, blend, 0.6, 0.5)


def task(prompts: int, slopes: torch.Tensor) -> Task:
    """A task whose prompts say which world they want; the empty prompt is the broad one."""

    class Cond(Rows1):
        def __init__(self, kind):
            super().__init__(len(kind))
            self.kind = kind

        def __getitem__(self, index):
            return Cond(self.kind[index])

    class World(Two):
        def posterior(self, x, t, cond):
            p, q = (w.posterior(x, t) for w in (NARROW, BROAD))
            pick = cond.kind[:, None].bool()
            return Posterior(torch.where(pick, p.x0, q.x0), torch.where(pick, p.eps, q.eps), self.process, t)

    judge = Judge(slopes)
    judge.cond = Cond(torch.ones(prompts, dtype=torch.long))
    pipeline = SimpleNamespace(
        shape=lambda c: (1,), start=lambda z, t, c: z.double(),
        encode=lambda texts, meta: Cond(torch.zeros(len(texts), dtype=torch.long)),
    )  # fmt: skip
    draw = Draw(
        ["p"] * prompts, [{}] * prompts, torch.arange(prompts), tuple(range(prompts)),
        torch.ones(prompts, dtype=torch.long),
    )  # fmt: skip
    return Task(pipeline, Policy(World()), judge, draw, torch.linspace(1, 0, 31, dtype=F64), 0)


def test_the_method_reaches_guidance_tilted_by_a_reward() -> None:
    """The row of the table: weighted particles of the method against ``q_∅^{-1/2} q_c^{3/2} exp(λ r)``, 30 steps."""
    prompts, slope, lam = 60, 0.6, 0.5
    t = task(prompts, torch.full((prompts,), slope, dtype=F64))
    method = FKC(weight=1.5, particles=8, scale=lam)
    found = next(method.search(t))
    mean, std, log_z = target({NARROW: 1.5, BROAD: -0.5})
    tilted = mean + lam * slope * std**2
    log_z += lam * slope * mean + 0.5 * (lam * slope * std) ** 2
    w = found.trajectory.weights().reshape(prompts, 8)
    got = (w * found.x.reshape(prompts, 8)).sum(1)
    assert abs(got.mean() - tilted) < 4 * got.std() / prompts**0.5 + 0.02  # Euler's own error
    assert abs((found.log_z - log_z).exp().mean() - 1) < 0.06
    assert t.policy.ledger.evaluations == 2 * 30 * 8 * prompts  # each expert is asked once a step
    plain = next(replace(method, correct=False).search(t))
    assert plain.log_z is None and not plain.log_w.any()


def test_annealing_draws_the_power_and_claims_no_evidence() -> None:
    """``q^.7`` and its moments; its evidence would be .90 of the true one here, and .93 at any number of steps."""
    t = task(60, torch.zeros(60, dtype=F64))
    found = next(FKC(target="anneal", weight=0.7, particles=32).search(t))
    mean, std, _ = target({NARROW: 0.7})
    w, x = found.trajectory.weights().reshape(60, 32), found.x.reshape(60, 32)
    for got, exact in (((w * x).sum(1), mean), ((w * (x - mean) ** 2).sum(1), std**2)):
        assert abs(got.mean() - exact) < 4 * got.std() / 60**0.5 + 0.02
    assert found.log_z is None


@pytest.mark.parametrize(("aim", "weight", "total"), [("anneal", 0.7, 0.7), ("product", 0.65, 1.3)])
def test_noise_that_data_still_shows_through_starts_from_its_power(monkeypatch, aim, weight, total) -> None:
    """A variance-preserving process has α > 0 at its first time: standard normal data are N(0, 1) at every time there,
    so particles start from N(0, 1/Σβ) and Z is ``∫ N(0, 1)^Σβ = ((2π)^{(1 - Σβ) / 2} / √Σβ)^D``."""
    world, prompts, dims = Normal(0.0, 1.0, cosine()), 100, 2
    assert world.process(1.0)[0] > 0.05
    monkeypatch.setattr(fkc, "reversal", lambda process: ExactReverse(world))
    t = replace(task(prompts, torch.zeros(prompts, dtype=F64)), policy=Policy(world), times=TIMES)
    t.pipeline.shape = lambda c: (dims,)
    tree = next(FKC(target=aim, weight=weight, other="o", particles=8).search(t)).trajectory
    start = tree.levels[0].x
    assert start.var() * total == pytest.approx(1, abs=0.15)
    ratio = (tree.log_evidence() - dims * (0.5 * (1 - total) * math.log(2 * math.pi) - 0.5 * math.log(total))).exp()
    error = ratio.std() / prompts**0.5
    assert abs(ratio.mean() - 1) < 4 * error and error < 0.03


@dataclass(frozen=True)
class Mended(Kernel):
    """A kernel whose first and last tenth of steps are exact."""

    inner: Kernel

    def __call__(self, x, posterior, t, s, carry=None):
        return (self.inner if 0.1 < s < t < 0.9 else Exact())(x, posterior, t, s)

    def stochastic(self, t, s):
        return True


def expected(kernel: Kernel, beta: float, steps: int) -> float:
    """E[Ẑ] / Z of annealing the narrow world, in closed form.

    What particles at x gain from there on is ``E exp = exp(-P x²/2 + h x + g)``: weights are log-quadratic in x, steps
    affine with ``N(A x + B, S)``, and three states tell their coefficients.
    """
    product, x = Product(kernel), torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)
    P = h = g = 0.0
    for t, s in reversed([*pairwise(torch.linspace(1, 0, steps + 1).tolist())]):
        p = NARROW.posterior(x, t)
        known = Known(p.x0, p.eps, p.process, t, world=NARROW)
        law, log_w = product.factors(x, Blend(p.x0, p.eps, p.process, t, None, None, ((beta, known),)), t, s)
        low, B, high = law.mean.flatten().tolist()
        A, S = (high - low) / 2, float(law.std.flatten()[0]) ** 2
        r, (a, b, c) = 1 / (1 + P * S), log_w.tolist()
        g += b + r * (h * B - P * B**2 / 2 + h**2 * S / 2) + math.log(r) / 2
        P, h = P * r * A**2 - (a + c - 2 * b), r * A * (h - P * B) + (c - a) / 2
    log_z = 0.5 * h**2 / (beta + P) + g + 0.5 * math.log(beta / (beta + P))  # from the noise's power N(0, 1/β)
    return math.exp(log_z - target({NARROW: beta})[2])


@pytest.mark.parametrize(
    ("kernel", "beta", "at_30", "limit"),
    [
        (EulerMaruyama(Memoryless()), 0.7, 0.905, 0.928), (EulerMaruyama(Memoryless()), 1.3, 1.279, 1.210),
        (Ancestral(Ddim(1.0)), 0.7, 0.813, 0.837), (Ancestral(Ddim(1.0)), 1.3, 1.318, 1.300),
    ],
)  # fmt: skip
def test_finer_steps_leave_an_error_of_the_evidence(kernel: Kernel, beta: float, at_30: float, limit: float) -> None:
    """Where powers do not add up to one: the figures of docs/steering.md, and the outermost steps are the cause."""
    assert expected(Exact(), beta, 7) == pytest.approx(1, abs=1e-9)
    assert expected(kernel, beta, 30) == pytest.approx(at_30, abs=6e-4)
    assert expected(kernel, beta, 200) == pytest.approx(limit, abs=0.015)
    assert expected(Mended(kernel), beta, 200) == pytest.approx(1, abs=0.02)


def test_settings() -> None:
    for bad in ({"particles": 1}, {"weight": 0.0}):
        with pytest.raises(ValueError, match="particles >= 2 and weight > 0"):
            FKC(**bad)
    with pytest.raises(ValueError, match="second prompt"):
        next(FKC(target="product").search(task(1, torch.ones(1, dtype=F64))))
