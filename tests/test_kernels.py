"""Kernels: published numbers, diffusers' own steps, and convergence to the exact marginals at the expected order.

The convergence tests draw nothing: a kernel on Gaussian data is a linear-Gaussian chain whose output law is propagated
exactly (``worlds.chain``), so a fitted slope is sharp.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from scipy.stats import linregress
from worlds import F64, Net, Normal, chain, cosine, output, path_output, sd_alphas, stable_diffusion

from flowalign.kernels import Ancestral, EulerMaruyama, Kernel, SecondOrder, Windowed
from flowalign.laws import Clipped, Consistency, Constant, Cps, Ddim, FlowGrpo, Memoryless, Ode, Spatial, Table
from flowalign.process import Karras, Rectified, Rescaled, VariancePreserving

RF = Rectified()
LOG_NORM = -0.5 * math.log(2 * math.pi)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# published numbers: online_rl.md A.1, x = .3, v = -.7, from t = .6 to s = .45, noise .5

GOLDEN = {
    "Flow-GRPO a=.7": (
        EulerMaruyama(FlowGrpo(0.7)), 0.4031625, 0.3320391543176798, 0.5691820771588398, 0.05856384912291834,
    ),
    "DanceGRPO eta=.3": (
        EulerMaruyama(Constant(0.3)), 0.404775, 0.11618950038622249, 0.4628697501931112, 1.1085942635642043,
    ),
    "CPS a=.8": (Ancestral(Cps(0.8)), 0.39878115294937455, 0.4279754323328191, 0.6127688691157841, None),
}  # fmt: skip


@pytest.mark.parametrize(("kernel", "mean", "std", "x", "log_prob"), GOLDEN.values(), ids=GOLDEN)
def test_golden_scalars(kernel, mean, std, x, log_prob):
    state = torch.tensor([[0.3]], dtype=F64)
    posterior = RF.posterior(state, 0.6, v=torch.tensor([[-0.7]], dtype=F64))
    law, carry = kernel(state, posterior, 0.6, 0.45)
    got = law.sample(torch.tensor([[0.5]], dtype=F64))
    assert carry is None
    assert float(law.mean) == pytest.approx(mean, abs=1e-10)
    assert float(law.std) == pytest.approx(std, abs=1e-10)
    assert float(got) == pytest.approx(x, abs=1e-10)
    if log_prob is None:  # Flow-CPS publishes -(x' - mean)², which is no density
        assert float(-((got - law.mean) ** 2)) == pytest.approx(-0.045790742670115854, abs=1e-10)
        log_prob = -0.125 - math.log(std) + LOG_NORM
    assert float(law.log_prob(got)) == pytest.approx(log_prob, abs=1e-10)


def test_golden_ddim():
    process = VariancePreserving.from_alphas_cumprod(torch.tensor([0.5, 0.3], dtype=F64))
    state = torch.tensor([[0.3]], dtype=F64)
    posterior = process.posterior(state, 1.0, eps=torch.tensor([[0.2]], dtype=F64))
    law, _ = Ancestral(Ddim(1.0))(state, posterior, 1.0, 0.5)
    got = law.sample(torch.tensor([[0.5]], dtype=F64))
    assert float(law.mean) == pytest.approx(0.26385565465106814, abs=1e-10)
    assert float(law.std) == pytest.approx(0.5345224838248488, abs=1e-10)
    assert float(got) == pytest.approx(0.5311168965634925, abs=1e-10)
    assert float(law.log_prob(got)) == pytest.approx(-0.41755704895698875, abs=1e-10)


def test_flow_grpo_overshoots_the_noise_and_cps_does_not():
    """The coefficient check of online_rl.md: x0's coefficient is kept, the total noise is 1.0007 and .2400."""
    sigma = torch.tensor([1, 0.96013, 0.91335, 0.27805, 0.00893], dtype=F64)
    noise = {0: 1.0007, 1: 0.9715, 3: 0.2400}
    for k, want in noise.items():
        t, s = float(sigma[k]), float(sigma[k + 1])
        x0, eps = torch.tensor([[1.0], [0.0]], dtype=F64), torch.tensor([[0.0], [1.0]], dtype=F64)
        x = (1 - t) * x0 + t * eps
        posterior = RF.posterior(x, t, v=eps - x0)
        law, _ = EulerMaruyama(FlowGrpo(0.7))(x, posterior, t, s)
        assert float(law.mean[0]) == pytest.approx(1 - s, abs=1e-12)
        assert float((law.mean[1] ** 2 + law.std**2).sqrt()) == pytest.approx(want, abs=2e-4)
        law, _ = Ancestral(Cps(0.8))(x, posterior, t, s)
        assert float((law.mean[1] ** 2 + law.std**2).sqrt()) == pytest.approx(s, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# diffusers' own steps


def test_ode_step_is_flow_match_euler_bitwise():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x, v = draw(2, 3, 4, 4).float(), draw(2, 3, 4, 4, seed=1).float()
    for i, timestep in enumerate(scheduler.timesteps):
        t, s = float(scheduler.sigmas[i]), float(scheduler.sigmas[i + 1])
        want = scheduler.step(v, timestep, x).prev_sample
        posterior = RF.posterior(x, t, v=v)
        assert torch.equal(EulerMaruyama()(x, posterior, t, s)[0].mean, want)
        other = Ancestral(Ode())(x, posterior, t, s)[0]
        assert torch.allclose(other.mean, want, atol=1e-6) and float(other.std) == 0
        x = want


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_steps(prediction, eta, zero_snr):
    if zero_snr and prediction == "epsilon":
        return  # no network can predict x0 from ε at zero SNR
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        clip_sample=False, set_alpha_to_one=False, rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    process = VariancePreserving.from_alphas_cumprod(scheduler.alphas_cumprod, float(scheduler.final_alpha_cumprod))
    scheduler.set_timesteps(10)
    name = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}[prediction]
    for i in scheduler.timesteps.tolist():
        x, out, z = draw(2, 3, seed=i), draw(2, 3, seed=i + 1), draw(2, 3, seed=i + 2)
        want = scheduler.step(out, i, x, eta=eta, variance_noise=z if eta else None).prev_sample
        t, s = (i + 1) / 1000, (i - 99) / 1000
        law, _ = Ancestral(Ddim(eta))(x, process.posterior(x, t, **{name: out}), t, max(s, 0.0))
        assert torch.allclose(law.sample(z), want, atol=1e-9)


def flow_scheduler(steps):
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler, RF, scheduler.sigmas.double()


def vp_scheduler(steps, final="zero"):
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", final_sigmas_type=final
    )
    alphas = scheduler.alphas_cumprod.double()
    process = VariancePreserving.from_alphas_cumprod(alphas, None if final == "zero" else float(alphas[0]))
    scheduler.set_timesteps(steps)
    times = [(i + 1) / 1000 for i in scheduler.timesteps.tolist()] + [0.0]
    return scheduler, process, torch.tensor(times, dtype=F64)


SOLVERS = {"flow": flow_scheduler(12), "vp": vp_scheduler(20), "vp to sigma_min": vp_scheduler(20, "sigma_min")}


@pytest.mark.parametrize(("scheduler", "process", "times"), SOLVERS.values(), ids=SOLVERS)
def test_second_order_is_dpm_solver(scheduler, process, times):
    name = "v" if scheduler.config.prediction_type == "flow_prediction" else "eps"
    scheduler.sigmas = scheduler.sigmas.double()
    x = y = draw(2, 3)
    carry = None
    for i, (t, s) in enumerate(pairwise(times.tolist())):
        y = scheduler.step(torch.tanh(y + t), scheduler.timesteps[i], y).prev_sample
        law, carry = SecondOrder()(x, process.posterior(x, t, **{name: torch.tanh(x + t)}), t, s, carry)
        x = law.mean
        assert law.std.shape == () and float(law.std) == 0
        assert torch.allclose(x, y, atol=3e-6), i  # diffusers keeps its sigmas in float32
    assert (x - y).abs().max() < 3e-6 and x.abs().max() > 0.1
    assert not SecondOrder().stochastic(0.5, 0.4)


def test_second_order_from_pure_noise_and_per_sample():
    """From α = 0 the log-SNR is -inf: first order; nodes with their own times and memories agree with one by one."""
    net = Net(3).double()
    times = [1.0, 0.7, 0.4, 0.0]
    x, carry = draw(2, 3), None
    xs = [x]
    for t, s in pairwise(times):
        law, carry = SecondOrder()(x, net.posterior(x, t), t, s, carry)
        x = law.mean
        xs.append(x)
        assert torch.isfinite(x).all() and carry[1].shape == (2,)
    # the middle step by hand: r = ∞ there, since the step before came from λ = -∞
    p = net.posterior(xs[1], 0.7)
    assert torch.allclose(xs[2], 0.4 / 0.7 * xs[1] + (0.6 - 0.4 / 0.7 * 0.3) * p.x0)
    assert torch.allclose(xs[3], net.posterior(xs[2], 0.4).x0)
    t, s = torch.tensor([0.6, 0.8], dtype=F64), torch.tensor([0.5, 0.7], dtype=F64)
    before = (draw(2, 3, seed=5), torch.tensor([-1.5, -2.0], dtype=F64))
    both, memory = SecondOrder()(x, net.posterior(x, t), t, s, before)
    for i in (0, 1):
        mine = (before[0][i : i + 1], before[1][i : i + 1])
        one, own = SecondOrder()(x[i : i + 1], net.posterior(x[i : i + 1], float(t[i])), float(t[i]), float(s[i]), mine)
        assert torch.allclose(both.mean[i], one.mean[0], atol=1e-12)
        assert torch.allclose(memory[1][i], own[1][0]) and torch.allclose(memory[0][i], own[0][0])


# ---------------------------------------------------------------------------------------------------------------------
# marginals

PROCESSES = {
    "rectified": RF, "cosine": cosine(), "karras": Karras(4.0, 3.0), "rescaled": Rescaled(cosine(0.0, 1.3)),
}  # fmt: skip
CALM = Table(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.5, 0.3, 0.2]))
KERNELS: dict[str, Kernel] = {
    "ode": EulerMaruyama(),
    "flow-grpo": EulerMaruyama(FlowGrpo(0.7)),
    "constant": EulerMaruyama(Constant(0.3)),
    "memoryless": EulerMaruyama(Memoryless()),
    "table": EulerMaruyama(CALM),
    "clipped": EulerMaruyama(Clipped(FlowGrpo(0.7), 0.05)),
    "windowed": Windowed(EulerMaruyama(Constant(0.5)), lambda t, s: t > 0.5),
    "ddim 0": Ancestral(Ddim(0.0)),
    "ddim .5": Ancestral(Ddim(0.5)),
    "ddpm": Ancestral(Ddim(1.0)),
    "dpm-solver++": SecondOrder(),
}


def errors(world: Normal, kernel: Kernel, ends: tuple[float, float], steps: list[int]) -> list[tuple[float, float]]:
    """Errors of mean and std at the end of the interval, for each number of steps."""
    out = []
    for n in steps:
        times = torch.linspace(*ends, n + 1, dtype=F64)
        if isinstance(kernel, SecondOrder):
            mean, var = path_output(world, kernel, times)
        else:
            mean, var = output(world, chain(world, kernel, times), ends[0])
        m, v = world.moments(ends[1])
        out.append((abs(float(mean - m)), abs(float(var.sqrt() - v.sqrt()))))
    return out


def slope(steps: list[int], error: list[float]) -> float:
    return -linregress(np.log(steps), np.log(error)).slope


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_marginals_at_the_expected_order(process, kernel):
    """Inside (0, 1), where no coefficient is singular: order 1, and 2 for DPM-Solver++(2M)."""
    steps = [60, 120, 240]
    got = errors(Normal(0.7, 0.5, process), kernel, (0.93, 0.06), steps)
    order = 2 if isinstance(kernel, SecondOrder) else 1
    assert kernel.keeps_marginals
    assert max(got[-1]) < (4e-4 if order == 2 else 2e-2)
    fitted = slope(steps, [sum(e) for e in got])
    assert fitted > order - 0.12
    # a strongly contracting chain forgets its early errors and may look better than it is
    assert fitted < order + 0.25 or isinstance(getattr(kernel, "law", None), Memoryless)


@pytest.mark.parametrize("name", ["ode", "constant", "memoryless", "ddim 0", "ddim .5", "ddpm", "dpm-solver++"])
@pytest.mark.parametrize("process", [RF, stable_diffusion(), Karras(4.0, 3.0)], ids=["rectified", "sd", "karras"])
def test_from_noise_to_data(process, name):
    """The whole way, with its singular ends and a real table of alphas: the error falls, and is small at 250 steps."""
    coarse, fine = (sum(e) for e in errors(Normal(0.7, 0.5, process), KERNELS[name], (1.0, 0.0), [25, 250]))
    assert fine < 0.016 and fine < coarse / 4


def test_flow_grpos_first_step_costs_accuracy():
    """From exactly pure noise g² dt = a² however small the step: an error a⁴/4 that is forgotten only as h^(a²)."""
    world, steps = Normal(0.7, 0.5), [8000, 16000, 32000]
    late = [std for _, std in errors(world, EulerMaruyama(FlowGrpo(0.7)), (1.0, 0.0), steps)]
    assert 0.42 < slope(steps, late) < 0.49
    early = [std for _, std in errors(world, EulerMaruyama(FlowGrpo(2**0.5)), (1.0, 0.0), [250, 500])]
    assert early[1] < 1e-5 and early[0] / early[1] > 3  # a = √2 has no memory of the first step
    link = chain(world, EulerMaruyama(FlowGrpo(0.7)), torch.tensor([1.0, 0.99], dtype=F64))[0]
    spread = float(link.A**2 + link.std**2)
    assert spread == pytest.approx(1 + 0.7**4 / 4, abs=0.02)


@pytest.mark.parametrize(("law", "limit"), [(Cps(0.8), 0.404), (Cps(0.5), 0.461), (Consistency(), 0.353)])
def test_cps_and_consistency_lose_the_marginals_and_say_so(law, limit):
    kernel = Ancestral(law)
    assert not kernel.keeps_marginals and Ancestral(Ddim()).keeps_marginals
    world = Normal(0.7, 0.5)
    ends = [output(world, chain(world, kernel, torch.linspace(1, 0, n + 1, dtype=F64)), 1.0) for n in (200, 800)]
    assert float(ends[1][1].sqrt()) == pytest.approx(limit, abs=3e-3)  # not .5, and more steps do not help
    assert abs(float(ends[1][1].sqrt() - ends[0][1].sqrt())) < 6e-3
    assert abs(float(ends[1][0]) - 0.7) < 1e-2  # the mean survives


# ---------------------------------------------------------------------------------------------------------------------
# shapes and combinations


@pytest.mark.parametrize("make", [EulerMaruyama, Ancestral])
def test_a_map_of_noise_is_each_pixels_own_law(make):
    space = torch.rand(1, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(1)) * 0.8
    x = draw(3, 2, 2, 2)
    base = Constant(0.5) if make is EulerMaruyama else Ddim(1.0)
    for t, s in ((0.6, 0.5), (torch.tensor([0.6, 0.8, 0.9], dtype=F64), torch.tensor([0.5, 0.6, 0.8], dtype=F64))):
        posterior = RF.posterior(x, t, v=draw(3, 2, 2, 2, seed=1))
        law, _ = make(Spatial(base, space))(x, posterior, t, s)
        for i, j in ((0, 0), (0, 1), (1, 0)):
            scale = float(space[0, 0, i, j])
            one = Constant(0.5 * scale) if make is EulerMaruyama else Ddim(scale)
            want, _ = make(one)(x, posterior, t, s)
            assert torch.allclose(law.mean[..., i, j], want.mean[..., i, j], atol=1e-12)
            assert torch.allclose(law.std.expand_as(x)[..., i, j], want.std.expand_as(x)[..., i, j], atol=1e-12)
    assert law.log_prob(law.mean).shape == (3,)


@pytest.mark.parametrize("name", [n for n in KERNELS if n not in ("dpm-solver++", "windowed")])
@pytest.mark.parametrize("process", [RF, stable_diffusion()], ids=["rectified", "sd"])
def test_each_sample_may_have_its_own_times(process, name):
    kernel = KERNELS[name]
    t, s = torch.tensor([0.3, 0.6, 0.9], dtype=F64), torch.tensor([0.2, 0.3, 0.8], dtype=F64)
    x = draw(3, 2, 2)
    law, _ = kernel(x, process.posterior(x, t, x0=torch.tanh(x)), t, s)
    for i in range(3):
        one = x[i : i + 1]
        want, _ = kernel(one, process.posterior(one, float(t[i]), x0=torch.tanh(one)), float(t[i]), float(s[i]))
        assert torch.allclose(law.mean[i], want.mean[0], atol=1e-12)
        assert torch.allclose(law.std.expand_as(x)[i], want.std.expand_as(one)[0], atol=1e-12)


def test_windowed():
    inside, outside = EulerMaruyama(Constant(0.5)), Ancestral(Ddim(0.0))
    kernel = Windowed(inside, lambda t, s: 0.3 < t < 0.7 and s > 0.2, outside)
    x = draw(3, 2)
    for t, s, which in ((0.5, 0.4, inside), (0.8, 0.7, outside), (0.5, 0.1, outside)):
        p = RF.posterior(x, t, v=draw(3, 2, seed=1))
        law, want = kernel(x, p, t, s)[0], which(x, p, t, s)[0]
        assert torch.equal(law.mean, want.mean) and torch.equal(law.std, want.std)
        assert kernel.stochastic(t, s) == (which is inside)
    t, s = torch.tensor([0.5, 0.8, 0.6], dtype=F64), torch.tensor([0.4, 0.7, 0.5], dtype=F64)
    p = RF.posterior(x, t, v=draw(3, 2, seed=1))
    law, carry = kernel(x, p, t, s)
    a, b = inside(x, p, t, s)[0], outside(x, p, t, s)[0]
    assert torch.equal(law.mean, torch.stack([a.mean[0], b.mean[1], a.mean[2]])) and carry is None
    std = law.std.expand_as(x)
    assert torch.equal(std[[0, 2]], a.std.expand_as(x)[[0, 2]]) and not std[1].any()
    with pytest.raises(ValueError, match="kernels with memory"):
        kernel(x, p, t, s, (x, t))
    assert Windowed(inside, lambda t, s: True).outside == EulerMaruyama()
    memory = Windowed(inside, lambda t, s: t < 0.3, SecondOrder())
    law, carry = memory(x, RF.posterior(x, 0.5, v=x), 0.5, 0.4)
    law, carry = memory(x, RF.posterior(x, 0.4, v=x), 0.4, 0.3, carry)
    assert carry[1].shape == (3,)  # the memory passes through


def test_stochastic_flags_and_precision():
    assert EulerMaruyama(FlowGrpo()).stochastic(1.0, 0.9) and not EulerMaruyama().stochastic(1.0, 0.9)
    assert not EulerMaruyama(FlowGrpo(0.0)).stochastic(1.0, 0.9)
    assert Ancestral(Ddim(1.0)).stochastic(0.5, 0.4) and not Ancestral(Ddim(0.0)).stochastic(0.5, 0.4)
    assert not Ancestral(Cps()).stochastic(0.1, 0.0)
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    for kernel in KERNELS.values():
        law, _ = kernel(x, RF.posterior(x, 0.5, v=torch.ones(2, 3)), 0.5, 0.4)
        assert law.mean.dtype == torch.float32 and law.std.dtype == torch.float32
    assert sd_alphas(5).shape == (5,)
