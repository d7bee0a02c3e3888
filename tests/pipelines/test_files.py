"""LoRA and full weights in and out, and the options of memory and speed."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import diffusers
import pytest
import torch

from flowalign.pipelines import load, lora, quantise
from flowalign.pipelines.memory import Memory, apply
from flowalign.pipelines.verdict import stock
from tests.pipelines.contract import gap, split, subject
from tests.zoo import build


def dressed(name):
    s = subject(name)
    for i, p in enumerate(s.adapter.add_lora(2, alpha=3.0)):
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p) * 0.1
    return s


def latents(s):
    return stock(s.adapter, s.cond, s.steps).results[-1]


def test_fresh_lora_changes_nothing_and_trains_alone():
    s = subject("StableDiffusion3")
    parameters = s.adapter.add_lora(2)
    assert torch.equal(latents(s), s.results[-1])
    trained = {id(p) for p in s.adapter.denoiser.parameters() if p.requires_grad}
    assert trained == {id(p) for p in parameters} and parameters


@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion"])
def test_scale_merge_and_unmerge(name):
    s = dressed(name)
    with_lora = latents(s)
    assert gap(with_lora, s.results[-1]) > 1e-3
    lora.merge(s.adapter.experts)
    assert gap(latents(s), with_lora) < 1e-4
    lora.unmerge(s.adapter.experts)
    assert gap(latents(s), with_lora) < 1e-4
    lora.scale(s.adapter.experts, 0.0)
    assert gap(latents(s), s.results[-1]) < 1e-4


def test_names_of_other_front_ends(tmp_path):
    s = dressed("StableDiffusion")
    lora.export(s.adapter.experts, tmp_path / "kohya.safetensors")
    other = build("StableDiffusion").pipe
    other.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    other.set_progress_bar_config(disable=True)
    arguments = s.adapter.arguments(s.cond.rows, True, s.steps, "latent")
    assert gap(other(**arguments)[0], latents(s)) < 1e-6
    again = subject("StableDiffusion")
    again.adapter.load_lora(tmp_path / "kohya.safetensors")
    assert gap(latents(again), latents(s)) < 1e-6
    for other, words in {"StableDiffusion3": "nothing in", "StableDiffusionXL": "made for another model"}.items():
        with pytest.raises(ValueError, match=words):  # diffusers' loader says nothing, or a page of sizes
            load(build(other).pipe, check=False).load_lora(tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match="none of"):
        lora.export(subject("StableDiffusion3").adapter.experts, tmp_path / "empty.safetensors")


def test_both_experts_are_saved(tmp_path):
    s = dressed("Wan_22")
    s.adapter.save(tmp_path)
    other = build("Wan_22").pipe
    other.load_lora_weights(tmp_path)
    other.load_lora_weights(tmp_path, weight_name="transformer_2.safetensors", load_into_transformer_2=True)
    other.set_progress_bar_config(disable=True)
    assert gap(other(**s.adapter.arguments(s.cond.rows, True, s.steps, "latent"))[0], latents(s)) < 1e-6


def test_full_weights(tmp_path):
    s = subject("StableDiffusion3")
    with torch.no_grad():
        next(s.adapter.denoiser.parameters()).mul_(1.1)
    s.adapter.save(tmp_path)
    again = type(s.case.pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert gap(again(**s.adapter.arguments(s.cond.rows, True, s.steps, "latent"))[0], latents(s)) < 1e-6


# -- memory and speed --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion"])
def test_backends_that_would_do_nothing_are_refused(name):
    s = subject(name)
    with pytest.raises(ValueError, match="silently do nothing"):
        apply(s.adapter, Memory(attention="native"))
    apply(s.adapter, Memory(attention="math"))
    with torch.no_grad():
        assert (
            gap(
                s.adapter.posterior(s.begin(), s.times[0], s.cond).x0,
                s.adapter.posterior(s.begin(), s.times[0], s.cond).x0,
            )
            == 0
        )


def test_dispatched_backend_is_set_on_this_model_alone():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    s = subject("Flux")
    before = _AttentionBackendRegistry._active_backend
    apply(s.adapter, Memory(attention="_native_math"))
    assert _AttentionBackendRegistry._active_backend == before
    processors = [m.processor for m in s.adapter.denoiser.modules() if hasattr(m, "processor")]
    assert {p._attention_backend.value for p in processors} == {"_native_math"}
    with torch.no_grad():
        assert gap(s.adapter.posterior(s.begin(), s.times[0], s.cond).output, s.calls[0].output) < 1e-5


def test_options_that_this_model_or_machine_lacks_are_refused(monkeypatch):
    s = subject("StableDiffusion3")
    monkeypatch.setattr("diffusers.utils.import_utils.is_xformers_available", lambda: False)
    with pytest.raises(ValueError, match="xformers is not installed"):
        apply(s.adapter, Memory(attention="xformers"))
    with pytest.raises(ValueError, match="no repeated blocks"):
        apply(s.adapter, Memory(compile=True))
    apply(s.adapter, Memory(tiling=True))
    assert s.case.pipe.vae.use_tiling
    with pytest.raises(ValueError, match="does not decode in tiles"):
        apply(subject("DDIM").adapter, Memory(tiling=True))
    with pytest.raises(ValueError, match="no gradient checkpointing of its own"):
        monkeypatch.setattr(type(s.adapter.denoiser), "_supports_gradient_checkpointing", False)
        apply(s.adapter, Memory(checkpoint=True))


def test_regional_compilation_reaches_the_repeated_blocks_alone():
    s = subject("Flux")
    apply(s.adapter, Memory(compile=True))  # compiled when they first run
    compiled = {type(m).__name__ for m in s.adapter.denoiser.modules() if m._compiled_call_impl is not None}
    assert compiled == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}


def test_gradient_checkpointing_inside_the_network():
    s = subject("StableDiffusion3")
    x = s.begin().clone().requires_grad_()
    grads = []
    for again in (False, True):
        if again:
            apply(s.adapter, Memory(checkpoint=True))
        grads.append(torch.autograd.grad(s.adapter.posterior(x, s.times[1], s.cond).x0.square().sum(), x)[0])
    assert gap(grads[1], grads[0]) < 1e-6


def test_bf16_keeps_kernels_and_lora_in_float32():
    s = subject("StableDiffusion3")
    parameters = s.adapter.add_lora(2)
    with torch.no_grad():
        full = s.adapter.posterior(s.begin(), s.times[0], s.cond).x0
    apply(s.adapter, Memory(bf16=True))
    cond = s.adapter.encode([split(s.case.inputs)[0]])
    posterior = s.adapter.posterior(s.begin(), s.times[0], cond)
    assert posterior.x0.dtype == torch.float32 and gap(posterior.x0, full) < 0.1
    assert {p.dtype for p in parameters} == {torch.float32}
    posterior.x0.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_encoders_in_int8_by_torch_alone():
    s = subject("StableDiffusion3")
    full = s.adapter.posterior(s.begin(), s.times[0], s.cond).x0.detach()
    apply(s.adapter, Memory(quantize="dynamic"))
    parts = (s.case.pipe.text_encoder, s.case.pipe.text_encoder_2, s.case.pipe.text_encoder_3)
    for part in parts:
        assert not [m for m in part.modules() if type(m) is torch.nn.Linear]
    assert [m for m in s.adapter.denoiser.modules() if type(m) is torch.nn.Linear]
    cond = s.adapter.encode([split(s.case.inputs)[0]])  # relearnt: nothing of the old encodings is left
    assert 0 < gap(s.adapter.posterior(s.begin(), s.times[0], cond).x0.detach(), full) < 0.2
    parameters = s.adapter.add_lora(2)
    s.adapter.posterior(s.begin(), s.times[0], cond).x0.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    with pytest.raises(ValueError, match="quantised already"):
        apply(s.adapter, Memory(quantize="dynamic"))


def test_quantisation_that_would_do_nothing_is_refused(monkeypatch):
    s = subject("StableDiffusion3")
    for options, words in {
        Memory(quantize="int3"): "no quantisation 'int3'",
        Memory(quantize="int8"): "pip install torchao",
        Memory(quantized=("text_encoder",)): "does nothing without quantize",
        Memory(quantize="dynamic", quantized=("text_encoder_9",)): "no component text_encoder_9",
        Memory(quantize="dynamic", quantized=("transformer",)): "passes no gradient",
        Memory(quantize="dynamic", quantized=("vae",)): "do nothing",
    }.items():
        monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: None)
        if words == "do nothing":  # an autoencoder without attention has no linear layer
            for name in [n for n, m in s.case.pipe.vae.named_modules() if isinstance(m, torch.nn.Linear)]:
                s.case.pipe.vae.set_submodule(name, torch.nn.Identity())
        with pytest.raises(ValueError, match=words):
            apply(s.adapter, options)
    assert not [m for m in s.case.pipe.text_encoder.modules() if "Quantized" in type(m).__name__]
    with pytest.raises(ValueError, match="no text or image encoder"):
        apply(subject("DDIM").adapter, Memory(quantize="dynamic"))


class Packed(torch.Tensor):
    """Stand for torchao's tensor: a weight that has been rounded."""


def torchao(monkeypatch, narrow):
    """Put a torchao in place that rounds to 1/64, and passes over layers narrower than ``narrow``."""
    package, part = ModuleType("torchao"), ModuleType("torchao.quantization")
    part.Int8WeightOnlyConfig = part.Int4WeightOnlyConfig = part.Float8WeightOnlyConfig = SimpleNamespace

    def quantize_(module, config, wanted):
        for path, layer in module.named_modules():
            if wanted(layer, path) and layer.in_features >= narrow:
                rounded = ((layer.weight.data * 64).round() / 64).as_subclass(Packed)
                layer.weight = torch.nn.Parameter(rounded, requires_grad=False)

    part.quantize_ = quantize_
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", part)
    monkeypatch.setattr(quantise.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))


def test_frozen_base_under_a_lora_is_handed_to_torchao(monkeypatch):
    s = dressed("StableDiffusion3")
    before = s.adapter.posterior(s.begin(), s.times[0], s.cond).x0.detach()
    torchao(monkeypatch, 0)
    apply(s.adapter, Memory(quantize="int8", quantized=("transformer",)))
    trained = [p for p in s.adapter.denoiser.parameters() if p.requires_grad]
    assert trained and not any(isinstance(p, Packed) for p in trained)
    x0 = s.adapter.posterior(s.begin(), s.times[0], s.cond).x0
    assert 0 < gap(x0, before) < 0.2
    x0.sum().backward()
    assert all(p.grad is not None for p in trained)
    with pytest.raises(ValueError, match="rounded weights"):
        lora.merge(s.adapter.experts)
    torchao(monkeypatch, 10**9)
    with pytest.raises(ValueError, match="passed over every layer of text_encoder"):
        apply(s.adapter, Memory(quantize="int4", quantized=("text_encoder",)))


def test_quantisation_while_loading_is_diffusers_own(tmp_path, monkeypatch):
    s = subject("StableDiffusion3")
    config, seen = object(), []
    with pytest.raises(ValueError, match="quantization are for pipelines loaded here"):
        load(s.case.pipe, quantization=config)
    s.case.pipe.save_pretrained(tmp_path)
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", lambda folder, **options: seen.append(options) or s.case.pipe
    )
    load(tmp_path, quantization=config, dtype=torch.float32, check=False)
    load(tmp_path, check=False)
    assert seen == [{"quantization_config": config, "torch_dtype": torch.float32}, {}]


def test_offload_without_an_accelerator():
    s = subject("StableDiffusion3")
    if torch.accelerator.is_available():
        apply(s.adapter, Memory(offload=True))
    else:
        with pytest.raises(ValueError, match="no accelerator"):
            apply(s.adapter, Memory(offload=True))
