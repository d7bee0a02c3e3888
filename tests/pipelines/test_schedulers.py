"""The drop-in the other way: a plain ``pipe(...)`` call samples with our kernels."""

import sys

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from flowalign.pipelines import load, schedulers
from flowalign.pipelines.schedulers import DiffusionSdeScheduler, FlowSdeScheduler, kernel_of
from tests.pipelines.contract import split
from tests.zoo import build


def call(pipe, inputs, seed=0, **extra):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    arguments = {**inputs, "num_inference_steps": 4, "output_type": "latent", **extra}
    return pipe(**arguments, generator=generator)[0]


def test_without_noise_it_is_the_stock_solver():
    case = build("StableDiffusion3")
    want = call(case.pipe, case.inputs)
    case.pipe.scheduler = FlowSdeScheduler.from_config(case.pipe.scheduler.config, kernel="ode", level=0.0)
    assert torch.allclose(call(case.pipe, case.inputs), want, atol=1e-5)


def test_diffusion_without_noise_is_ddim():
    case = build("StableDiffusion")
    case.pipe.scheduler = DDIMScheduler.from_config(case.pipe.scheduler.config, clip_sample=False)
    want = call(case.pipe, case.inputs)
    case.pipe.scheduler = DiffusionSdeScheduler.from_config(case.pipe.scheduler.config, kernel="ddim", level=0.0)
    assert torch.allclose(call(case.pipe, case.inputs), want, atol=1e-4)


@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion", "Wan"])
def test_reproducible_from_the_generator(name):
    case = build(name)
    kind = DiffusionSdeScheduler if name == "StableDiffusion" else FlowSdeScheduler
    kernel = {"kernel": "ddim", "level": 1.0} if name == "StableDiffusion" else {"kernel": "flow_grpo", "level": 0.7}
    case.pipe.scheduler = kind.from_config(case.pipe.scheduler.config, **kernel)
    first = call(case.pipe, case.inputs, 1)
    torch.randn(7)  # the global generator has no say
    assert torch.equal(call(case.pipe, case.inputs, 1), first)
    assert not torch.equal(call(case.pipe, case.inputs, 2), first)
    assert len(case.pipe.scheduler.trace) == 4


def test_a_sample_does_not_depend_on_its_batch():
    case = build("StableDiffusion3")
    case.pipe.scheduler = FlowSdeScheduler.from_config(case.pipe.scheduler.config)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = {**case.inputs, "prompt": [case.inputs["prompt"]] * 2, "negative_prompt": ["blurry"] * 2}
    both = call(case.pipe, inputs, latents=noise[:, : case.pipe.transformer.config.in_channels])
    alone = call(case.pipe, case.inputs, latents=noise[1:, : case.pipe.transformer.config.in_channels])
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_trace_is_the_law_of_the_adapter():
    """Mean, std and log-probability handed out are those that the core computes from the adapter's posterior."""
    case = build("StableDiffusion3")
    prompt, meta, arguments = split(case.inputs)
    generator = load(case.pipe, arguments, check=False)
    cond = generator.encode([prompt], [meta])
    times = generator.times(4).tolist()
    start = torch.randn(1, *generator.shape(cond), generator=torch.Generator().manual_seed(3))
    case.pipe.scheduler = FlowSdeScheduler.from_config(case.pipe.scheduler.config, kernel="flow_grpo", level=0.7)
    end = call(case.pipe, case.inputs, latents=start)
    trace, x, kernel = case.pipe.scheduler.trace, start, kernel_of("flow_grpo", 0.7)
    assert [r.t for r in trace] == times[:-1]
    for record in trace:
        with torch.no_grad():
            law, _ = kernel(x, generator.posterior(x, record.t, cond), record.t, record.s)
        assert torch.allclose(law.mean, record.mean, atol=1e-5)
        x = record.mean + record.std * record.noise
        assert torch.allclose(law.log_prob(x), record.log_prob, atol=1e-2)
    assert torch.allclose(x, end, atol=1e-5)


def test_wrong_family_and_wrong_kernel_are_refused():
    case = build("StableDiffusion")
    with pytest.raises(ValueError, match="DiffusionSdeScheduler"):
        FlowSdeScheduler.from_config(case.pipe.scheduler.config)
    with pytest.raises(ValueError, match="no kernel 'euler'"):
        DiffusionSdeScheduler.from_config(case.pipe.scheduler.config, kernel="euler")
    with pytest.raises(ValueError, match="negative"):
        DiffusionSdeScheduler.from_config(case.pipe.scheduler.config, level=-1.0)


OURS = {
    "StableDiffusion3": (FlowSdeScheduler, FlowMatchEulerDiscreteScheduler, {"kernel": "constant", "level": 0.3}),
    "StableDiffusion": (DiffusionSdeScheduler, DDIMScheduler, {"kernel": "ddim", "level": 0.6}),
}


@pytest.mark.parametrize("name", OURS)
def test_saved_and_loaded_again(name, tmp_path, monkeypatch):
    """A folder written with our scheduler gives the same samples; without ours imported, diffusers says what to do."""
    kind, _, options = OURS[name]
    case = build(name)
    case.pipe.scheduler = kind.from_config(case.pipe.scheduler.config, **options)
    want = call(case.pipe, case.inputs)
    case.pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is kind
    assert torch.equal(call(again, case.inputs), want)
    assert torch.equal(call(load(tmp_path, check=False).pipe, case.inputs), want)
    monkeypatch.delitem(sys.modules, schedulers.__name__)
    with pytest.raises(ValueError, match=r"import flowalign\.pipelines\.schedulers before"):
        DiffusionPipeline.from_pretrained(tmp_path)
    assert type(load(tmp_path, check=False).pipe.scheduler).__name__ == kind.__name__  # load() imports it


@pytest.mark.parametrize("name", OURS)
def test_configuration_goes_round(name):
    """Stock to ours to ours to stock: nothing that was set is lost, nor taken for a default."""
    kind, plain, options = OURS[name]
    odd = {"shift": 2.5} if plain is FlowMatchEulerDiscreteScheduler else {"beta_end": 0.015, "clip_sample": False}
    stock = plain(num_train_timesteps=500, **odd)
    ours = kind.from_config(stock.config, **options)
    twice = kind.from_config(ours.config)
    back = plain.from_config(twice.config)
    own = {k: v for k, v in stock.config.items() if not k.startswith("_")}
    for other in (ours, twice, back):
        assert {k: other.config[k] for k in own} == own
    assert {k: twice.config[k] for k in options} == options
    stock.set_timesteps(5)
    twice.set_timesteps(5)
    back.set_timesteps(5)
    assert torch.equal(stock.timesteps, twice.timesteps) and torch.equal(stock.timesteps, back.timesteps)
