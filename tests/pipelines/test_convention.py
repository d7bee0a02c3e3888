"""What a scheduler means, and its steps handed over: against diffusers' own classes, without a network."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

from flowalign.pipelines.draws import combined, watched_draws
from flowalign.pipelines.grid import Grid
from flowalign.pipelines.handover import Handover
from flowalign.pipelines.reading import convention
from flowalign.trajectory import pick

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
BETAS = {k: SD[k] for k in ("beta_start", "beta_end", "beta_schedule")}
PLAIN = {"clip_sample": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
V = {"prediction_type": "v_prediction"}

# name of the class, configuration
CASES = {
    "ddim": ("DDIMScheduler", {**SD, **PLAIN, "set_alpha_to_one": False}),
    "ddim_v": ("DDIMScheduler", {**SD, **PLAIN, **V}),
    "ddim_zero_snr": (
        "DDIMScheduler",
        {**SD, **PLAIN, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "ddim_sample": ("DDIMScheduler", {**SD, **PLAIN, "prediction_type": "sample"}),
    "ddpm": ("DDPMScheduler", {**SD, **PLAIN}),
    "pndm": ("PNDMScheduler", {**SD, "skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", SD),
    "euler_v": ("EulerDiscreteScheduler", {**SD, **V}),
    "euler_karras": ("EulerDiscreteScheduler", {**BETAS, "use_karras_sigmas": True}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", SD),
    "heun": ("HeunDiscreteScheduler", BETAS),
    "kdpm2": ("KDPM2DiscreteScheduler", BETAS),
    "lms": ("LMSDiscreteScheduler", BETAS),
    "dpmpp": ("DPMSolverMultistepScheduler", BETAS),
    "dpmpp_karras": ("DPMSolverMultistepScheduler", {**BETAS, "use_karras_sigmas": True}),
    "dpmpp_sde": ("DPMSolverMultistepScheduler", {**BETAS, "algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_flow": ("DPMSolverMultistepScheduler", FLOW),
    "dpm_single": ("DPMSolverSinglestepScheduler", {**BETAS, "lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", BETAS),
    "unipc_v": ("UniPCMultistepScheduler", {**BETAS, **V}),
    "unipc_flow": ("UniPCMultistepScheduler", FLOW),
    "deis": ("DEISMultistepScheduler", BETAS),
    "lcm": ("LCMScheduler", {**SD, **PLAIN}),
    "tcd": ("TCDScheduler", SD),
    "dpm_sde": ("DPMSolverSDEScheduler", BETAS),
    "cosine_sde": ("CosineDPMSolverMultistepScheduler", {}),
    "edm": ("EDMEulerScheduler", {}),
    "edm_dpm": ("EDMDPMSolverMultistepScheduler", {}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow_stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "mochi": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
}
BROWNIAN = {"dpm_sde", "cosine_sde"}
# step() draws a second time from a random number of its own making, or returns no x0
NO_X0 = {"pndm", "heun", "kdpm2", "dpmpp", "dpmpp_karras", "dpmpp_sde", "dpmpp_flow", "dpm_single", "unipc", "unipc_v",
         "unipc_flow", "deis", "edm_dpm", "tcd", "flow", "flow_heun", "flow_stochastic", "mochi",
         "cosine_sde"}  # fmt: skip


def make(name, steps=5):
    kind, config = CASES[name]
    scheduler = getattr(diffusers, kind)(**config)
    scheduler.set_timesteps(steps)
    reading = convention(scheduler)
    return scheduler, Grid.of(scheduler.timesteps, 0, scheduler, reading), reading


def handover(grid, plan=None):
    """The solver of a grid, without a pipeline around it."""
    known = SimpleNamespace(settles=False, known_grids=lambda: [grid], any_plan=lambda: plan)
    return Handover(SimpleNamespace(known=known))


def spread(scheduler):
    """The scale of the first states."""
    return 1.0 if "FlowMatch" in type(scheduler).__name__ else max(float(scheduler.init_noise_sigma), 1.0)


def field(x, t):
    """Stand for a network: smooth, not linear, depends on time (EDM's may be negative)."""
    return torch.tanh(0.7 * x.roll(1, -1)) * (1 + 0.1 * torch.as_tensor(t).float().abs().log1p()) + 0.1 * x


@pytest.mark.parametrize("name", CASES)
def test_times_fall_and_are_found_again(name):
    _, grid, _ = make(name)
    assert (grid.times.diff() < 0).all() and grid.times[-1] == 0 and grid.times[0] <= 1
    for i, t in enumerate(grid.listed[:-1]):
        assert grid.find(t) == i and grid.spot(t).timestep is None
    inside = (grid.listed[1] + grid.listed[0]) / 2 if name != "pndm" else (grid.listed[2] + grid.listed[3]) / 2
    spot = grid.spot(inside)
    low, high = sorted((float(grid.timesteps[spot.index]), float(grid.timesteps[spot.index + 1])))
    assert spot.timestep is not None and low <= spot.timestep <= high


@pytest.mark.parametrize("name", sorted(set(CASES) - NO_X0))
def test_posterior_is_the_schedulers_own_x0(name):
    scheduler, grid, reading = make(name)
    x = torch.randn(2, 4, 3, 3) * spread(scheduler)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    raw = torch.randn(2, 4, 3, 3)
    out = scheduler.step(raw, scheduler.timesteps[0], x)
    x0 = out.denoised if name == "lcm" else out.pred_original_sample
    posterior = reading.read(x, grid.listed[0], raw)
    assert torch.allclose(posterior.x0, x0, rtol=1e-3, atol=1e-3 * float(x0.abs().max()))
    assert torch.allclose(reading.write(x, posterior), raw, rtol=1e-2, atol=1e-2)
    a, s = reading.process(grid.listed[0])
    assert torch.allclose(
        a.float() * posterior.x0 + s.float() * posterior.eps, x, rtol=1e-3, atol=1e-3 * float(x.abs().max())
    )


@pytest.mark.parametrize("name", ["unipc_flow", "dpmpp_flow", "flow", "mochi"])
def test_flow_posterior(name):
    """A velocity that points from x0 to ε gives both back, whatever way the clock runs."""
    _, grid, reading = make(name)
    x0, eps, t = torch.randn(2, 8), torch.randn(2, 8), grid.listed[1]
    v = eps - x0
    posterior = reading.read((1 - t) * x0 + t * eps, t, -v if name == "mochi" else v)
    assert torch.allclose(posterior.x0, x0, atol=1e-5) and torch.allclose(posterior.eps, eps, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_handover_is_the_scheduler_itself(name):
    """Through carry, sample by sample permuted between steps, the solver's own states come out, its noise included."""
    scheduler, grid, reading = make(name)
    plan = SimpleNamespace(extra={}, stamp_dims=0, echoed=(), looks_ahead=False, shape=(4, 3, 3),
                           shapes=((1, 4, 3, 3),),
                           batched=True, outputs=(1, 4, 3, 3))  # fmt: skip
    kernel = handover(grid, plan)
    solver = make(name)[0]
    start = torch.randn(3, 4, 3, 3) * spread(scheduler)
    want, x, carry = start, start, None
    order = torch.tensor([2, 0, 1])
    for i, stamp in enumerate(solver.timesteps):
        t, s = grid.listed[i], grid.listed[i + 1]
        posterior = reading.read(x, t, field(x, stamp))
        posterior = type(posterior)(posterior.x0, posterior.eps, posterior.process, t, None, field(x, stamp))
        law, carry = kernel(x, posterior, t, s, carry)
        if "FlowMatch" not in type(solver).__name__:
            solver.scale_model_input(want, stamp)
        torch.manual_seed(i)
        with watched_draws(solver) as draws:
            want = solver.step(field(want, stamp), stamp, want, return_dict=False)[0]
        assert kernel.stochastic(t, s) == bool(draws)
        z = combined(kernel.coefficients, draws, law.std, law.mean)
        torch.manual_seed(i)  # what was watched is what the generator gives, but for a tree's own seed
        assert all(torch.equal(d, torch.randn(d.shape)) for d in draws) or name in BROWNIAN
        x = law.mean + law.std * z
        assert torch.allclose(x, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        x, want, carry = x[order], want[order], pick(carry, order)  # particles move between steps
        for key, value in vars(solver).items():  # and so must what the real solver remembers of them
            if isinstance(value, torch.Tensor) and value.ndim == 4:
                vars(solver)[key] = value[order]
            if isinstance(value, list):
                vars(solver)[key] = [v[order] if isinstance(v, torch.Tensor) and v.ndim == 4 else v for v in value]


def test_step_off_the_grid_is_refused():
    _, grid, reading = make("unipc_flow")
    kernel = handover(grid)
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="its own grid only"):
        kernel(x, reading.read(x, 0.5, x), 0.5, 0.1)
    with pytest.raises(ValueError, match="one time for the whole batch"):
        kernel(x, reading.read(x, 0.5, x), torch.tensor([0.5, 0.6]), torch.tensor([0.1, 0.1]))


def test_unknown_scheduler_is_refused():
    with pytest.raises(ValueError, match="no convention"):
        convention(diffusers.VQDiffusionScheduler(num_vec_classes=4))
