"""Processes: coefficients, rates, conversions between predictions, and diffusers' own alphas."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler
from worlds import F64, cosine, sd_alphas, stable_diffusion

from flowalign.process import Karras, Posterior, Process, Rectified, Rescaled, VariancePreserving, as_time

PROCESSES: dict[str, Process] = {
    "rectified": Rectified(),
    "cosine": cosine(0.05, 1.4),
    "sd": stable_diffusion(),
    "karras": Karras(80.0, 7.0),
    "karras straight": Karras(3.0, 1.0),
    "rescaled": Rescaled(stable_diffusion()),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
TIMES = torch.tensor([0.10003, 0.35007, 0.71234, 0.93006], dtype=F64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@every_process
def test_rates_are_derivatives(process):
    h = 1e-6
    (a1, s1), (a2, s2) = process(TIMES + h), process(TIMES - h)
    da, ds = process.rates(TIMES)
    assert torch.allclose((a1 - a2) / (2 * h), da, rtol=1e-6, atol=1e-7)
    assert torch.allclose((s1 - s2) / (2 * h), ds, rtol=1e-6, atol=1e-7)
    a, s = process(TIMES)
    assert torch.equal(process.wronskian(TIMES), ds * a - s * da)
    assert (process.wronskian(TIMES) > 0).all()  # noise only grows
    assert a.dtype == s.dtype == da.dtype == ds.dtype == F64 and a.shape == s.shape == da.shape == ds.shape == (4,)


def test_coefficients():
    assert [float(c) for c in Rectified()(0.3)] == pytest.approx([0.7, 0.3], abs=1e-15)
    assert [float(c) for c in Rectified().rates(0.3)] == [-1, 1]
    assert [float(c) for c in Karras(80.0, 7.0)(0.5)] == pytest.approx([1, 80 / 128], abs=1e-15)
    assert [float(c) for c in Karras(80.0, 7.0).rates(0.5)] == pytest.approx([0, 80 * 7 / 64], abs=1e-12)
    assert Karras() == Karras(80.0, 7.0)
    for sigma in (0.01, 1.0, 80.0):
        assert float(Karras()(Karras().time(sigma))[1]) == pytest.approx(sigma, rel=1e-12)
    half = cosine(0.0, 1.5)
    assert [float(c) for c in half(0.4)] == pytest.approx([math.cos(0.6), math.sin(0.6)], abs=1e-12)
    assert [float(c) for c in half.rates(0.4)] == pytest.approx([-1.5 * math.sin(0.6), 1.5 * math.cos(0.6)], abs=1e-9)
    inner = stable_diffusion()
    a, s = inner(TIMES)
    assert torch.equal(Rescaled(inner)(TIMES)[1], s / a) and torch.equal(Rescaled(inner)(TIMES)[0], torch.ones(4))
    assert as_time(1).dtype == F64 and as_time(torch.ones(2)).dtype == F64


@every_process
@pytest.mark.parametrize("times", [0.40003, TIMES], ids=["one time", "a time each"])
def test_every_prediction_tells_the_same(process, times):
    x0, eps = draw(4, 2, 3), draw(4, 2, 3, seed=1)
    a, s = (c.reshape(-1, 1, 1) for c in process(times))
    da, ds = (c.reshape(-1, 1, 1) for c in process.rates(times))
    x = a * x0 + s * eps
    v, u = da * x0 + ds * eps, a * eps - s * x0
    assert torch.allclose(process.diffuse(x0, times, eps), x, atol=1e-14)
    for name, value in {"x0": x0, "eps": eps, "v": v, "v_prediction": u}.items():
        p = process.posterior(x, times, **{name: value})
        scale = 1 + max(x.abs().max(), v.abs().max())
        assert torch.allclose(p.x0, x0, atol=1e-11 * scale), name
        assert torch.allclose(p.eps, eps, atol=1e-11 * scale), name
        assert torch.allclose(p.velocity, v, rtol=1e-9, atol=1e-11 * scale), name
        assert torch.allclose(p.score, -eps / s, rtol=1e-9, atol=1e-10 * scale), name
        assert p.process is process and (p.t is times)
    assert process.posterior(x, times, v=v).velocity is v  # as the network gave it, without round-off
    assert process.posterior(x, times, x0=x0).v is None


def test_precision_and_refusals():
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    p = Rectified().posterior(x, 0.5, v=torch.ones(2, 3, dtype=torch.bfloat16))
    assert p.x0.dtype == p.velocity.dtype == torch.float32
    for given in ({}, {"x0": x, "eps": x}):
        with pytest.raises(ValueError, match="exactly one of x0, eps, v, v_prediction"):
            Rectified().posterior(x, 0.5, **given)
    with pytest.raises(ValueError, match="none"):
        Rectified().posterior(x, 0.5)


@every_process
def test_renoising_composes_to_the_process(process):
    s, t = 0.2, 0.7
    x0, z1, z2 = draw(1, 4), draw(1, 4, seed=1), draw(1, 4, seed=2)
    x_s = process.diffuse(x0, s, z1)
    mean = process.forward(x_s, s, t, torch.zeros(1, 4, dtype=F64))
    (a_s, sig_s), (a_t, sig_t) = process(s), process(t)
    assert torch.allclose(mean, a_t / a_s * x_s, rtol=1e-12)
    fresh = (process.forward(x_s, s, t, z2) - mean) / z2
    assert torch.allclose(fresh**2 + (a_t / a_s * sig_s) ** 2, sig_t**2 + 0 * z2, rtol=1e-9)
    assert torch.equal(process.forward(x_s, s, s, z2), x_s)
    each = process.forward(x_s.expand(2, 4), torch.tensor([s, s], dtype=F64), torch.tensor([t, s], dtype=F64), z2)
    assert torch.allclose(each[0], process.forward(x_s, s, t, z2)[0]) and torch.allclose(each[1], x_s[0])


@pytest.mark.parametrize("to_one", [True, False])
def test_knots_are_the_schedulers_alphas(to_one):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=to_one
    )
    final = float(scheduler.final_alpha_cumprod)
    process = VariancePreserving.from_alphas_cumprod(scheduler.alphas_cumprod, final)
    i = torch.arange(1000, dtype=F64)
    a, s = process((i + 1) / 1000)
    assert torch.allclose(a**2, scheduler.alphas_cumprod.double(), atol=1e-15)
    assert torch.allclose(a**2 + s**2, torch.ones(1000, dtype=F64), atol=1e-15)
    assert float(process(0.0)[0] ** 2) == pytest.approx(final, abs=1e-15)
    assert (final == 1) == to_one and (to_one or final == pytest.approx(0.99915, abs=1e-5))
    # between the knots the angle is linear, to the left of a knot as to the right of it
    angle = torch.atan2(*process(torch.tensor([0.5, 0.5004, 0.501], dtype=F64))[::-1])
    assert float(angle[1]) == pytest.approx(float(0.6 * angle[0] + 0.4 * angle[2]), abs=1e-13)
    # t a hair off a knot by round-off is the knot: 0.7 * 1000 is not 700 in floating point
    assert float(process(0.7 + 1e-13)[0] ** 2) == float(process(0.7)[0] ** 2)
    assert VariancePreserving.from_alphas_cumprod(scheduler.alphas_cumprod).angles[0] == 0.0


def test_rates_at_knots_and_ends():
    process = stable_diffusion()
    a, s = process(0.0)
    da, ds = process.rates(torch.tensor([0.0, 0.0005, 0.001, 0.0015], dtype=F64))
    slope = (process.angles[1] - process.angles[0]) * 1000
    assert float(ds[0]) == pytest.approx(slope * float(a)) and float(da[0]) == pytest.approx(-slope * float(s))
    assert float(torch.hypot(da, ds)[2]) == pytest.approx(slope)  # a knot belongs to the segment on its left
    assert float(torch.hypot(da, ds)[3]) == pytest.approx((process.angles[2] - process.angles[1]) * 1000)
    assert torch.isfinite(torch.stack(process.rates(1.0))).all()


def test_zero_terminal_snr():
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    process = VariancePreserving.from_alphas_cumprod(scheduler.alphas_cumprod)
    a, s = process(1.0)
    assert float(a) == 0.0 and float(s) == 1.0
    x = draw(2, 3)
    p = process.posterior(x, 1.0, v_prediction=-draw(2, 3, seed=1))
    assert torch.equal(p.x0, draw(2, 3, seed=1)) and torch.equal(p.eps, x)
    assert float(process.wronskian(1.0)) > 0
    assert torch.isfinite(process.posterior(x, 1.0, v=x).x0).all()


@pytest.mark.parametrize(
    "alphas", [[0.5, 0.6], [1.2, 0.5], [0.5, -0.1], []], ids=["rise", "above 1", "below 0", "none"]
)
def test_impossible_alphas_are_refused(alphas):
    with pytest.raises(ValueError, match="alphas_cumprod must fall"):
        VariancePreserving.from_alphas_cumprod(torch.tensor(alphas, dtype=F64))
    with pytest.raises(ValueError, match=r"2 values from 0\.2 "):
        VariancePreserving.from_alphas_cumprod(torch.tensor([0.9, 0.5]), final=0.2)


@every_process
def test_guidance_adds_to_the_score(process):
    x, g = draw(3, 2), draw(3, 2, seed=3)
    t = 0.60003
    p = process.posterior(x, t, eps=draw(3, 2, seed=4))
    q = p.guided(g)
    a, s = process(t)
    assert torch.allclose(q.score - p.score, g, atol=1e-8)
    assert torch.allclose(a * q.x0 + s * q.eps, a * p.x0 + s * p.eps, rtol=1e-9, atol=1e-9)
    assert torch.allclose(q.velocity - p.velocity, -s * process.wronskian(t) / a * g, rtol=1e-7, atol=1e-8)
    assert q.v is None


def test_guidance_at_pure_noise_does_nothing():
    x = draw(2, 3)
    times = torch.tensor([1.0, 0.5], dtype=F64)
    p = Rectified().posterior(x, times, v=draw(2, 3, seed=1))
    q = p.guided(torch.ones(2, 3, dtype=F64))
    assert torch.equal(q.x0[0], p.x0[0]) and torch.equal(q.eps[0], p.eps[0])
    assert torch.allclose(q.x0[1], p.x0[1] + 0.5) and torch.allclose(q.eps[1], p.eps[1] - 0.5)


def test_selecting_and_detaching_a_posterior():
    x = draw(3, 2).requires_grad_()
    p = Rectified().posterior(x, TIMES[:3], v=x * 2)
    p = Posterior(p.x0, p.eps, p.process, p.t, p.v, x * 3)
    i = torch.tensor([2, 0])
    q = p[i]
    for name in ("x0", "eps", "v", "output", "t"):
        assert torch.equal(getattr(q, name), getattr(p, name)[i]), name
    d = p.detach()
    assert not any(getattr(d, name).requires_grad for name in ("x0", "eps", "v", "output"))
    one = Rectified().posterior(x, 0.5, x0=x)[i]
    assert one.t == 0.5 and one.v is None and one.output is None
    assert Rectified().posterior(x, torch.tensor(0.5), x0=x)[i].t == 0.5
    assert sd_alphas(10).shape == (10,)


@pytest.mark.parametrize("process", [Rectified(), cosine()], ids=["rectified", "vp"])
def test_renoising_adds_the_noise_with_its_sign(process):
    """``x_t = (α_t/α_s) x_s + √(σ_t² - (α_t/α_s)² σ_s²) ε``, term by term: a law alone would not see a sign."""
    x, e = torch.tensor([[0.3]], dtype=F64), torch.tensor([[0.7]], dtype=F64)
    (a_s, s_s), (a_t, s_t) = process(0.25), process(0.75)
    r = a_t / a_s
    expected = r * x + (s_t**2 - (r * s_s) ** 2).sqrt() * e
    assert torch.allclose(process.forward(x, 0.25, 0.75, e), expected, atol=1e-14)
