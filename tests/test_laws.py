"""Noise laws: published numbers, what each promises, and the soft value that only a memoryless chain has."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler
from worlds import F64, Normal, chain, cosine, riccati

from flowalign.kernels import EulerMaruyama
from flowalign.laws import (
    Clipped,
    Consistency,
    Constant,
    Cps,
    Ddim,
    FlowGrpo,
    Memoryless,
    NoiseLaw,
    Ode,
    Spatial,
    Table,
)
from flowalign.process import Karras, Rectified, VariancePreserving

RF = Rectified()
# SD3.5's grid with shift 3 in 10 steps, and what Flow-GRPO and Flow-CPS make of it (online_rl.md A.1)
SIGMA = torch.tensor([1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893, 0], dtype=F64)
GRPO = [3.5057, 3.4351, 2.2726, 1.7185, 1.3592, 1.0881, 0.8612, 0.6524, 0.4344, 0.0664]
GRPO_STD = [0.7000, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063]
CPS = [0.9131, 0.8686, 0.8157, 0.7517, 0.6727, 0.5727, 0.4421, 0.2644, 0.0085, 0]


def test_flow_grpo_and_cps_tables():
    t, s = SIGMA[:-1], SIGMA[1:]
    g = FlowGrpo(0.7)(RF, t, s)
    assert torch.allclose(g, torch.tensor(GRPO, dtype=F64), rtol=3e-4, atol=6e-5)
    assert torch.allclose(g * (t - s).sqrt(), torch.tensor(GRPO_STD, dtype=F64), rtol=5e-4, atol=6e-5)
    assert torch.allclose(Cps(0.8)(RF, t, s), torch.tensor(CPS, dtype=F64), atol=6e-5)
    assert float(FlowGrpo(0.7)(RF, 0.6, 0.45)) == pytest.approx(0.8573214099741122, abs=1e-15)
    assert FlowGrpo() == FlowGrpo(0.7) and Cps() == Cps(0.8) and Constant() == Constant(0.3)


def test_formulas():
    t, s = torch.tensor([0.6, 1.0], dtype=F64), torch.tensor([0.5, 0.8], dtype=F64)
    assert torch.equal(Ode()(RF, t, s), torch.zeros(2, dtype=F64))
    assert torch.equal(Constant(0.25)(RF, t, s), torch.full((2,), 0.25, dtype=F64))
    assert torch.allclose(Memoryless()(RF, t, s) ** 2, 2 * t / ((1 - t) + (t - s)))
    assert torch.equal(Consistency()(RF, t, s), s)
    assert torch.allclose(Cps(0.5)(cosine(), t, s), cosine()(s)[1] * math.sin(math.pi / 4))
    vp = cosine(0.1, 1.4)
    assert torch.allclose(Memoryless()(vp, t, s) ** 2, 2 * vp(t)[1] * 1.3 / vp(s)[0])
    k = Karras(4.0, 3.0)
    assert torch.allclose(Memoryless()(k, t, s) ** 2, 2 * k(t)[1] * k.rates(t)[1])
    assert torch.allclose(FlowGrpo(2**0.5)(RF, t[:1], s[:1]) ** 2, 2 * t[:1] / (1 - t[:1]))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_variance_is_diffusers(eta):
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    process = VariancePreserving.from_alphas_cumprod(scheduler.alphas_cumprod)
    for i, j in ((999, 949), (500, 480), (20, 0)):
        want = eta * scheduler._get_variance(i, j).sqrt()
        assert float(Ddim(eta)(process, (i + 1) / 1000, (j + 1) / 1000)) == pytest.approx(float(want), abs=1e-12)
    assert float(Ddim(eta)(process, 0.02, 0.0)) == 0.0
    assert Ddim() == Ddim(1.0)


def test_table():
    law = Table(torch.tensor([1.0, 0.6, 0.2]), torch.tensor([0.9, 0.5, 0.1]))
    t = torch.tensor([1.0, 0.8, 0.6, 0.3, 0.2, 0.05], dtype=F64)
    want = torch.tensor([0.9, 0.7, 0.5, 0.2, 0.1, 0.1], dtype=F64)
    assert torch.allclose(law(RF, t, t / 2), want, atol=1e-6)
    assert float(law(RF, 0.8, 0.6)) == pytest.approx(0.7, abs=1e-6)
    alone = Table(torch.tensor([0.5]), torch.tensor([0.4]))
    assert torch.allclose(alone(RF, t, t / 2), torch.full((6,), 0.4, dtype=F64), atol=1e-6)
    state = law.state_dict()
    law.values += 1
    assert float(law(RF, 0.6, 0.5)) == pytest.approx(1.5, abs=1e-6)
    law.load_state_dict(state)
    assert float(law(RF, 0.6, 0.5)) == pytest.approx(0.5, abs=1e-6) and law.values.dtype == F64
    for times, values in (([0.2, 0.6], [1.0, 1.0]), ([0.6, 0.6], [1.0, 1.0]), ([0.6, 0.2], [1.0])):
        with pytest.raises(ValueError, match="falling times and as many values"):
            Table(torch.tensor(times), torch.tensor(values))


def test_spatial_and_clipped():
    space = torch.rand(1, 1, 4, 4, dtype=F64)
    law = Spatial(FlowGrpo(0.7), space)
    assert torch.allclose(law(RF, 0.6, 0.5), space * FlowGrpo(0.7)(RF, 0.6, 0.5))
    t, s = torch.tensor([0.6, 0.9], dtype=F64), torch.tensor([0.5, 0.6], dtype=F64)
    each = law(RF, t, s)
    assert each.shape == (2, 1, 4, 4) and torch.allclose(each[1:], space * FlowGrpo(0.7)(RF, 0.9, 0.6))
    clipped = Clipped(FlowGrpo(0.7), 0.45)
    g = clipped(RF, t, s) * (t - s).sqrt()
    free = FlowGrpo(0.7)(RF, t, s) * (t - s).sqrt()
    assert free[1] > 0.45 > free[0] and torch.allclose(g, torch.stack([free[0], torch.tensor(0.45, dtype=F64)]))
    assert Clipped(Ode()) == Clipped(Ode(), 0.45)


def test_what_each_law_promises():
    table = Table(torch.tensor([1.0, 0.5]), torch.ones(2))
    keeps: list[NoiseLaw] = [Ode(), FlowGrpo(), Constant(), Memoryless(), Ddim(), table, Clipped(FlowGrpo())]
    assert all(law.keeps_marginals for law in keeps)
    assert not Cps().keeps_marginals and not Consistency().keeps_marginals
    one = torch.ones(1, 1, 2, 2)
    assert Spatial(Ddim(), one).keeps_marginals and not Spatial(Cps(), one).keeps_marginals
    for law in (FlowGrpo(), Constant(), Memoryless(), Ddim(0.5), table, Cps(), Consistency()):
        assert law.stochastic(0.5, 0.4)
        assert Spatial(law, one).stochastic(0.5, 0.4) and Clipped(law).stochastic(0.5, 0.4)
    silent = Table(torch.tensor([1.0, 0.5]), torch.zeros(2))
    for law in (Ode(), FlowGrpo(0.0), FlowGrpo(-0.7), Constant(0.0), Ddim(0.0), Cps(0.0), Cps(2.0), silent):
        assert not law.stochastic(0.5, 0.4)
        assert not Spatial(law, one).stochastic(0.5, 0.4) and not Clipped(law).stochastic(0.5, 0.4)
    assert not Clipped(FlowGrpo(), 0.0).stochastic(0.5, 0.4)
    half = Table(torch.tensor([1.0, 0.5, 0.2]), torch.tensor([1.0, 0.0, 0.0]))  # a table may fall silent on its way
    assert half.stochastic(0.75, 0.5) and not half.stochastic(0.5, 0.2)
    assert not Cps().stochastic(0.1, 0.0) and not Consistency().stochastic(0.1, 0.0)
    assert Ddim().stochastic(0.1, 0.0) and FlowGrpo().stochastic(0.1, 0.0)


@pytest.mark.parametrize(
    ("law", "memoryless"), [(Memoryless(), True), (FlowGrpo(2**0.5), True), (FlowGrpo(0.7), False), (Ode(), False)]
)
def test_soft_value_of_the_chain_is_the_posteriors_only_without_memory(law, memoryless):
    """steering.md, "Noise schedule facts": V_t is the soft value of the chain iff g² = 2σW/α."""
    world = Normal(0.7, 0.5)
    times = torch.linspace(1, 0, 401, dtype=F64)
    value = riccati(chain(world, EulerMaruyama(law), times), 0.0, 1.5)[200]
    x = torch.tensor([-0.6, 0.3, 1.4], dtype=F64)
    p = world.posterior(x[:, None], 0.5)
    want = 1.5 * p.x0[:, 0] + 0.5 * 1.5**2 * world.spread(0.5) ** 2
    gap = float((value(x) - want).abs().max())
    assert gap < 0.01 if memoryless else gap > 0.15
    slope = riccati(chain(world, EulerMaruyama(law), times), 0.0, 1.5)[0].q
    assert float(slope.abs()) < 1e-2 if memoryless else float(slope.abs()) > 0.05  # what pure noise decides
