"""The zoo builds, runs, repeats, and names every pipeline class of the installed diffusers exactly once."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

from . import NOT_TRIED, REPRESENTATIVE, build, names


def run(name: str, seed: int = 0, output_type: str | None = None) -> torch.Tensor:
    """Build a case, call it, and return its first output as one tensor."""
    case = build(name, seed)
    extra = {}
    if "generator" in inspect.signature(inspect.unwrap(type(case.pipe).__call__)).parameters:
        extra["generator"] = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # for the few pipelines that draw from the global generator
    kind = output_type or case.output_type
    out = case.pipe(**case.inputs, **extra, num_inference_steps=case.steps, output_type=kind)[0]
    while isinstance(out, list | tuple):
        out = out[0]
    return torch.as_tensor(out)


def check(name: str) -> None:
    """A case is finite, not constant, the same for the same seed and another for another."""
    out = run(name)
    assert out.isfinite().all()
    assert out.float().std() > 0
    assert torch.equal(out, run(name))
    assert not torch.equal(out, run(name, seed=1))


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_representative_runs(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(names()) - set(REPRESENTATIVE)))
def test_runs(name):
    check(name)


def test_build_leaves_the_global_generator():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    build("StableDiffusion")
    assert torch.equal(torch.randn(3), expected)


def exported() -> set[str]:
    """Return the name of every pipeline class that the installed diffusers exports, its outputs and blocks aside."""
    no = ("Output", "Blocks", "PipelineQuantizationConfig")
    return {name for name in dir(diffusers) if "Pipeline" in name and not name.endswith(no)}


def test_every_class_is_here_or_explained():
    """A name stands for its class; variants stand for the class of the pipeline they build."""
    here = {f"{name}Pipeline" for name in names()} & exported()
    assert not here & NOT_TRIED.keys(), "a class cannot be both in the zoo and not tried"
    assert here | NOT_TRIED.keys() == exported()
    assert len(here) >= 190


@pytest.mark.slow
def test_variants_and_families():
    cases = [build(name) for name in names()]
    assert len({case.family for case in cases}) >= 60
    assert {case.modality for case in cases} == {"image", "video", "audio"}
